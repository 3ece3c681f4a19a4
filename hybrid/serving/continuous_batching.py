"""A hybrid as transformers' continuous batching sees it: `generate_batch`, and `transformers serve`.

Continuous batching asks a model for its config, sizes a paged cache from it, and calls the model with one row
of tokens of many sequences. `BatchedHybrid` answers for a hybrid: its config has layers for the TRMs. In a
forward the injection points keep their keys there. All else that it is asked is the hybrid's own answer.

What would not equal `generate` is refused before the first token: transformers would log an error of its
background thread and hand back the tokens that it has.
"""

import copy
import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import ContinuousBatchingConfig, PreTrainedConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import ContinuousMixin

from hybrid.config_values import check_steps, is_int
from hybrid.model.injection import trm_evaluations
from hybrid.serving.paged_keys import SLIDING, PagedKeys, attention_types, masks, with_room

if TYPE_CHECKING:
    from hybrid.model.hybrid_model import HybridModel

# change logits by the logits alone; transformers runs them, and does not say that it supports them
_READ_NO_TOKENS = frozenset(
    {
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinPLogitsWarper",
        "SuppressTokensLogitsProcessor",
        "TopHLogitsWarper",
        "TypicalLogitsWarper",
    }
)
_MANAGER = "_cached_continuous_batching_manager"  # where transformers keeps one that is persistent


class BatchedHybrid(nn.Module, ContinuousMixin):
    """A view of `hybrid` with this n; what is set on it is set on the hybrid.

    Errors: ValueError for what continuous batching cannot serve, see `_refuse`.
    """

    def __init__(self, hybrid: "HybridModel", num_recursion_steps: int | None, halting: Any) -> None:
        super().__init__()
        n = hybrid.config.num_recursion_steps if num_recursion_steps is None else num_recursion_steps
        check_steps("HybridModel", "num_recursion_steps", n)
        self._modules["hybrid"] = hybrid
        config = hybrid.config
        asked = (
            n,
            hybrid.is_injecting,
            config.recursion_spec,
            config.injection_strength,
            config.trm_input_norm,
        )
        self.__dict__.update(num_recursion_steps=n, injects=hybrid.is_injecting, computes=asked)
        _refuse(hybrid, hybrid.halting if halting is None else halting)
        kept = getattr(hybrid, _MANAGER, None)
        if kept is not None and kept.model.computes != asked:
            raise ValueError(
                "HybridModel: a persistent manager was made for another num_recursion_steps, another config, "
                "or with the injection on or off: destroy_cached_continuous_batching_manager() first."
            )

    @property
    def config(self) -> PreTrainedConfig:
        """The language model's, with layers for the TRMs: what the paged cache is sized from."""
        config = self._hybrid.config
        base = config.get_text_config(decoder=True)
        if not self.injects:
            return base
        spec = replace(config.recursion_spec, num_recursion_steps=self.num_recursion_steps)
        evaluations = trm_evaluations(config, spec, None) * len(config.injection_layers)
        return with_room(
            base, evaluations, spec.num_key_value_heads * config.trm_hidden_size // spec.num_heads
        )

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """transformers', which drops arguments that it does not know: here they are an error."""
        known = {*inspect.signature(ContinuousMixin.generate_batch).parameters, "max_new_tokens"}
        if unknown := sorted(kwargs.keys() - known):
            raise ValueError(
                f"HybridModel: generate_batch expected no {', '.join(unknown)}. Settings of generation other "
                "than max_new_tokens, num_recursion_steps and halting stand in generation_config."
            )
        _refuse_prompts(self._hybrid, inputs)
        given = inspect.signature(super().generate_batch).bind(inputs, *args, **kwargs).arguments
        generation = given.get("generation_config") or self._hybrid.generation_config
        new = given.get("kwargs", {}).get("max_new_tokens") or generation.max_new_tokens or 1
        room = self._room(given.get("continuous_batching_config"))
        for i, prompt in enumerate(inputs):
            if room is not None and len(prompt) + new - 1 > room:
                raise ValueError(
                    "HybridModel: generate_batch expected a prompt and its new tokens but for the last in "
                    f"{room} places, got {len(prompt)} and {new} in prompt {i}: see num_blocks and page_size "
                    "of the continuous_batching_config, and the language model's positions."
                )
        return super().generate_batch(inputs, *args, **kwargs)

    def _room(self, settings: ContinuousBatchingConfig | None) -> int | None:
        """The most tokens that a sequence may have, where that is known before the start."""
        kept = getattr(self._hybrid, _MANAGER, None)
        settings = settings if kept is None else kept.continuous_batching_config
        found = [learned_positions(self._hybrid)]
        # layers with a window hold fewer tokens, and leave their room to others
        if settings is not None and settings.num_blocks and SLIDING not in attention_types(self._base):
            found.append(settings.num_blocks * settings.page_size)
        return min((count for count in found if count is not None), default=None)

    def init_continuous_batching(  # type: ignore[override]
        self, generation_config: Any = None, continuous_batching_config: Any = None, **kwargs: Any
    ) -> Any:
        """transformers' manager; settings that would leave out the TRMs, or change answers, are refused."""
        given = generation_config or self._hybrid.generation_config
        if (beams := getattr(given, "num_beams", None) or 1) > 1:
            raise ValueError(f"HybridModel: continuous batching expected num_beams 1, got {beams}.")
        if torch.is_inference_mode_enabled():
            raise ValueError("HybridModel: continuous batching expected a call outside of inference_mode.")
        _refuse_processors(self._hybrid, given)
        if self.injects:
            continuous_batching_config = _settings(given, continuous_batching_config)
        return super().init_continuous_batching(generation_config, continuous_batching_config, **kwargs)

    def forward(self, attention_mask: Any = None, **given: Any) -> Any:
        """One row of tokens of many sequences, as continuous batching gives it."""
        hybrid = self._hybrid
        if hybrid.is_injecting != self.injects:
            raise RuntimeError(
                "HybridModel: the injection was switched on or off while continuous batching was running."
            )
        base = self._base
        keys = PagedKeys(given, base)
        given["cache"] = keys if self.injects else keys.of_base()
        if not self.injects:
            return hybrid(attention_mask=attention_mask, **given)
        return hybrid(
            attention_mask=masks(base, attention_mask, given, hybrid.dtype),
            num_recursion_steps=self.num_recursion_steps,
            halting=False,
            **given,
        )

    @property
    def _base(self) -> PreTrainedConfig:
        """The language model's text config."""
        base: PreTrainedConfig = self._hybrid.config.get_text_config(decoder=True)
        return base

    @property
    def _hybrid(self) -> "HybridModel":
        hybrid: Any = self._modules["hybrid"]
        return hybrid

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_modules"]["hybrid"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "hybrid" in self.__dict__.get("_modules", {}):
            setattr(self._hybrid, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._hybrid, name)


