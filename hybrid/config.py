"""HybridConfig: what may be chosen about the recursive block, and what may not be combined."""

import dataclasses
import inspect
import os
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from hybrid.config_checks import check_block, check_reference
from hybrid.config_values import (
    check_base_config,
    check_layers,
    check_steps,
    read_json_object,
    short,
)
from hybrid.error_text import did_you_mean, nearest
from hybrid.saving.modeling_file import AUTO_MAP
from trm_kernels.recursion.spec import RecursionSpec

# what TRM, its paper and trm_recursion call some fields, and what a hybrid does not have
_OTHER_NAMES = {
    "eps": "trm_rms_norm_eps",
    "L_cycles": "num_recursion_steps",
    "H_cycles": "num_cycles",
    "supervision_steps": "deep_supervision",
}
_OF_TRM_ALONE = ("mlp_t", "seq_len", "causal")
# of a saved config that does not say: it was written before there was such a norm
_NO_NORM = {"trm_input_norm": False}
# the weights' shapes and places: fixed once a model is made
_BUILT_IN = (
    "injection_layers",
    "trm_hidden_size",
    "trm_num_heads",
    "trm_num_layers",
    "trm_num_key_value_heads",
    "trm_intermediate_size",
    "blending_strategy",
    "trm_dtype",
    "lora_rank",
    "base_config",
)
# what transformers keeps in every config and means the whole model by; all else is the language model's
_OF_THE_WHOLE = frozenset(
    {
        "architectures",
        "auto_map",
        "model_type",
        "dtype",
        "torch_dtype",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "is_encoder_decoder",
        "name_or_path",
        "quantization_config",
        "transformers_version",
        "transformers_weights",
    }
)
# every config of transformers has these itself, so that looking for them would end before the language model
_ALWAYS_THE_BASES = frozenset(
    {
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "use_return_dict",
        "rope_scaling",
        "chunk_size_feed_forward",
        "_output_attentions",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_experts_implementation_internal",
    }
)


