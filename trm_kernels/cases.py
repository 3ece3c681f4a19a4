"""One row per op: how to make inputs, what it must equal, how close, and what it may use of a GPU.

Tests, benchmarks and the ahead-of-time compilation all read this table, so a new op is checked, timed
and compiled by adding its row.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trm_kernels.ops.add_rms_norm import add_rms_norm, add_rms_norm_ref

Shape = tuple[int, ...]

# What summing in another order may add to the relative error: a rounding or two in float32, next to
# nothing where the result is rounded to a narrower dtype anyway.
_FLOOR = {torch.float32: 1e-7, torch.float16: 1e-5, torch.bfloat16: 1e-4}


@dataclass(frozen=True)
class Case:
    """An op and everything a check needs to know of it.

    The error of a correct op, measured against the reference in float64, is at most 1.1 times that of
    the reference in the op's own dtype, plus `floor`.
    """

    name: str
    op: Callable[..., Any]  # tensors -> a tensor, or several
    ref: Callable[..., Any]
    inputs: Callable[[Shape, torch.dtype, int], list[Tensor]]  # (shape, dtype, seed), on the CPU
    shapes: tuple[Shape, ...]  # small and awkward, for the interpreter
    bench: tuple[Shape, ...]  # sizes people run
    moved: Callable[[list[Tensor]], int]  # bytes a perfect forward reads and writes
    launches: int = 1  # kernels one forward starts
    launches_with_gradient: int = 2  # kernels one forward and one backward start
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    floor: Mapping[torch.dtype, float] = field(default_factory=lambda: _FLOOR)
    max_registers: int = 255  # per thread, the most any of its kernels may take on any arch


def _two_row_tensors(shape: Shape, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """x and r [..., D]. Row sizes run from 1e-3, where eps weighs, to 10, where a wrong mean shows."""
    g = torch.Generator().manual_seed(seed)
    size = 10.0 ** (torch.arange(math.prod(shape[:-1])) % 5 - 3)
    x, r = (torch.randn(shape, generator=g) * size.view(*shape[:-1], 1) for _ in range(2))
    return [t.to(dtype).requires_grad_() for t in (x, r)]


CASES: tuple[Case, ...] = (
    Case(
        "add_rms_norm",
        add_rms_norm,
        add_rms_norm_ref,
        _two_row_tensors,
        shapes=((1, 32), (3, 7, 48), (35, 64), (5, 200), (2, 1000)),
        bench=((768 * 97, 512), (8192, 2048), (8192, 4096), (2048, 10240)),
        moved=lambda tensors: (
            sum(t.nbytes for t in tensors) + tensors[0].nbytes + 4 * tensors[0][..., 0].numel()
        ),
        max_registers=128,
    ),
)
