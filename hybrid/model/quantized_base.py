"""A frozen base in 8 or 4 bits under a TRM that trains, as QLoRA does: by transformers and a package.

    int8    torchao: its linear layers in int8, a float32 scale a row
    nf4     bitsandbytes: in NormalFloat4 of QLoRA (arXiv 2305.14314), its scales in 8 bits

The head and the embeddings stay as they are. Gradients pass through; the base itself cannot learn.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, TorchAoConfig
from transformers.quantizers import AutoQuantizationConfig

from hybrid.extras import installed

QUANTIZE_BASE = ("int8", "nf4")
_PACKAGES = ("torchao", "bitsandbytes")  # as transformers names the methods, too


def quantization_config(name: str, dtype: torch.dtype | None) -> TorchAoConfig | BitsAndBytesConfig:
    """What from_pretrained takes as quantization_config.

    dtype   that is computed in; None: bfloat16

    Errors: ValueError for another name, or when its package is missing.
    """
    if name not in QUANTIZE_BASE:
        raise ValueError(f"quantized base: expected {' or '.join(QUANTIZE_BASE)}, got {name!r}.")
    if name == "int8":
        installed("torchao", "quantized base (int8)")
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    installed("bitsandbytes", "quantized base (nf4)")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or torch.bfloat16,
    )


def as_it_was(base_config: PreTrainedConfig | None, name_or_path: str, **hub: Any) -> dict[str, Any]:
    """What from_pretrained has to be told to quantize the base as `base_config` remembers it.

    name_or_path   where it is loaded from; what is stored there in few bits needs no more
    hub            arguments of AutoConfig.from_pretrained

    Errors: ValueError when the package is missing.
    """
    how = getattr(base_config, "quantization_config", None)
    if how is None:
        return {}
    how = how if isinstance(how, dict) else how.to_dict()
    method = getattr(how["quant_method"], "value", how["quant_method"])
    if method in _PACKAGES:
        installed(method, "HybridModel: its base was quantized")
    stored = AutoConfig.from_pretrained(name_or_path, **hub)
    if getattr(stored, "quantization_config", None) is not None:
        return {}
    return {"quantization_config": AutoQuantizationConfig.from_dict(how)}


def keep_gradients(model: nn.Module) -> None:
    """See that gradients pass through `model` also after it was evaluated.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 packs 4-bit weights anew in their first forward in eval mode,
    for a product that has no gradient: from then on inputs got none, and there was no error.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()  # unpacks, as for a file


def is_quantized(model: nn.Module) -> bool:
    """Whether a weight is kept in integers, whoever quantized it."""
    return any(is_quantized_tensor(p) for p in model.parameters())


def is_quantized_tensor(t: Tensor) -> bool:
    return type(t).__module__.partition(".")[0] in _PACKAGES


def integers(t: Tensor) -> Tensor:
    """What a quantized tensor keeps, besides its scales."""
    return t.qdata if hasattr(t, "qdata") else t.data.as_subclass(Tensor)