class HybridConfig(PreTrainedConfig):
    """Where a TRM is injected into a language model, how large it is, and how often it recurses.

    injection_layers         points after k decoder layers, sorted; 0 is on the embeddings
    trm_hidden_size          d, the TRM's width; a multiple of trm_num_heads
    trm_num_heads            attention heads of the TRM
    trm_num_layers           layers of the TRM's block, applied in every step
    trm_num_key_value_heads  key/value heads (GQA); default trm_num_heads; fewer make the decode cache smaller
    trm_intermediate_size    the MLP's inner width; default 8/3 d rounded up to a multiple of 256
    num_recursion_steps      n, updates of the latent state z in a cycle
    num_cycles               updates of the answer y
    grad_cycles              the last cycles that pass gradients; None = all
    deep_supervision         in training, the loss is the mean of those with the answer of the last injection
                             point after each of these cycles, not after the last alone
    injection_strength       the factor of what is added to the hidden state
    blending_strategy        "linear" (gate 1) or "gated" (a sigmoid of a learned score per token)
    recursion_sampling       "fixed", or "uniform": each training forward draws n from 1..num_recursion_steps
    recursion_seed           of these draws
    trm_input_norm           whether what comes in is normed behind its projection as well, so that it cannot
                             drown y and z: x = rms(rms(h) W_in^T); a saved config that does not say has none
    trm_rope_theta           RoPE's base in the TRM's attention
    trm_rms_norm_eps         eps of every norm of the TRM
    trm_dtype                of the TRM's parameters: "float32", "bfloat16" or "float16"; it computes in the
                             base's dtype all the same
    trm_save                 what the TRMs keep for backward: "auto", "all", "layer" or "step"; see
                             trm_kernels/recursion/fused_recursion.py
    trm_attention            who computes the TRM's attention: "auto", "triton", "sdpa", "reference", ...; see
                             trm_kernels/ops/attention/rope_attention.py; one that is not there is an error
                             when it runs
    trm_regime               how the TRMs are launched without gradient: "auto", "per_op", "one_launch" or
                             "per_phase"; see trm_kernels/recursion/one_launch/launchers.py
    trm_quantize             the TRMs' matrices in 8 bits for inference: "int8" or "fp8"; default none; see
                             trm_kernels/recursion/quantize.py
    trm_cache                which keys and values of a token later ones attend to: "all", in each step those
                             of the same step, or "last", those of its last step alone: what a cache keeps
                             then does not grow with n, and training goes token after token; see
                             trm_kernels/recursion/in_order.py
    lora_rank                rank of LoRA on the language model's linear layers, learning and saved with the
                             TRMs; in phase 2 it learns in place of the base; default none
    base_config              the language model's config; HybridModel fills it in
    base_model_name_or_path  where the language model's weights are; None: they are saved with the TRM
    base_revision, base_subfolder, base_gguf_file   which of what is there; HybridModel fills them in
    base_checksums           dtype -> checksum of the language model's weights, compared when they are loaded
    base_is_frozen           whether nothing of the language model required gradients when it was saved

    On the config of a HybridModel (`model.config.num_cycles = 3`) a field takes effect with the next
    forward. Those that are built into the weights (injection_layers, blending_strategy, the TRM's sizes and
    dtype) and base_config are fixed there: another value is refused. So is whatever the constructor refuses;
    `update` sets several at once. What else is set or read (`use_cache`, `pad_token_id`, `hidden_size`, ...)
    is the language model's, and does what it does on that model's config.

    Errors: ValueError, with what was expected and what came.
    """

    model_type = "trm_hybrid"
    sub_configs = {"base_config": AutoConfig}  # noqa: RUF012  transformers reads it as a class attribute
    has_no_defaults_at_init = True
    __slots__ = ("_is_in_model",)  # beside __dict__, which is what is saved, compared and copied

    def __init__(
        self,
        injection_layers: list[int] | None = None,
        trm_hidden_size: int = 512,
        trm_num_heads: int = 8,
        trm_num_layers: int = 2,
        trm_num_key_value_heads: int | None = None,
        trm_intermediate_size: int | None = None,
        num_recursion_steps: int = 4,
        num_cycles: int = 1,
        grad_cycles: int | None = 1,
        deep_supervision: bool = False,
        injection_strength: float = 1.0,
        blending_strategy: str = "linear",
        recursion_sampling: str = "fixed",
        recursion_seed: int = 0,
        trm_rope_theta: float = 10000.0,
        trm_rms_norm_eps: float = 1e-5,
        trm_dtype: str = "float32",
        trm_save: str = "auto",
        trm_attention: str = "auto",
        trm_regime: str = "auto",
        trm_quantize: str | None = None,
        lora_rank: int | None = None,
        trm_input_norm: bool = True,
        trm_cache: str = "all",
        base_config: PreTrainedConfig | dict[str, Any] | None = None,
        base_model_name_or_path: str | None = None,
        base_revision: str | None = None,
        base_subfolder: str | None = None,
        base_gguf_file: str | None = None,
        base_checksums: dict[str, str] | None = None,
        base_is_frozen: bool = False,
        **kwargs: Any,
    ) -> None:
        self.injection_layers = check_layers(injection_layers)
        self.trm_hidden_size = trm_hidden_size
        self.trm_num_heads = trm_num_heads
        self.trm_num_layers = trm_num_layers
        self.trm_num_key_value_heads = (
            trm_num_heads if trm_num_key_value_heads is None else trm_num_key_value_heads
        )
        self.trm_intermediate_size = trm_intermediate_size
        self.num_recursion_steps = num_recursion_steps
        self.num_cycles = num_cycles
        self.grad_cycles = grad_cycles
        self.deep_supervision = deep_supervision
        self.injection_strength = injection_strength
        self.blending_strategy = blending_strategy
        self.recursion_sampling = recursion_sampling
        self.recursion_seed = recursion_seed
        self.trm_rope_theta = trm_rope_theta
        self.trm_rms_norm_eps = trm_rms_norm_eps
        self.trm_dtype = str(trm_dtype).removeprefix("torch.")
        self.trm_save = trm_save
        self.trm_attention = trm_attention
        self.trm_regime = trm_regime
        self.trm_quantize = trm_quantize
        self.lora_rank = lora_rank
        self.trm_input_norm = trm_input_norm
        self.trm_cache = trm_cache
        check_block(self)

        base_config = check_base_config(base_config, HybridConfig.model_type)
        if not isinstance(base_model_name_or_path, str | os.PathLike | None):
            raise ValueError(
                "HybridConfig: expected base_model_name_or_path to be a name, a path or None, "
                f"got {short(base_model_name_or_path)}."
            )
        self.base_model_name_or_path = (
            None if base_model_name_or_path is None else str(base_model_name_or_path)
        )
        self.base_revision = base_revision
        self.base_subfolder = base_subfolder
        self.base_gguf_file = base_gguf_file
        self.base_checksums = base_checksums
        self.base_is_frozen = base_is_frozen
        check_reference(self)
        if kwargs.get("auto_map") == AUTO_MAP:  # says to others where this class is
            del kwargs["auto_map"]
        for name in kwargs:
            self._refuse_misspelt(name, base_config)
        of_base = {name: kwargs.pop(name) for name in list(kwargs) if self._is_bases_when_given(name)}
        implementation = kwargs.pop("attn_implementation", None)
        super().__init__(**kwargs)
        for name in _ALWAYS_THE_BASES:  # set by nobody; what reads them has defaults
            if not name.startswith("_"):
                self.__dict__.pop(name, None)
        self.base_config = base_config
        if base_config is not None:
            self.check_base(base_config)
            self._hand_over(base_config)
        for name, value in of_base.items():
            if base_config is None or getattr(base_config, name, self) != value:
                setattr(self, name, value)
        if implementation is not None:
            self._attn_implementation = implementation  # the language model's, where there is one

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A subclass that only declares fields (`extra: int = 3`) is given a constructor that takes them."""
        if "__init__" not in cls.__dict__:
            _give_constructor(cls)
        super().__init_subclass__(**kwargs)

    @property
    def supervised_answers(self) -> int:
        """Answers of the last injection point that the loss of a training forward is over."""
        passing = self.num_cycles if self.grad_cycles is None else self.grad_cycles
        return passing if self.deep_supervision else 1

    @property
    def recursion_spec(self) -> RecursionSpec:
        """What every TRM of the model is run with."""
        return RecursionSpec(
            num_heads=self.trm_num_heads,
            num_key_value_heads=self.trm_num_key_value_heads,
            causal=True,
            num_recursion_steps=self.num_recursion_steps,
            num_cycles=self.num_cycles,
            grad_cycles=self.grad_cycles,
            rope_theta=self.trm_rope_theta,
            eps=self.trm_rms_norm_eps,
            attention=self.trm_attention,
            save=self.trm_save,
            regime=self.trm_regime,
            quantize=self.trm_quantize,
            cache=self.trm_cache,
        )

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The language model's: caches, masks and generation are built from it."""
        base = self.__dict__.get("base_config")  # asked for before the constructor has come to it
        return self if base is None else base.get_text_config(decoder=decoder)

    def validate(self) -> None:
        """The language model's config checks itself, by its own rules; ours is checked as it is set."""
        if self.base_config is not None:
            self.base_config.validate()

    # What is read and set here, and what on the language model's config

    def __getattribute__(self, name: str) -> Any:
        if name in _ALWAYS_THE_BASES:
            base = super().__getattribute__("__dict__").get("base_config")
            if base is not None:
                return getattr(base, name)
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        """What this config does not have (`vocab_size`, `hidden_size`, ...) is the language model's."""
        if name == "auto_map":  # asked for by TRL; code of the base's own is no code of the hybrid
            return {}
        base = self.__dict__.get("base_config")
        # the base may be quantized; the hybrid is not, whatever reads this config
        if base is None or name.startswith("__") or name in ("quantization_config", *HybridConfig.__slots__):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        if name.startswith("_") and name not in _ALWAYS_THE_BASES:
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        holder = _holder(base, name)
        if name == "rope_theta" and _keeps_rope_theta(holder):
            return holder.rope_parameters[name]
        return getattr(holder, name)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("base_config")
        if name in _field_names(type(self)) and "base_config" in self.__dict__:
            self.update({name: value})
        elif base is None or self._is_own(name):
            super().__setattr__(name, value)
        else:
            self._refuse_misspelt(name, base)
            holder = _holder(base, name)
            if name == "rope_theta" and _keeps_rope_theta(holder):
                holder.rope_parameters = {**holder.rope_parameters, name: value}
            else:
                setattr(holder, name, value)

    def __delattr__(self, name: str) -> None:
        base = self.__dict__.get("base_config")
        if base is None or name in self.__dict__ or self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(_holder(base, name), name)

    def update(self, config_dict: dict[str, Any]) -> None:
        """Set several fields; those of HybridConfig all at once, or none where they are refused.

        Errors: ValueError
        """
        names = set(_field_names(type(self)))
        own = {name: value for name, value in config_dict.items() if name in names}
        before = dict(self.__dict__)
        try:
            for name, value in own.items():
                self._set_own(name, value)
            check_block(self)
            if own.keys() & {"base_config", "injection_layers"} and self.base_config is not None:
                self.check_base(self.base_config)
        except Exception:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        for name, value in config_dict.items():
            if name not in own:
                setattr(self, name, value)

    def _set_own(self, name: str, value: Any) -> None:
        if name == "injection_layers":
            value = check_layers(value)
        elif name == "trm_dtype":
            value = str(value).removeprefix("torch.")
        elif name == "base_config":
            value = check_base_config(value, HybridConfig.model_type)
        if name in _BUILT_IN and getattr(self, "_is_in_model", False):
            now = getattr(self, name)
            if now is not value and (name == "base_config" or now != value):
                got = type(value).__name__ if name == "base_config" else short(value)
                raise ValueError(
                    f"HybridConfig: expected {name} as the model was built with it, got {got}: "
                    "make a new HybridModel with a config of these values."
                )
        super().__setattr__(name, value)
        if name == "base_config" and value is not None:
            self._hand_over(value)

    def _hand_over(self, base: PreTrainedConfig) -> None:
        """What was set before there was a language model is set on its config now."""
        for name in [name for name in self.__dict__ if not self._is_own(name)]:
            value = self.__dict__.pop(name)
            if not name.startswith("_"):
                self._refuse_misspelt(name, base)  # before, it might have been any base's
                setattr(_holder(base, name), name, value)
            elif name.endswith("_implementation_internal") and value is not None:
                setattr(base, name.removesuffix("_internal"), value)

    def _is_own(self, name: str) -> bool:
        if name in _ALWAYS_THE_BASES:
            return False
        is_ours = name.startswith("_") or name in _OF_THE_WHOLE or name in _field_names(type(self))
        return is_ours or isinstance(getattr(type(self), name, None), property)

    def _is_bases_when_given(self, name: str) -> bool:
        """Whether the constructor sets it on the language model's config, or transformers sees to it."""
        if name in ("attn_implementation", "experts_implementation", "per_layer_config"):
            return False
        of_generation = GenerationConfig._get_default_generation_params().keys() - {"use_cache"}
        return not self._is_own(name) and name not in of_generation

    def _refuse_misspelt(self, name: str, base: PreTrainedConfig | None) -> None:
        """transformers keeps any name in a config; one that is nearly ours was meant to be ours."""
        ours = _field_names(type(self))
        if name in ours or (
            base is not None and (hasattr(_holder(base, name), name) or f"trm_{name}" in ours)
        ):
            return
        if base is not None and name in _OF_TRM_ALONE:
            raise ValueError(
                f"HybridConfig: expected no {name}, which is a setting of TRM: inside a language model the "
                "recursion is causal, and its layers attend."
            )
        meant = nearest if base is None else meant_field
        if near := meant(name, ours, cutoff=0.8):
            raise ValueError(f"HybridConfig: there is no field {name!r}{did_you_mean(near)}")
        if name.startswith("trm_"):
            raise ValueError(
                f"HybridConfig: there is no field {name!r}. In a saved config it is of a later version of "
                "trm-hybrid, which may compute something else with it."
            )

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to no model: what is built into one may be changed in it."""
        return self.__dict__

    def belongs_to_model(self) -> None:
        """From here on what is built into the weights cannot be changed. HybridModel calls it."""
        self._is_in_model = True

    def set_trm_dtype(self, dtype: torch.dtype) -> None:
        """Say that the TRMs' parameters were brought to another dtype."""
        self.__dict__["trm_dtype"] = str(dtype).removeprefix("torch.")
        check_block(self)

    # As dictionaries and files

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: transformers would copy this file beside each saved model; see modeling_file.py."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, and beside them the language model's (`hidden_size`, ...), which tools look up there.

        `from_dict` takes the dictionary back.
        """
        own = super().to_dict()
        base = own.get("base_config")
        return own if not isinstance(base, dict) else base | own

    def to_diff_dict(self) -> dict[str, Any]:
        """What a file has to say: the fields, and the language model's within base_config alone."""
        always = ("model_type", "transformers_version")
        return {k: v for k, v in super().to_diff_dict().items() if k in always or k in self.__dict__}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As PreTrainedConfig's; the keywords' fields replace the dictionary's before they are checked.

        A dictionary without trm_input_norm is of a hybrid that was made before there was such a norm.

        Errors: ValueError for the config of another kind of model, and for fields that are refused.
        """
        kind = config_dict.get("model_type", cls.model_type)
        if kind not in (cls.model_type, HybridConfig.model_type):
            raise ValueError(
                "HybridConfig: expected the config of a saved hybrid, got that of a model without TRMs "
                f"({kind}). HybridModel(llm_model=AutoModelForCausalLM.from_pretrained(...), "
                "config=HybridConfig(injection_layers=[...])) puts them into a language model."
            )
        config_dict = _NO_NORM | config_dict
        own = {name: kwargs.pop(name) for name in trm_fields(cls) if name in kwargs}
        return super().from_dict(config_dict | own, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        decoded: dict[str, Any] = cls._decode_special_floats(
            read_json_object(os.fspath(json_file), "fields of HybridConfig")
        )
        return _NO_NORM | decoded

    def check_base(self, base_config: PreTrainedConfig) -> None:
        """Refuse a base that has no place for the injection points."""
        num_layers = base_config.get_text_config(decoder=True).num_hidden_layers
        check_steps("HybridConfig", "num_hidden_layers of the base", num_layers)
        if not self.injection_layers:
            raise ValueError("HybridConfig: expected at least one injection layer, got injection_layers=[].")
        if self.injection_layers[-1] > num_layers:
            raise ValueError(
                f"HybridConfig: expected injection_layers in 0..{num_layers} for a base of {num_layers} "
                f"layers, got {self.injection_layers}."
            )


def trm_fields(config_class: type[HybridConfig] = HybridConfig) -> list[str]:
    """The names a user may set: all of the class's own but for those that describe the base."""
    return [name for name in _field_names(config_class) if not name.startswith("base_")]