def _refuse(hybrid: "HybridModel", halting: Any) -> None:
    """Errors: ValueError for a hybrid whose answers continuous batching could not give, with the reason."""
    base, regime, why = type(hybrid.llm_model), hybrid.config.trm_regime, None
    if "kwargs" not in inspect.signature(PagedAttentionCache.update).parameters:
        why = "transformers 5.19 or newer: older paged caches have no room for the TRMs' keys"
    elif not base._supports_attention_backend:
        why = (
            "a language model whose attention is transformers' interface (_supports_attention_backend), got "
            f"{base.__name__}. generate() runs it"
        )
    elif getattr(hybrid, "_device_mesh", None) is not None:
        why = "one device, got tensor parallelism"
    elif hybrid.is_injecting and halting is not None and halting is not False:
        why = (
            f"no halting, got {halting}: the tokens of many requests are one row, all of the same number of "
            "steps. generate() halts; halting=False runs all steps"
        )
    elif hybrid.is_injecting and regime not in ("auto", "per_op"):
        why = f"trm_regime auto or per_op, got {regime!r}: one launch cannot read keys from pages"
    if why is not None:
        raise ValueError(f"HybridModel: continuous batching expected {why}.")


def _refuse_prompts(hybrid: "HybridModel", prompts: list[list[int]]) -> None:
    """Errors: ValueError for prompts that a forward cannot read, before any is begun."""
    if not all(isinstance(prompt, list) and prompt for prompt in prompts):
        raise ValueError("HybridModel: generate_batch expected lists of token ids, none of them empty.")
    embeddings: Any = hybrid.get_input_embeddings()
    count = embeddings.weight.shape[0]
    for i, prompt in enumerate(prompts):
        if other := [token for token in prompt if not (is_int(token) and 0 <= token < count)]:
            raise ValueError(
                f"HybridModel: generate_batch expected token ids in 0..{count - 1}, got {other[0]!r} "
                f"in prompt {i}."
            )


def learned_positions(hybrid: "HybridModel") -> int | None:
    """How many positions have a learned embedding; None where positions are computed, however many."""
    count = getattr(hybrid.config.get_text_config(decoder=True), "max_position_embeddings", None)
    of_tokens = hybrid.get_input_embeddings()
    tables = [m for m in hybrid.llm_model.modules() if isinstance(m, nn.Embedding) and m is not of_tokens]
    # OPT's table has two rows more than positions
    return count if any(table.num_embeddings - (count or 0) in (0, 2) for table in tables) else None


def _refuse_processors(hybrid: Any, generation_config: Any) -> None:
    """Errors: ValueError for what changes logits in `generate` and transformers' batching does not take."""
    generation_config = copy.deepcopy(generation_config)
    hybrid._prepare_special_tokens(generation_config, kwargs_has_attention_mask=True)
    names = [
        type(processor).__name__
        for processor in hybrid._get_logits_processor(generation_config, input_ids_seq_length=1)
        if not getattr(processor, "supports_continuous_batching", None)
        and type(processor).__name__ not in _READ_NO_TOKENS
    ]
    if names:
        raise ValueError(
            f"HybridModel: continuous batching expected a generation_config without {', '.join(names)}: "
            "what reads the tokens before is left out there, or reads those of other requests. generate() "
            "runs it."
        )


def _settings(generation_config: Any, given: Any) -> ContinuousBatchingConfig:
    """Those of continuous batching. Errors: ValueError for graphs, compilation and tables of blocks."""
    given = given or getattr(generation_config, "continuous_batching_config", None)
    settings = ContinuousBatchingConfig() if given is None else copy.copy(given)
    graphs = settings.use_cuda_graph
    asked = {
        "max_blocks_per_request": settings.max_blocks_per_request,
        "use_cuda_graph": any(graphs) if isinstance(graphs, tuple) else graphs,
        "q_padding_interval_size": settings.q_padding_interval_size,
        "kv_padding_interval_size": settings.kv_padding_interval_size,
        "varlen_compile_config": settings.varlen_compile_config,
        "decode_compile_config": settings.decode_compile_config,
        "default_compile_level": settings.default_compile_level,
        "compile_config": getattr(generation_config, "compile_config", None),
    }
    for name, value in asked.items():
        if value:
            raise ValueError(
                f"HybridModel: continuous batching expected {name} to be left out, got {value!r}: tables of "
                "blocks reach the language model alone, and graphs of a recursion over pages are not tested."
            )
    settings.max_blocks_per_request = 0
    settings.use_cuda_graph = False
    return settings
