"""HybridModel: a frozen language model with recursive blocks inside; inject, run, switch off.

One forward: positions, mask and cache are settled once (settled_call.py) -> the language model's own layers
-> after layer k a hook hands the hidden state to that layer's TRM (injection_points.py) -> the remaining
layers -> logits. With W_out at zero the output equals the language model's, bit for bit.
"""

import copy
import inspect
import os
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.initialization import guard_torch_init_functions
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from hybrid.config import HybridConfig, trm_fields
from hybrid.config_checks import TRM_DTYPES
from hybrid.model.as_it_came import AsItCame, GivenBack, has_checkpoints
from hybrid.model.backbone import Backbone
from hybrid.model.cache import counts_tokens
from hybrid.model.cache_name import CACHE_NAME, is_argument_of, takes_cache
from hybrid.model.deep_supervision import answers_of, check_labels, of_last_rows, repeat_rows
from hybrid.model.generation import HybridGenerationMixin
from hybrid.model.halting import (
    ForwardSteps,
    Halting,
    TokenHalting,
    mean_over_points,
    recording,
)
from hybrid.model.injection import Injection, InjectionCall, current_call
from hybrid.model.injection_points import (
    attach,
    detach,
    keep_call_in_checkpoints,
    taken_out,
)
from hybrid.model.language_model import accepts_loss_kwargs, check_base, refer_to, unloaded_base
from hybrid.model.lora import add_lora, disabled, remove_lora
from hybrid.model.peft_targets import tell_peft
from hybrid.model.quantized_base import keep_gradients
from hybrid.model.settled_call import check_names, inputs_of, rule_of, settle
from hybrid.model.token_halting import forward_until_settled
from hybrid.model.training_warnings import TrainingWarnings
from hybrid.model.trm_names import is_trm_key
from hybrid.saving import base_checksum, base_reference, load_hybrid, save_hybrid
from trm_kernels import TRM
from trm_kernels.modules.curriculum import Depth
from trm_kernels.modules.layers import Matrix

_CONFIGS = frozenset(trm_fields())
# what depends on the language model's layers alone
_SUPPORTS = (
    "_supports_sdpa",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_attention_backend",
    "_can_compile_fullgraph",
    "_is_stateful",
)
_BLOCKS = threading.Lock()  # of all models; a lock of its own could not be copied with a model


logger = logging.get_logger(__name__)


