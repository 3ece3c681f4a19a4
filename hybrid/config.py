"""HybridConfig: what may be chosen about the recursive block, and what may not be combined."""

import difflib
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from trm_kernels.ops.rope_attention import IMPLEMENTATIONS
from trm_kernels.ops.saved_bytes import SAVES
from trm_kernels.quantize import QUANTIZE
from trm_kernels.trm import check_sizes
from trm_kernels.tuning import REGIMES

BLENDING_STRATEGIES = ("linear", "gated")
RECURSION_SAMPLINGS = ("fixed", "uniform")
TRM_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
                             drown y and z: x = rms(rms(h) W_in^T)
    trm_rope_theta           RoPE's base in the TRM's attention
    trm_rms_norm_eps         eps of every norm of the TRM
    trm_dtype                of the TRM's parameters: "float32", "bfloat16" or "float16"; it computes in the
                             base's dtype all the same
    trm_save                 what the TRMs keep for backward: "auto", "all", "layer" or "step"; see
                             trm_kernels/ops/fused_recursion.py
    trm_attention            who computes the TRM's attention: "auto", "triton", "sdpa", "reference", ...; see
                             trm_kernels/ops/rope_attention.py; one that is not there is an error when it runs
    trm_regime               how the TRMs are launched without gradient: "auto", "per_op", "one_launch" or
                             "per_phase"; see trm_kernels/ops/one_launch/recursion.py
    trm_quantize             the TRMs' matrices in 8 bits for inference: "int8" or "fp8"; default none; see
                             trm_kernels/quantize.py
    base_config              the language model's config; HybridModel fills it in
    base_model_name_or_path  where the language model's weights are; None: they are saved with the TRM

    Errors: ValueError, with what was expected and what came.
    """

    model_type = "trm_hybrid"
    sub_configs = {"base_config": AutoConfig}  # noqa: RUF012  transformers reads it as a class attribute
    has_no_defaults_at_init = True

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
        trm_input_norm: bool = False,
        base_config: PreTrainedConfig | dict[str, Any] | None = None,
        base_model_name_or_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.injection_layers = [] if injection_layers is None else list(injection_layers)
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
        self.trm_input_norm = trm_input_norm
        self._check()
        _refuse_misspelt(kwargs)

        if isinstance(base_config, dict):
            base_config = AutoConfig.for_model(**base_config)
        self.base_config = base_config
        self.base_model_name_or_path = base_model_name_or_path
        if base_config is not None:
            self.check_base(base_config)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
                kwargs.setdefault(name, getattr(base_config, name, None))
        super().__init__(**kwargs)

    @property
    def supervised_answers(self) -> int:
        """Answers of the last injection point that the loss of a training forward is over."""
        passing = self.num_cycles if self.grad_cycles is None else self.grad_cycles
        return passing if self.deep_supervision else 1

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The language model's: caches, masks and generation are built from it."""
        return self if self.base_config is None else self.base_config.get_text_config(decoder=decoder)

    def __getattr__(self, name: str) -> Any:
        """What this config does not have (`vocab_size`, `hidden_size`, ...) is the language model's."""
        base = self.__dict__.get("base_config")
        # the base may be quantized; the hybrid is not, whatever reads this config
        if base is None or name.startswith("_") or name == "quantization_config":
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return getattr(base, name)

    def check_base(self, base_config: PreTrainedConfig) -> None:
        """Refuse a base that has no place for the injection points."""
        num_layers = base_config.get_text_config(decoder=True).num_hidden_layers
        if not self.injection_layers:
            raise ValueError("HybridConfig: expected at least one injection layer, got injection_layers=[].")
        if self.injection_layers[-1] > num_layers:
            raise ValueError(
                f"HybridConfig: expected injection_layers in 0..{num_layers} for a base of {num_layers} "
                f"layers, got {self.injection_layers}."
            )

    def _check(self) -> None:
        layers = self.injection_layers
        if not all(_is_int(k) and k >= 0 for k in layers):
            raise ValueError(f"HybridConfig: expected injection_layers to be counts from 0, got {layers}.")
        if sorted(set(layers)) != layers:
            raise ValueError(f"HybridConfig: expected injection_layers sorted, each once, got {layers}.")
        for name in ("num_recursion_steps", "num_cycles", "trm_intermediate_size", "grad_cycles"):
            count, may_be_none = getattr(self, name), name in ("trm_intermediate_size", "grad_cycles")
            if not (count is None and may_be_none) and not (_is_int(count) and count >= 1):
                raise ValueError(f"HybridConfig: expected {name} to be a count of at least 1, got {count!r}.")
        for name in ("trm_hidden_size", "trm_num_heads", "trm_num_key_value_heads", "trm_num_layers"):
            if not _is_int(getattr(self, name)):
                raise ValueError(f"HybridConfig: expected {name} to be a count, got {getattr(self, name)!r}.")
        check_sizes(
            "HybridConfig",
            self.trm_hidden_size,
            self.trm_num_heads,
            self.trm_num_key_value_heads,
            self.trm_num_layers,
            uses_rope=True,
            prefix="trm_",
        )
        if self.grad_cycles is not None and self.grad_cycles > self.num_cycles:
            raise ValueError(
                f"HybridConfig: expected grad_cycles in 1..{self.num_cycles} (num_cycles) or None, "
                f"got {self.grad_cycles}."
            )
        for name in ("deep_supervision", "trm_input_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"HybridConfig: expected {name} to be True or False, got {getattr(self, name)!r}."
                )
        if self.deep_supervision and self.num_cycles > 1 and self.grad_cycles == 1:
            raise ValueError(
                f"HybridConfig: deep_supervision expected grad_cycles in 2..{self.num_cycles} (num_cycles) "
                "or None, as only cycles that pass gradients learn from a loss, got 1."
            )
        if not _is_int(self.recursion_seed):
            raise ValueError(
                f"HybridConfig: expected recursion_seed to be a whole number, got {self.recursion_seed!r}."
            )
        for name in ("injection_strength", "trm_rope_theta", "trm_rms_norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"HybridConfig: expected {name} to be a number, got {value!r}.")
        for name, allowed in (
            ("blending_strategy", BLENDING_STRATEGIES),
            ("recursion_sampling", RECURSION_SAMPLINGS),
            ("trm_dtype", tuple(TRM_DTYPES)),
            ("trm_save", ("auto", *SAVES)),
            ("trm_attention", IMPLEMENTATIONS),
            ("trm_regime", ("auto", *REGIMES)),
            ("trm_quantize", (None, *QUANTIZE)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"HybridConfig: expected {name} to be one of {', '.join(map(str, allowed))}, "
                    f"got {getattr(self, name)!r}."
                )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def trm_fields() -> list[str]:
    """The names a user may set: all of HybridConfig's own but for the two that describe the base."""
    names = HybridConfig.__init__.__code__.co_varnames[1 : HybridConfig.__init__.__code__.co_argcount]
    return [name for name in names if not name.startswith("base_")]


def _refuse_misspelt(others: dict[str, Any]) -> None:
    """transformers keeps any keyword in a config; one that is nearly ours was meant to be ours."""
    for name in others:
        if name in trm_fields():
            continue
        if near := difflib.get_close_matches(name, trm_fields(), n=1, cutoff=0.8):
            raise ValueError(f"HybridConfig: there is no field {name!r}; did you mean {near[0]!r}?")
