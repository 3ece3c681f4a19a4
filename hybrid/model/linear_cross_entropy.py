"""linear_cross_entropy: the loss of a head's logits, some rows at a time, so that few are in memory

    logits = h W^T + b;   loss = mean over rows of -ln softmax(logits)[target]

The gradient is made where the logits are, row by row, so that backward computes no logits a second time: with
p the softmax, dh = (p - onehot) W / rows, dW = (p - onehot)^T h / rows.

Shapes   h [N, D]; W [V, D]; b [V] or None; target [N] int64; the loss is a float32 scalar.
Dtypes   logits in h's dtype, or autocast's; softmax and loss in float32; dW and db are summed in float32.
Gradient once: the gradient has none.
Source   the idea is Liger-Kernel's (arXiv 2410.10989, section 3.2), whose kernel is taken on CUDA where it is
         installed.
"""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_AT_ONCE = 2**24  # logits in memory: 64 MiB in float32


def linear_cross_entropy(h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """The mean loss. See the top of this file."""
    if h.is_cuda and find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)(weight, h, target, bias)
    loss: Tensor = _LinearCrossEntropy.apply(h, weight, bias, target)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        wants_h, wants_weight, wants_bias, _ = ctx.needs_input_grad
        dh = torch.empty_like(h) if wants_h else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        db = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        rows = max(1, _AT_ONCE // len(weight))
        for first in range(0, len(h), rows):
            some, asked = h[first : first + rows], target[first : first + rows]
            logits = F.linear(some, weight, bias)
            log_p = logits.float().log_softmax(-1)
            total -= log_p.gather(1, asked[:, None]).sum()
            d_logits = log_p.exp_()
            d_logits.scatter_add_(1, asked[:, None], torch.full_like(d_logits[:, :1], -1.0))
            d_logits = (d_logits / len(h)).to(logits.dtype)
            if dh is not None:
                dh[first : first + rows] = d_logits @ weight.to(logits.dtype)
            if dw is not None:
                dw += d_logits.T @ some.to(logits.dtype)
            if db is not None:
                db += d_logits.sum(0)
        ctx.gradients = (
            dh,
            None if dw is None else dw.to(weight.dtype),
            None if db is None or bias is None else db.to(bias.dtype),
        )
        return total / len(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if t is None else t * d_loss.to(t.dtype) for t in ctx.gradients), None
