"""rstd_from_squares: rstd = rsqrt(sum over tiles of squares / N + eps)

The factor of a deferred RMS norm for a row of N elements, from the sums of squares of its tiles. The tiles
are summed in the same order whatever the number of rows: equal reruns.

Shapes   squares [..., tiles]; rstd [...].
Dtypes   float32. float64 stays float64, in the reference only.
Errors   ValueError for another dtype, no tiles, or N below 1.
Source   "Root Mean Square Layer Normalization", Zhang and Sennrich, 2019, eq. 4, without the gain.
"""

import torch
from torch import Tensor

from trm_kernels.runtime import tuning
from trm_kernels.runtime.backend import runs_triton
from trm_kernels.runtime.gemm_common import rows_of
from trm_kernels.runtime.launch import arch_of, launch, launcher
from trm_kernels.runtime.optional_triton import tl, triton


def rstd_from_squares_ref(squares: Tensor, N: int, eps: float = 1e-5) -> Tensor:
    """The meaning of the op, in eager PyTorch."""
    return torch.rsqrt(squares.sum(-1) / N + eps)


@triton.jit
def _rstd_from_squares_fwd_kernel(
    squares_ptr,  # [M, D]: D tiles
    rstd_ptr,  # [M], out
    M,
    N,
    stride_squaresm,
    eps,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: BLOCK_M whole rows
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_m < M)[:, None] & (offs_d < D)[None, :]
    squares = tl.load(squares_ptr + offs_m[:, None] * stride_squaresm + offs_d[None, :], mask=mask, other=0.0)
    tl.store(rstd_ptr + offs_m, tl.rsqrt(tl.sum(squares, axis=1) / N + eps), mask=offs_m < M)


@triton.jit
def _rstd_from_squares_bwd_kernel(
    drstd_ptr,  # [M]
    rstd_ptr,  # [M]
    dsquares_ptr,  # [M, D], out: the same for each of the D tiles
    M,
    N,
    stride_dsquaresm,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: BLOCK_M whole rows of dsquares = -drstd * rstd^3 / 2N
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_m < M)[:, None] & (offs_d < D)[None, :]
    drstd = tl.load(drstd_ptr + offs_m, mask=offs_m < M, other=0.0)
    rstd = tl.load(rstd_ptr + offs_m, mask=offs_m < M, other=0.0)
    dsquares = tl.broadcast_to((-0.5 * drstd * rstd * rstd * rstd / N)[:, None], (BLOCK_M, BLOCK_D))
    tl.store(dsquares_ptr + offs_m[:, None] * stride_dsquaresm + offs_d[None, :], dsquares, mask=mask)


@launcher
def _rstd_from_squares_fwd(squares: Tensor, N: int, eps: float) -> Tensor:
    M, D = squares.shape[0], int(squares.shape[1])
    BLOCK_D = triton.next_power_of_2(D)
    row = tuning.lookup("rstd_from_squares", arch_of(squares), BLOCK_D)
    rstd = squares.new_empty(M)
    launch(
        _rstd_from_squares_fwd_kernel,
        (triton.cdiv(M, row.BLOCK_M),),
        squares,
        rstd,
        M,
        N,
        squares.stride(0),
        eps,
        D=D,
        BLOCK_M=row.BLOCK_M,
        BLOCK_D=BLOCK_D,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
    )
    return rstd


@launcher
def _rstd_from_squares_bwd(drstd: Tensor, rstd: Tensor, squares: Tensor, N: int) -> Tensor:
    M, D = squares.shape[0], int(squares.shape[1])
    BLOCK_D = triton.next_power_of_2(D)
    row = tuning.lookup("rstd_from_squares", arch_of(rstd), BLOCK_D)
    dsquares = squares.new_empty(M, D)
    launch(
        _rstd_from_squares_bwd_kernel,
        (triton.cdiv(M, row.BLOCK_M),),
        drstd,
        rstd,
        dsquares,
        M,
        N,
        dsquares.stride(0),
        D=D,
        BLOCK_M=row.BLOCK_M,
        BLOCK_D=BLOCK_D,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
    )
    return dsquares


class _RstdFromSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, squares, N, eps):
        rstd = _rstd_from_squares_fwd(squares, N, eps)
        ctx.save_for_backward(rstd, squares)
        ctx.N = N
        return rstd

    @staticmethod
    def backward(ctx, drstd):
        rstd, squares = ctx.saved_tensors  # of the squares only the shape
        return _rstd_from_squares_bwd(drstd.contiguous(), rstd, squares, ctx.N), None, None


def rstd_from_squares(squares: Tensor, N: int, eps: float = 1e-5) -> Tensor:
    """rsqrt(sum(squares) / N + eps) over the last axis; differentiable.

    Args:
        squares: [..., tiles] float32 (float64 by the reference), sums of squares of the tiles of a row.
        N: Elements of a whole row.
        eps: Added to the mean of squares.

    Returns:
        rstd, [...], in squares' dtype.

    Raises:
        ValueError: For another dtype, no tiles, or N below 1.
    """
    if squares.ndim == 0 or squares.shape[-1] == 0 or N < 1:
        raise ValueError(
            "rstd_from_squares: expected squares [..., tiles] with at least one tile, and N of at least 1, "
            f"got {tuple(squares.shape)} and {N}."
        )
    if squares.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"rstd_from_squares: expected squares in float32 or float64, got {squares.dtype}.")
    if not runs_triton("rstd_from_squares", squares, has_kernel=squares.dtype == torch.float32):
        return rstd_from_squares_ref(squares, N, eps)
    return _RstdFromSquares.apply(rows_of(squares), N, eps).view(squares.shape[:-1])
