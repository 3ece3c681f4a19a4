"""In which precision a reference computes: norms, softmax and sums never in less than float32."""

import torch
from torch import Tensor


def wide(t: Tensor) -> Tensor:
    """`t` in float32; a float64 tensor stays as it is, so that gradients can be checked by differences."""
    return t if t.dtype == torch.float64 else t.float()