def meant_field(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `names` that is meant: TRM or its paper calls it `name`, or `name` is a slip of it."""
    return _OTHER_NAMES.get(name) or nearest(name, names, cutoff)


def _field_names(config_class: type[HybridConfig]) -> tuple[str, ...]:
    """HybridConfig's own fields, and those that a subclass has added."""
    if config_class not in _FIELD_NAMES:
        names: list[str] = []
        for cls in reversed(config_class.__mro__):
            if issubclass(cls, HybridConfig):
                parameters = inspect.signature(cls.__init__).parameters.values()
                names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
                names += inspect.get_annotations(cls)
        _FIELD_NAMES[config_class] = tuple(name for name in dict.fromkeys(names) if name != "self")
    return _FIELD_NAMES[config_class]


_FIELD_NAMES: dict[type, tuple[str, ...]] = {}


def _give_constructor(cls: type[HybridConfig]) -> None:
    parent = next(c for c in cls.__mro__[1:] if issubclass(c, HybridConfig))

    def __init__(self: HybridConfig, *args: Any, **kwargs: Any) -> None:
        own = [f for f in dataclasses.fields(cls) if f.name in inspect.get_annotations(cls)]
        for field in own:
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if field.name in _field_names(parent):  # with another default: the parent's constructor sets it
                if default is not dataclasses.MISSING:
                    kwargs.setdefault(field.name, default)
                continue
            if field.name not in kwargs and default is dataclasses.MISSING:
                raise TypeError(f"{cls.__name__}: expected the field {field.name!r}, got none.")
            setattr(self, field.name, kwargs.pop(field.name, default))
        super(cls, self).__init__(*args, **kwargs)

    cls.__init__ = __init__  # type: ignore[method-assign]


def _holder(base: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """The part of the language model's config that has the field; the whole where none has."""
    text = base.get_text_config(decoder=True)
    return text if not hasattr(base, name) and hasattr(text, name) else base


def _keeps_rope_theta(config: PreTrainedConfig) -> bool:
    """Whether `rope_theta` is in `rope_parameters`, as in transformers 5, and no attribute beside it."""
    parameters = getattr(config, "rope_parameters", None)
    return "rope_theta" not in vars(config) and isinstance(parameters, dict) and "rope_theta" in parameters
