"""linear_swiglu: a = silu(v Wg^T) * (v Wu^T), with [Wg | Wu] stacked in one weight

Shapes   v [..., D]; gate_up [2F, D], the gate's F rows first; a [..., F].
Dtypes   any floating dtype, the same for both; a has it too.
Errors   ValueError when the shapes disagree.
Source   "GLU Variants Improve Transformer", Shazeer, 2020, eq. 6; row order as in TRM, arXiv 2510.04871.
"""

import torch.nn.functional as F
from torch import Tensor

from trm_kernels.backend import runs_triton


def linear_swiglu_ref(v: Tensor, gate_up: Tensor) -> Tensor:
    """The meaning of the op, in eager PyTorch."""
    gate, up = F.linear(v, gate_up).chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_swiglu(v: Tensor, gate_up: Tensor) -> Tensor:
    """silu(v Wg^T) * (v Wu^T). See the top of this file for shapes and dtypes."""
    if gate_up.ndim != 2 or gate_up.shape[0] % 2 or v.shape[-1] != gate_up.shape[1]:
        raise ValueError(
            "linear_swiglu: expected v [..., D] and gate_up [2F, D], "
            f"got {tuple(v.shape)} and {tuple(gate_up.shape)}."
        )
    runs_triton("linear_swiglu", v, gate_up, has_kernel=False)
    return linear_swiglu_ref(v, gate_up)
