"""torch.autocast, settled once at the top of each public op.

    products      the autocast dtype, as F.linear: injection_in (the norm stays in h's dtype), linear_swiglu,
                  swiglu_mlp, linear_residual, injection_blend (h stays in its dtype, and so does h')
    attention     the autocast dtype, as scaled_dot_product_attention: rope_attention, decode_attention
    the loop      the autocast dtype: trm_recursion, adaptive_recursion, trm_injection (h and h' as above)
    sums, norms   the widest of their inputs: add_rms_norm, norm_add; rope that of its input
    float32       rstd_from_squares, rope_angles

So kernels and references compute in the same dtypes, and what is inside of an op sees one dtype. float64 is
never narrowed, as torch's own ops do not narrow it. Gradients come back in the dtype of what was given.
Source of the rules: "Automatic Mixed Precision package", torch's documentation, op-specific behaviour.
"""

from functools import reduce

import torch
from torch import Tensor


def is_on(t: Tensor) -> bool:
    """Whether torch.autocast is on for the device of `t`."""
    return t.device.type != "meta" and torch.is_autocast_enabled(t.device.type)


def compute_dtype(t: Tensor) -> torch.dtype:
    """The dtype in which F.linear would compute with `t`."""
    if t.dtype == torch.float64 or not is_on(t):
        return t.dtype
    return torch.get_autocast_dtype(t.device.type)


def as_autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype in which F.linear would compute with them."""
    return [t.to(compute_dtype(t)) for t in tensors]


def as_widest(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the widest of their dtypes, under autocast; as they are without."""
    if not is_on(tensors[0]):
        return list(tensors)
    widest = reduce(torch.promote_types, (t.dtype for t in tensors))
    return [t.to(widest) for t in tensors]
