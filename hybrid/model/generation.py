"""How a hybrid generates: room for the TRMs in caches, masks made beforehand, continuous batching."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate

from hybrid.config import HybridConfig
from hybrid.model.cache import leave_to_base, make_room
from hybrid.model.cache_name import CACHE_NAME, as_argument, takes_cache
from hybrid.model.halting import TokenHalting
from hybrid.model.masks import as_entries, visible
from hybrid.model.settled_call import num_trm_cache_layers, recursion_steps, rule_of

if TYPE_CHECKING:
    from hybrid.model.hybrid_model import HybridModel

# arguments of a forward, and where a model has them for calls without
_OF_A_CALL = {"num_recursion_steps": "model.config.num_recursion_steps", "halting": "model.halting"}


class HybridGenerationMixin(GenerationMixin):
    """What transformers' generate and generate_batch ask of a model that they do not know to have TRMs."""

    config: HybridConfig
    llm_model: PreTrainedModel
    num_base_layers: int

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """transformers', which keeps from the forward what stands in the config."""
        of_call = {name: kwargs.pop(name) for name in _OF_A_CALL if name in kwargs}
        generation_config, of_forward = super()._prepare_generation_config(*args, **kwargs)  # type: ignore[misc]
        _refuse_of_a_call(generation_config)
        return generation_config, of_forward | of_call

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """The base's cache, with room for the TRMs before the first mask is made from it."""
        hybrid: HybridModel = self  # type: ignore[assignment]
        is_callers = model_kwargs.get(CACHE_NAME) is not None
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )
        cache = model_kwargs.get(CACHE_NAME)
        if cache is None:
            return
        if not hybrid.is_injecting:
            leave_to_base(cache, self.num_base_layers)
            return
        rule = rule_of(hybrid, model_kwargs.get("halting"))
        if isinstance(rule, TokenHalting):
            raise ValueError("HybridModel: TokenHalting expected use_cache=False, got a cache.")
        n = recursion_steps(hybrid, model_kwargs.get("num_recursion_steps"), cache)
        # of a static cache made here; a sliding layer is shorter, and the TRM looks at everything
        length = None if is_callers else getattr(self, "_previous_max_cache_length", None)
        spec = replace(self.config.recursion_spec, num_recursion_steps=n)
        num_layers = num_trm_cache_layers(hybrid, spec, rule)
        make_room(cache, self.num_base_layers, num_layers, length, rule, spec)

    @takes_cache
    def create_masks_for_generate(
        self,
        config: HybridConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's masks, and the TRMs' beside them, made before the compiled forward."""
        of_base = getattr(self.llm_model, "create_masks_for_generate", create_masks_for_generate)
        base = of_base(
            config=self.llm_model.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **as_argument(past_key_values),
            **kwargs,
        )
        if not self.is_injecting:  # type: ignore[attr-defined]
            return base
        what = visible(inputs_embeds, attention_mask, past_key_values, self.num_base_layers, position_ids)
        trm = as_entries(what, inputs_embeds)
        return {**base, **trm} if isinstance(base, dict) else {"base": base, **trm}

    def _supports_logits_to_keep(self) -> bool:
        """Whether the language model has it: what it does not have would be dropped without a word."""
        return "logits_to_keep" in self._base_arguments  # type: ignore[attr-defined]

    # Continuous batching, by which transformers serves

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        *args: Any,
        num_recursion_steps: int | None = None,
        halting: Literal[False] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' generate_batch, whose answers are generate()'s; num_recursion_steps as in a forward.

        Errors: ValueError for what it cannot serve, see hybrid/serving/continuous_batching.py.
        """
        view = self._batched(generation_config, num_recursion_steps, halting)
        return view.generate_batch(inputs, generation_config, *args, **kwargs)

    def continuous_batching_context_manager(
        self,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        num_recursion_steps: int | None = None,
        halting: Literal[False] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' context manager of a manager; see generate_batch."""
        view = self._batched(generation_config, num_recursion_steps, halting)
        return view.continuous_batching_context_manager(generation_config, *args, **kwargs)

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        num_recursion_steps: int | None = None,
        halting: Literal[False] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' manager of requests; see generate_batch."""
        view = self._batched(generation_config, num_recursion_steps, halting)
        return view.init_continuous_batching(generation_config, *args, **kwargs)

    def _batched(
        self,
        generation_config: GenerationConfig | None,
        num_recursion_steps: int | None,
        halting: Literal[False] | None,
    ) -> Any:
        from hybrid.serving.continuous_batching import BatchedHybrid  # it imports this package's model

        _refuse_of_a_call(generation_config)
        _refuse_of_a_call(self.generation_config)
        return BatchedHybrid(self, num_recursion_steps, halting)  # type: ignore[arg-type]


def _refuse_of_a_call(generation_config: GenerationConfig | None) -> None:
    """ValueError for what nothing would read there."""
    for name, place in _OF_A_CALL.items():
        if getattr(generation_config, name, None) is not None:
            raise ValueError(
                f"HybridModel: expected {name} as an argument or as {place}, got it in generation_config, "
                "where nothing reads it."
            )
