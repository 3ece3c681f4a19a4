"""injection_blend: h' = h + strength * gate * (y W_out^T), the way back into the language model

gate is 1, or sigmoid(y g + b): one score a token, read from the recursion's answer.

Shapes   h, h' [..., D]; y [..., d]; w_out [D, d]; gate_weight g [1, d]; gate_bias b [1].
Dtypes   y, w_out and the gate's: one floating dtype; h' has h's. The gate's sigmoid in float32
         (float64 for float64).
Errors   ValueError when the shapes disagree, or the gate comes without its bias.
Source   the last line of the mathematics in README.md, "What is computed".

With w_out at zero h' equals h bit for bit: a sum with zero changes no float.
"""

import torch.nn.functional as F
from torch import Tensor

from trm_kernels.backend import runs_triton
from trm_kernels.precision import wide


def injection_blend_ref(
    h: Tensor,
    y: Tensor,
    w_out: Tensor,
    strength: float = 1.0,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """The meaning of the op, in eager PyTorch."""
    u = F.linear(y, w_out) * strength
    if gate_weight is not None:
        u = wide(F.linear(y, gate_weight, gate_bias)).sigmoid().to(u.dtype) * u
    return h + u.to(h.dtype)


def injection_blend(
    h: Tensor,
    y: Tensor,
    w_out: Tensor,
    strength: float = 1.0,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """h + strength * gate * (y W_out^T). See the top of this file for shapes and dtypes."""
    D, d = h.shape[-1], y.shape[-1]
    if w_out.shape != (D, d) or h.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            "injection_blend: expected h [..., D], y [..., d] and w_out [D, d], "
            f"got {tuple(h.shape)}, {tuple(y.shape)} and {tuple(w_out.shape)}."
        )
    shapes = tuple(None if t is None else tuple(t.shape) for t in (gate_weight, gate_bias))
    if shapes not in ((None, None), ((1, d), (1,))):
        raise ValueError(
            f"injection_blend: expected gate_weight [1, {d}] and gate_bias [1] or neither, got {shapes}."
        )
    runs_triton("injection_blend", h, y, w_out, has_kernel=False)
    return injection_blend_ref(h, y, w_out, strength, gate_weight, gate_bias)
