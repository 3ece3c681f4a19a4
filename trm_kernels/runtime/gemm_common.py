"""What ops that multiply matrices share: memory layout, the order of tiles, which candidate runs.

M, N and K are the rows, the columns and the summed axis of a product, in kernels and launchers alike. A
weight is [N, K], as nn.Linear keeps it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from trm_kernels.runtime.backend import runs_triton
from trm_kernels.runtime.optional_triton import tl, triton
from trm_kernels.runtime.tuning import CANDIDATES, GemmLaunch

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# whether addmm takes an out_dtype where there are only shapes: torch 2.11's does not, 2.13's does
_ADDMM_KNOWS_SHAPES = torch.__version__ >= "2.13"


@triton.jit
def tile_of_program(  # type: ignore[no-untyped-def]  # Triton, not Python
    M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
):
    """Row and column of the tile this program computes: GROUP_M row tiles at a time, column by column.

    Programs that run together then share a few rows of one factor and a few of the other, all in L2.
    """
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP_M * tiles_n) * GROUP_M
    rows_in_group = tl.minimum(tiles_m - first_m, GROUP_M)  # the last group may be smaller
    pid_in_group = pid % (GROUP_M * tiles_n)
    return (first_m + pid_in_group % rows_in_group).to(tl.int64), (pid_in_group // rows_in_group).to(tl.int64)


@triton.jit
def halves_of_columns(t):  # type: ignore[no-untyped-def]  # Triton, not Python
    """The left and the right half of a tile's columns."""
    rows: tl.constexpr = t.shape[0]
    columns: tl.constexpr = t.shape[1]
    return tl.split(tl.permute(tl.reshape(t, (rows, 2, columns // 2)), (0, 2, 1)))


@triton.jit
def parts_of_columns(t, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton, not Python
    """Two or four tiles of a tile's columns, from left to right."""
    tl.static_assert(PARTS == 2 or PARTS == 4)
    left, right = halves_of_columns(t)
    if PARTS == 2:
        return left, right
    else:  # Triton wants the branch
        first, second = halves_of_columns(left)
        third, fourth = halves_of_columns(right)
        return first, second, third, fourth


@triton.jit
def as_wide_as(w, v):  # type: ignore[no-untyped-def]  # Triton, not Python
    """A tile of a weight in the dtype of v, by which it is multiplied."""
    if w.dtype == tl.float8e4nv:
        w = w.to(tl.float32)  # on sm_89, Triton 3.6 knows no way from it to bfloat16
    return w.to(v.dtype)


def are_aligned(*factors: Tensor) -> bool:
    """Whether rows of the factors [rows, K] can be loaded 16 bytes at a time: Triton asks for 16 elements."""
    return all(
        t.shape[1] % 16 == 0 and t.stride(0) % 16 == 0 and t.storage_offset() * t.element_size() % 16 == 0
        for t in factors
    )


def grid(M: int, N: int, gemm: GemmLaunch) -> tuple[int]:
    """One program for each tile of an [M, N] product."""
    return (triton.cdiv(M, gemm.BLOCK_M) * triton.cdiv(N, gemm.BLOCK_N),)


def input_precision() -> str:
    """How `tl.dot` multiplies float32: as torch.mm does. Narrower dtypes are not touched by it.

    `allow_tf32` cannot be read once somebody has set `fp32_precision`; the latter can, however it was set.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def rows_of(t: Tensor) -> Tensor:
    """t as [M, D] with neighbouring elements of a row side by side; rows may lie apart."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """A boolean mask as kernels read it, uint8."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * (a b), rounded once."""
    if scale == 1:
        return torch.mm(a, b)
    return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scale)  # what is multiplied by 0 is not read


def weight_gradient(dy: Tensor, x: Tensor, scale: float = 1.0) -> Tensor:
    """scale * (dy^T x), the gradient of w in y = scale * (x w^T): summed in float32 and rounded once."""
    if dy.device.type == "cpu" or dy.dtype == torch.float32:
        return scaled_mm(dy.t(), x, scale)
    # torch.mm may otherwise split the rows and add the parts up in the narrow dtype
    dw = torch.mm(dy.t(), x, out_dtype=torch.float32)
    return (dw if scale == 1 else dw.mul_(scale)).to(dy.dtype)


def add_weight_gradient(dw: Tensor, dy: Tensor, x: Tensor) -> None:
    """dw += dy^T x, dw in float32: a weight that is used many times has its gradient rounded once."""
    if dy.device.type == "cpu" or dy.dtype == torch.float32:
        dw.addmm_(dy.t().float(), x.float())
    elif (dw.is_meta or isinstance(dw, FakeTensor)) and not _ADDMM_KNOWS_SHAPES:
        torch.mm(dy.t(), x, out_dtype=torch.float32, out=dw)  # as one call, and of the same shapes
    else:
        torch.addmm(dw, dy.t(), x, out_dtype=torch.float32, out=dw)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow, so that there is something to save for it."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_dtypes(op: str, **tensors: Tensor) -> None:
    """Errors: ValueError unless the tensors share a dtype that the op takes."""
    dtypes = [t.dtype for t in tensors.values()]
    if len(set(dtypes)) > 1 or dtypes[0] not in _DTYPES:
        raise ValueError(
            f"{op}: expected {listed(tensors)} of one dtype, float32, float16, bfloat16 or float64, "
            f"got {listed(dtypes)}."
        )


def check_devices(op: str, **tensors: Tensor) -> None:
    """Errors: ValueError unless the tensors are on one device."""
    devices = [t.device for t in tensors.values()]
    if len(set(devices)) > 1:
        raise ValueError(f"{op}: expected {listed(tensors)} on one device, got {listed(devices)}.")


def listed(things: Iterable[object]) -> str:
    """As a sentence lists them: commas, and `and` before the last."""
    *first, last = map(str, things)
    return f"{', '.join(first)} and {last}" if first else last


def check_row_scale(op: str, row_scale: Tensor | None, rows: Tensor) -> None:
    """Errors: ValueError unless `row_scale`, if given, is one float32 number a row (float64 with float64)."""
    if row_scale is None:
        return
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if row_scale.shape != rows.shape[:-1] or row_scale.dtype != dtype or row_scale.device != rows.device:
        raise ValueError(
            f"{op}: expected row_scale {tuple(rows.shape[:-1])} in {dtype} on {rows.device}, "
            f"got {tuple(row_scale.shape)} in {row_scale.dtype} on {row_scale.device}."
        )


def runs_candidate(op: str, candidate: str | None, *tensors: Tensor) -> bool:
    """Whether an op runs its Triton kernels on these tensors; see backend.runs_triton.

    Raises:
        ValueError: For an unknown candidate.
        RuntimeError: For one that cannot run here.
    """
    if candidate not in (None, *CANDIDATES):
        raise ValueError(f"{op}: expected candidate to be one of {', '.join(CANDIDATES)}, got {candidate!r}.")
    has_kernel = all(t.dtype != torch.float64 for t in tensors)
    runs = runs_triton(op, *tensors, has_kernel=has_kernel)
    if candidate is not None and not runs:
        raise RuntimeError(
            f"{op}: the candidate {candidate!r} was asked for, and it cannot run on these tensors: "
            f"{tensors[0].device}, {tensors[0].dtype}, which the reference computes here."
        )
    return runs
