"""What HybridConfig refuses: values that cannot be, and those that cannot be together."""

from typing import TYPE_CHECKING

import torch

from hybrid.config_values import check_number, check_size, check_steps, count_parameters, is_int, short
from trm_kernels.modules.checks import check_sizes
from trm_kernels.ops.attention.rope_attention import IMPLEMENTATIONS
from trm_kernels.recursion.quantize import QUANTIZE
from trm_kernels.recursion.saved_bytes import SAVES
from trm_kernels.recursion.spec import CACHES
from trm_kernels.runtime.tuning import REGIMES

if TYPE_CHECKING:
    from hybrid.config import HybridConfig

BLENDING_STRATEGIES = ("linear", "gated")
RECURSION_SAMPLINGS = ("fixed", "uniform")
TRM_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_reference(config: "HybridConfig") -> None:
    """What a file says of the base."""
    for name in ("base_revision", "base_subfolder", "base_gguf_file"):
        if not isinstance(getattr(config, name), str | None):
            raise ValueError(
                f"HybridConfig: expected {name} to be a name or None, got {short(getattr(config, name))}."
            )
    sums = config.base_checksums
    is_sums = isinstance(sums, dict) and all(
        key in TRM_DTYPES | {"float64": torch.float64} and isinstance(value, str)
        for key, value in sums.items()
    )
    if sums is not None and not is_sums:
        raise ValueError(f"HybridConfig: expected base_checksums to be text by dtype, got {short(sums)}.")
    if not isinstance(config.base_is_frozen, bool):
        raise ValueError(
            f"HybridConfig: expected base_is_frozen to be True or False, got {short(config.base_is_frozen)}."
        )


def check_block(config: "HybridConfig") -> None:
    """What the block is made of, and how it runs."""
    _check_counts(config)
    for name in ("deep_supervision", "trm_input_norm"):
        if not isinstance(getattr(config, name), bool):
            raise ValueError(
                f"HybridConfig: expected {name} to be True or False, got {getattr(config, name)!r}."
            )
    _check_cycles(config)
    if not is_int(config.recursion_seed):
        raise ValueError(
            f"HybridConfig: expected recursion_seed to be a whole number, got {config.recursion_seed!r}."
        )
    for name in ("injection_strength", "trm_rope_theta", "trm_rms_norm_eps"):
        check_number(name, getattr(config, name), is_positive=name != "injection_strength")
    for name, allowed in (
        ("blending_strategy", BLENDING_STRATEGIES),
        ("recursion_sampling", RECURSION_SAMPLINGS),
        ("trm_dtype", tuple(TRM_DTYPES)),
        ("trm_save", ("auto", *SAVES)),
        ("trm_attention", IMPLEMENTATIONS),
        ("trm_regime", ("auto", *REGIMES)),
        ("trm_quantize", (None, *QUANTIZE)),
        ("trm_cache", CACHES),
    ):
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"HybridConfig: expected {name} to be one of {', '.join(map(str, allowed))}, "
                f"got {short(getattr(config, name))}."
            )


def _check_counts(config: "HybridConfig") -> None:
    for name in ("num_recursion_steps", "num_cycles"):
        check_steps("HybridConfig", name, getattr(config, name))
    for name in ("trm_intermediate_size", "grad_cycles", "lora_rank"):
        count = getattr(config, name)
        if count is not None and not (is_int(count) and count >= 1):
            raise ValueError(
                f"HybridConfig: expected {name} to be a count of at least 1, got {short(count)}."
            )
    for name in ("trm_hidden_size", "trm_num_heads", "trm_num_key_value_heads", "trm_num_layers"):
        if not is_int(getattr(config, name)):
            raise ValueError(
                f"HybridConfig: expected {name} to be a count, got {short(getattr(config, name))}."
            )
    check_sizes(
        "HybridConfig",
        config.trm_hidden_size,
        config.trm_num_heads,
        config.trm_num_key_value_heads,
        config.trm_num_layers,
        uses_rope=True,
        prefix="trm_",
    )
    check_size(
        count_parameters(
            config.trm_hidden_size,
            config.trm_num_heads,
            config.trm_num_key_value_heads,
            config.trm_num_layers,
            config.trm_intermediate_size,
        )
    )


def _check_cycles(config: "HybridConfig") -> None:
    if config.grad_cycles is not None and config.grad_cycles > config.num_cycles:
        raise ValueError(
            f"HybridConfig: expected grad_cycles in 1..{config.num_cycles} (num_cycles) or None, "
            f"got {config.grad_cycles}."
        )
    if config.deep_supervision and config.trm_cache == "last":
        raise ValueError(
            "HybridConfig: deep_supervision expected trm_cache 'all', got 'last': a token's first cycle "
            "reads what the tokens before it ended their last one with."
        )
    if config.deep_supervision and config.num_cycles > 1 and config.grad_cycles == 1:
        raise ValueError(
            f"HybridConfig: deep_supervision expected grad_cycles in 2..{config.num_cycles} (num_cycles) "
            "or None, as only cycles that pass gradients learn from a loss, got 1."
        )
