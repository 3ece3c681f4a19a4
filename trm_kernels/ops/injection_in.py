"""injection_in: x = rms(h) W_in^T, the way from the language model into the recursion

Shapes   h [..., D]; w_in [d, D]; x [..., d]; D the language model's width, d the TRM's.
Dtypes   h, w_in: one floating dtype, x has it too; the norm in float32 (float64 for float64).
Errors   ValueError when the shapes disagree.
Source   the first line of the mathematics in README.md, "What is computed".
"""

import torch.nn.functional as F
from torch import Tensor

from trm_kernels.backend import runs_triton
from trm_kernels.ops.add_rms_norm import rms_norm_ref


def injection_in_ref(h: Tensor, w_in: Tensor, eps: float = 1e-5) -> Tensor:
    """The meaning of the op, in eager PyTorch."""
    return F.linear(rms_norm_ref(h, eps), w_in)


def injection_in(h: Tensor, w_in: Tensor, eps: float = 1e-5) -> Tensor:
    """rms(h) W_in^T. See the top of this file for shapes and dtypes."""
    if w_in.ndim != 2 or h.shape[-1] != w_in.shape[1]:
        raise ValueError(
            "injection_in: expected h [..., D] and w_in [d, D], "
            f"got {tuple(h.shape)} and {tuple(w_in.shape)}."
        )
    runs_triton("injection_in", h, w_in, has_kernel=False)
    return injection_in_ref(h, w_in, eps)