class HybridModel(PreTrainedModel, HybridGenerationMixin):
    """A decoder-only language model of transformers with a TRM after some of its layers.

        model = HybridModel(llm_model=base, config=config)
        model.freeze_base()

    The wrapped model is used in place: `llm_model` is the very object that came in. Called by itself,
    outside of HybridModel.forward, it answers as it did before.

    Errors: ValueError for a base that is no causal language model, has no place for the injection
    points, or carries a TRM already.
    """

    config: HybridConfig
    config_class = HybridConfig
    base_model_prefix = "llm_model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # of the class, which knows no language model yet; an instance has its language model's
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = [CACHE_NAME]  # noqa: RUF012  transformers reads class attributes
    _no_split_modules = ["Injection"]  # noqa: RUF012
    # none of its own, and not None: PEFT then looks for those of the language model
    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A subclass, of the user or of FSDP2, is a causal language model under its name as well."""
        super().__init_subclass__(**kwargs)
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"{HybridConfig.model_type}.{cls.__name__}"] = cls.__name__

    def __init__(self, config: HybridConfig, llm_model: PreTrainedModel | None = None) -> None:
        if llm_model is not None:
            check_base(llm_model)
        if not isinstance(config, HybridConfig):
            raise ValueError(
                f"HybridModel: expected config to be a HybridConfig, got {type(config).__name__}."
            )
        if llm_model is None:
            check_base(llm_model := unloaded_base(config))
        came = AsItCame.of(llm_model)
        config = copy.deepcopy(config)
        refer_to(llm_model, config)
        config.base_config = llm_model.config
        config.check_base(llm_model.config)
        # asked by super().__init__, which would look in this file for what the base's own says of experts
        self._can_set_experts_implementation = (  # type: ignore[method-assign]
            llm_model._can_set_experts_implementation
        )
        super().__init__(config)

        self.llm_model = llm_model
        for name in _SUPPORTS:
            setattr(self, name, getattr(llm_model, name))
        # by these trainers decide whom to take for a reference, and what a forward takes
        self.accepts_loss_kwargs = accepts_loss_kwargs(llm_model)
        if not config.name_or_path:  # a fresh hybrid is its base; a loaded one has its own folder
            config.name_or_path = llm_model.config.name_or_path or ""
        self.generation_config = copy.deepcopy(llm_model.generation_config)
        self._base_arguments = frozenset(inspect.signature(llm_model.forward).parameters)
        self.takes_cache = is_argument_of(self._base_arguments) and counts_tokens(llm_model.config)
        if not self.takes_cache:
            self.generation_config.use_cache = False
        self.injection_enabled = True  # for good; disable_injection() is for a moment
        self._blocks = 0  # of disable_injection() that are open
        self.halting: Halting | TokenHalting | None = None  # of calls that say nothing about it; not saved
        self.training_depth: Depth | None = None  # of training forwards; not saved, see training/depth.py
        self.num_base_layers = llm_model.config.get_text_config(decoder=True).num_hidden_layers
        self.draws = 0  # forwards that drew a number of recursion steps; trainer_callback.py keeps it
        self.training_warnings = TrainingWarnings()
        self._added: list[Tensor] | None = None
        self.needs_input_gradients = True  # reentrant checkpoints differentiate down to the embeddings
        self._came = came
        attach(llm_model, config)
        tell_peft()
        keep_gradients(llm_model)
        keep_call_in_checkpoints(llm_model)  # of a base that came with checkpointing switched on
        self._draws_values = False  # the base came with its values, and the TRMs drew theirs
        self.post_init()
        self._draws_values = True
        if config.lora_rank is not None:
            add_lora(llm_model, config.lora_rank, TRM_DTYPES[config.trm_dtype])
        self.train(llm_model.training)
        config.belongs_to_model()
        self._base_config_then = llm_model.config.to_dict()
        # of each base tensor as it came, to tell later whether it is still so
        self._base_sums = base_checksum.tensor_sums(base_reference.base_tensors(self))
        self._files_give_base: str | bool | None = True  # not compared yet

    # The two kinds of parameters

    def trm_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of every TRM, projections and gates included; with lora_rank, the LoRA's too."""
        return (p for name, p in self.named_parameters() if is_trm_key(name))

    def base_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything that is not a TRM's."""
        return ((name, p) for name, p in self.named_parameters() if not is_trm_key(name))

    def freeze_base(self) -> Self:
        """Training phase 1: only the TRMs' parameters require gradients."""
        for _, parameter in self.base_named_parameters():
            parameter.requires_grad_(False)
        for parameter in self.trm_parameters():
            parameter.requires_grad_(True)
        return self

    @contextmanager
    def disable_injection(self) -> Iterator[Self]:
        """Within the block the model is its base: in every thread and task, until the last open block ends.

        Blocks may overlap in any order. A cache that was used in one is refused after it, as the TRM has not
        seen those tokens. `injection_enabled = False` is the same for good.
        """
        with _BLOCKS:
            self._blocks += 1
        try:
            with disabled(self.llm_model):
                yield self
        finally:
            with _BLOCKS:
                self._blocks -= 1

    @property
    def is_injecting(self) -> bool:
        """Whether a forward made now has the TRMs in it."""
        return self.injection_enabled and self._blocks == 0

    # Settings

    @property  # type: ignore[misc]  # __setattr__ sets it
    def loss_type(self) -> str:  # type: ignore[override]
        """The language model's, by which trainers decide how to count labels."""
        loss_type: str = self.llm_model.loss_type
        return loss_type

    @property  # type: ignore[misc]  # __setattr__ sets it
    def loss_function(self) -> Any:
        """The language model's, with which it makes the loss of `labels`; one that is set is set there."""
        return self.llm_model.loss_function

    def __setattr__(self, name: str, value: Any) -> None:
        """As a module does; what is the language model's, or the config's, is set there or refused."""
        if name == "loss_type" and "llm_model" not in self.__dict__.get("_modules", {}):
            return  # PreTrainedModel's constructor takes it from the class's name
        if name in ("loss_function", "loss_type") and "llm_model" in self.__dict__.get("_modules", {}):
            # a module would be kept as a child, where nothing looks for it
            setattr(self.llm_model, name, value.__call__ if isinstance(value, nn.Module) else value)
        elif name in _CONFIGS:
            raise ValueError(f"HybridModel: expected model.config.{name} to be set, got model.{name}.")
        elif name == "gradient_checkpointing":
            raise ValueError(
                "HybridModel: expected gradient_checkpointing_enable() or _disable(), got an attribute set."
            )
        else:
            super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is in no block of the original, and its config is its own."""
        super().__setstate__(state)
        self._blocks = 0
        self.config.belongs_to_model()

    @contextmanager
    def recording_what_is_added(self) -> Iterator[list[Tensor]]:
        """Within the block forwards put into the list how much each injection point adds to each token.

        That is |h' - h|^2 / |h|^2, [B, T] float32, with gradient; a forward without deep supervision.
        """
        before, self._added = self._added, []
        try:
            yield self._added
        finally:
            self._added = before

    # One forward

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_recursion_steps: int | None = None,
        halting: Halting | TokenHalting | Literal[False] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The language model's forward, with the TRMs' answers blended in.

        Arguments are the language model's; two are ours:
        num_recursion_steps   n for this call; None takes the config's, or draws it (recursion_sampling)
        halting               when a token stops before n, see halting.py; None takes `self.halting`, which is
                              None at first; False: never

        With deep_supervision a training forward runs what is above the last injection point on one row for
        each of its answers: the loss of `labels` is their mean, all else is of the last answer.

        Errors: ValueError for a cache filled with another n or under another rule, or used where there is
        deep supervision, which also wants labels in training; for halting in training; for a setting of the
        config; and for both or neither of input_ids and inputs_embeds. RuntimeError when an injection did not
        happen, or for halting with gradient or under torch.compile.
        """
        check_names(kwargs, self._base_arguments)
        inputs = inputs_of(input_ids, inputs_embeds)
        rule = rule_of(self, halting)
        if isinstance(rule, TokenHalting):
            if use_cache or past_key_values is not None:
                raise ValueError("HybridModel: TokenHalting expected use_cache=False, got a cache.")
            given = {"attention_mask": attention_mask, "position_ids": position_ids}
            return forward_until_settled(
                self, inputs, rule, given, labels, logits_to_keep, num_recursion_steps, kwargs
            )
        answers = answers_of(self, labels, is_recorded=self._added is not None)
        call, given = settle(
            self, inputs, attention_mask, position_ids, past_key_values, use_cache, num_recursion_steps, rule
        )
        if answers > 1 and call is not None:
            labels = repeat_rows(self, call, answers, labels, kwargs)

        arguments = {"position_ids": position_ids, "logits_to_keep": logits_to_keep, "labels": labels}
        arguments = {k: v for k, v in arguments.items() if v is not None and k in self._base_arguments}
        given |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        output = self._run(self.llm_model, call, inputs, **given, **arguments, **kwargs)
        return output if answers == 1 else of_last_rows(output, len(inputs))

    def run_decoder(
        self,
        decoder: nn.Module,
        input_ids: Tensor | None,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        num_recursion_steps: int | None,
        halting: Halting | TokenHalting | Literal[False] | None,
        **kwargs: Any,
    ) -> Any:
        """What Backbone.forward is: `decoder`, a part of the language model, with the injections in it."""
        inputs, rule = inputs_of(input_ids, inputs_embeds), rule_of(self, halting)
        if isinstance(rule, TokenHalting):
            raise ValueError("HybridModel: TokenHalting chooses among logits, got a call without the head.")
        check_labels(self, "one that takes the last hidden state")
        call, given = settle(
            self, inputs, attention_mask, position_ids, past_key_values, use_cache, num_recursion_steps, rule
        )
        given |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        if position_ids is not None and "position_ids" in inspect.signature(decoder.forward).parameters:
            given["position_ids"] = position_ids
        return self._run(decoder, call, inputs, **given, **kwargs)

    def _run(self, module: nn.Module, call: InjectionCall | None, inputs: Tensor, **given: Any) -> Any:
        """`module`, which holds all of the layers, under this call."""
        if call is not None:
            call.added = self._added
        before = current_call.set(call)
        try:
            output = module(**given)
        finally:
            current_call.reset(before)
        if call is not None and call.done != len(self.config.injection_layers):
            raise RuntimeError(
                f"HybridModel: expected {len(self.config.injection_layers)} injections in this forward, "
                f"got {call.done}: the base skipped layers."
            )
        if call is not None and (record := recording()) is not None:
            record.forwards.append(self._steps_of(call, inputs))
        return output

    def _steps_of(self, call: InjectionCall, inputs: Tensor) -> ForwardSteps:
        B, T = inputs.shape[:2]
        n, num_cycles = call.spec.num_recursion_steps, call.spec.num_cycles
        if call.halting is None:
            steps, evaluations = torch.full((B, T), float(n)), torch.full((B, T), float(num_cycles * (n + 1)))
        else:
            steps, evaluations = mean_over_points(call.steps)
        is_token = torch.ones(B, T, dtype=torch.bool) if call.is_token is None else call.is_token.cpu()
        return ForwardSteps(steps, evaluations, is_token)

    def draw_recursion_steps(self, draw: int | None = None) -> int:
        """A number from 1..num_recursion_steps, by the config's seed and the draw's number.

        draw   None goes on from the draw before; a training step's number makes a resumed run repeat
        """
        if draw is None:
            draw, self.draws = self.draws, self.draws + 1
        generator = random.Random(f"{self.config.recursion_seed}:{draw}")
        return generator.randint(1, self.config.num_recursion_steps)

    # Files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        save_base: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Write config.json and model.safetensors; beside the old ones first, then renamed.

        save_base   None: the TRMs' tensors only, where the base can be had again by its name or path
                    and is as it came; else the whole model, and a warning says why. False: the TRMs' tensors
                    only, or an error

        After add_adapter or load_adapter the adapter alone is written, as of any model of transformers; then
        a save_base, and a TRM that is neither in it nor in the folder that the hybrid came from, is an error.

        Errors: ValueError for the base's own folder and one of another model, when the base carries adapters
        of its own (LoRA), which a file could not load, when its config was changed so that its tensors do
        not fit, and with save_base=False where the reference cannot give this base again.
        """
        state_dict = self.state_dict() if state_dict is None else state_dict
        if not is_main_process:
            return
        write = super().save_pretrained
        save_hybrid.save(self, write, save_directory, save_base, state_dict, *args, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        config: HybridConfig | str | os.PathLike[str] | None = None,
        llm_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a saved hybrid, its base from where the config says.

        llm_model   a base that is loaded already; None loads config.base_model_name_or_path
        kwargs      those of transformers' from_pretrained (dtype, device_map, ...); they reach the base

        Errors: ValueError for a file that is missing, damaged or does not fit, OSError for a missing folder.
        """
        return load_hybrid.load(
            cls,
            super().from_pretrained,
            pretrained_model_name_or_path,
            *args,
            config=config,
            llm_model=llm_model,
            **kwargs,
        )

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: transformers would copy this file beside each saved model; see modeling_file.py."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's; not strict, what a file of the TRMs alone lacks of the base is not called missing."""
        keys = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if all(is_trm_key(name) for name in state_dict):
            keys.missing_keys[:] = [name for name in keys.missing_keys if is_trm_key(name)]
        return keys

    def unwrap(self) -> PreTrainedModel:
        """Take the TRMs out of the language model and give it back as it came: no hook or module is left.

        Its config and loss are those of before, and its parameters require gradients as they did. What was
        trained of them stays. This model is of no use then: whatever it is asked is a ValueError.
        """
        base: Any = self.llm_model
        detach(base)
        remove_lora(base)
        if has_checkpoints(base) and not self._came.has_checkpoints:
            # the second name is that of older versions
            getattr(base, "activation_checkpointing_disable", base.gradient_checkpointing_disable)()
        self._came.restore(base)
        self._modules["llm_model"] = GivenBack()
        return base

    # What transformers asks of a model

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        keep_call_in_checkpoints(self)
        options = getattr(kwargs.get("gradient_checkpointing_func"), "keywords", {})
        self.needs_input_gradients = options.get("use_reentrant", True)

    def enable_input_require_grads(self) -> None:
        """Nothing, under checkpoints that are not reentrant: those find the TRMs' parameters by themselves.

        transformers calls it whenever checkpointing is switched on. A frozen base would then be recomputed
        and differentiated down to its embeddings, for gradients of which none is used.
        """
        if self.needs_input_gradients:
            super().enable_input_require_grads()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Give tensors that came from no file their values, as from_pretrained and init_weights want it.

        Those of the language model by its own rule, which may draw whatever it finds in a layer: so the TRMs
        are taken out for it. By transformers' rule for a class outside its package, as this one, FalconH1
        would not fill the buffers of its layers.
        """
        if not self._draws_values:
            return
        with taken_out(self.llm_model) as injections:
            self.llm_model.initialize_weights()
        with guard_torch_init_functions():  # leaves what came from a file
            for module in (m for one in injections for m in reversed(list(one.modules()))):
                if isinstance(module, Matrix | TRM | Injection):
                    module.reset_parameters()

    @property
    def base_model(self) -> Backbone:
        """All but the head, TRMs included: what trainers call that make the logits themselves."""
        whole = self.llm_model.base_model
        return Backbone(self, self.llm_model.get_decoder() if whole is self.llm_model else whole)

    def get_decoder(self) -> Backbone:
        """The hybrid without its head: a call gives the last hidden state, through the TRMs."""
        return Backbone(self, self.llm_model.get_decoder())

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The language model's encoder for `modality`; the hybrid itself where there is none."""
        encoder = self.llm_model.get_encoder(modality=modality)
        return self if encoder is self.llm_model else encoder

    def get_input_embeddings(self) -> nn.Module:
        """The language model's embeddings."""
        return self.llm_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's embeddings."""
        self.llm_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.llm_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's head."""
        self.llm_model.set_output_embeddings(value)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Of the language model; the TRM's attention is its own."""
        self.llm_model.set_attn_implementation(*args, **kwargs)


CombinedTRMLLM = HybridModel
"""The name of HybridModel in the training guide."""


MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[HybridConfig.model_type] = HybridModel.__name__
AutoConfig.register(HybridConfig.model_type, HybridConfig)
AutoModelForCausalLM.register(HybridConfig, HybridModel)
