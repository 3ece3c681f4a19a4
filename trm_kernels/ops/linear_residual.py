"""linear_residual: h = v W^T + s r, and the sums of squares of h from which its RMS norm follows

The norm that comes after has no weight, so rms(h) W'^T = rstd * (h W'^T): h stays un-normalised, its sums of
squares are kept for each row and tile of columns, and the op that multiplies h scales the product (deferred
RMS norm). `rstd_from_squares` makes rstd of the sums. Each sum has one writer: no atomics, equal reruns. s is
1 or one number a row: r may be un-normalised rows as well, and s their rstd.

Shapes   v [..., K]; w [N, K]; r, h [..., N]; row_scale s [...]; squares [..., tiles], the number of tiles
         being up to the launch settings, and 1 in the reference.
Dtypes   v, w and r of one dtype, float32, float16 or bfloat16, h has it too; row_scale and squares float32;
         products summed in float32. float64 stays float64 throughout, in the reference only.
Errors   ValueError when shapes, dtypes or devices disagree; RuntimeError for a candidate that cannot run.
Source   "Root Mean Square Layer Normalization", Zhang and Sennrich, 2019, eq. 4, without the gain; post-norm
         as in TRM, arXiv 2510.04871.

Rows whose elements do not lie side by side are copied first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trm_kernels.runtime import tuning
from trm_kernels.runtime.autocast import as_autocast
from trm_kernels.runtime.gemm_common import (
    are_aligned,
    as_wide_as,
    check_devices,
    check_dtypes,
    check_row_scale,
    grid,
    halves_of_columns,
    input_precision,
    rows_of,
    runs_candidate,
    tile_of_program,
    weight_gradient,
)
from trm_kernels.runtime.launch import arch_of, launch, launcher
from trm_kernels.runtime.optional_triton import tl, triton
from trm_kernels.runtime.precision import wide


def linear_residual_ref(
    v: Tensor, w: Tensor, r: Tensor, row_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The meaning of the op, in eager PyTorch: one tile, as wide as the row."""
    if row_scale is not None:
        r = (wide(r) * row_scale[..., None]).to(r.dtype)
    h = F.linear(v, w) + r
    return h, wide(h).square().sum(-1, keepdim=True)


@triton.jit
def rows_by_weight(
    v_ptr,  # [M, K]
    w_ptr,  # [N, K], in the dtype of v, or a narrower one that is widened as it is read
    offs_m,
    in_m,
    offs_n,
    in_n,
    K,
    stride_vm,
    stride_wn,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of v W^T: some rows of v by some of w, [BLOCK_M, BLOCK_N] float32."""
    offs_k = tl.arange(0, BLOCK_K)
    v_ptrs = v_ptr + offs_m[:, None] * stride_vm + offs_k[None, :]
    w_ptrs = w_ptr + offs_n[None, :] * stride_wn + offs_k[:, None]
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        in_k = offs_k < K - k
        v = tl.load(v_ptrs, mask=in_m[:, None] & in_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=in_k[:, None] & in_n[None, :], other=0.0)
        product = tl.dot(v, as_wide_as(w, v), product, input_precision=PRECISION)
        v_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return product


@triton.jit
def _linear_residual_fwd_kernel(
    v_ptr,  # [M, K]
    w_ptr,  # [N, K]
    r_ptr,  # [M, N], or None
    row_scale_ptr,  # [M] float32, or None
    h_ptr,  # [M, N], out
    squares_ptr,  # [M, tiles of N] float32, out, or None
    M,
    N,
    K,
    stride_vm,
    stride_wn,
    stride_rm,
    stride_hm,
    stride_squaresm,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # one program: a tile of h, and of each of its rows the sum of squares within the tile
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = offs_m < M, offs_n < N
    h = rows_by_weight(
        v_ptr,
        w_ptr,
        offs_m,
        in_m,
        offs_n,
        in_n,
        K,
        stride_vm,
        stride_wn,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )

    mask = in_m[:, None] & in_n[None, :]
    if r_ptr is not None:
        r = tl.load(r_ptr + offs_m[:, None] * stride_rm + offs_n[None, :], mask=mask, other=0.0)
        r = r.to(tl.float32)
        if row_scale_ptr is not None:
            r *= tl.load(row_scale_ptr + offs_m, mask=in_m, other=0.0)[:, None]
        h += r
    h = h.to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + offs_m[:, None] * stride_hm + offs_n[None, :], h, mask=mask)
    if squares_ptr is not None:
        h = h.to(tl.float32)  # as rounded: the norm is that of the rows that are stored
        tl.store(squares_ptr + offs_m * stride_squaresm + tile_n, tl.sum(h * h, axis=1), mask=in_m)


@triton.jit
def _linear_residual_by_descriptors_kernel(
    v_desc,  # of [M, K], a tile at a time
    w_desc,  # of [N, K]
    r_desc,  # of [M, N], half of a tile's columns at a time
    row_scale_ptr,  # [M] float32, or None
    h_desc,  # of [M, N], out, as r
    squares_ptr,  # [M, tiles of N] float32, out, or None
    M,
    N,
    K,
    stride_squaresm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # as the kernel above; what lies outside of a tensor is read as 0 and not written
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first_m, first_n = (tile_m * BLOCK_M).to(tl.int32), (tile_n * BLOCK_N).to(tl.int32)
    h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        v = v_desc.load([first_m, k])
        w = w_desc.load([first_n, k])
        h = tl.dot(v, tl.trans(w), h)

    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = offs_m < M
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + offs_m, mask=in_m, other=0.0)
    else:
        row_scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    left, right = halves_of_columns(h)  # one after the other: half the registers and the shared memory
    squares = _add_by_descriptors(left, r_desc, row_scale, h_desc, first_m, first_n)
    squares += _add_by_descriptors(right, r_desc, row_scale, h_desc, first_m, first_n + BLOCK_N // 2)
    if squares_ptr is not None:
        tl.store(squares_ptr + offs_m * stride_squaresm + tile_n, squares, mask=in_m)


@triton.jit
def _add_by_descriptors(h, r_desc, row_scale, h_desc, first_m, first_n):
    """Writes h + s r; the sums of squares of its rows."""
    h += r_desc.load([first_m, first_n]).to(tl.float32) * row_scale[:, None]
    h = h.to(h_desc.dtype)
    h_desc.store([first_m, first_n], h)
    h = h.to(tl.float32)  # as rounded
    return tl.sum(h * h, axis=1)


@triton.jit
def _linear_residual_add_kernel(
    h_ptr,  # [M, N], in: v W^T from torch.mm; out: h
    r_ptr,  # [M, N]
    row_scale_ptr,  # [M] float32, or None
    squares_ptr,  # [M] float32, out, or None
    M,
    N,
    stride_hm,
    stride_rm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # one program: BLOCK_M whole rows, BLOCK_N columns at a time
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = offs_m < M
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + offs_m, mask=in_m, other=0.0)[:, None]
    squares = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, N, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask = in_m[:, None] & (offs_n < N)[None, :]
        h_ptrs = h_ptr + offs_m[:, None] * stride_hm + offs_n[None, :]
        h = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + offs_m[:, None] * stride_rm + offs_n[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        if row_scale_ptr is not None:
            r *= row_scale
        h = (h + r).to(h_ptr.dtype.element_ty)
        tl.store(h_ptrs, h, mask=mask)
        h = h.to(tl.float32)
        squares += h * h
    if squares_ptr is not None:
        tl.store(squares_ptr + offs_m, tl.sum(squares, axis=1), mask=in_m)


@triton.jit
def _linear_residual_bwd_kernel(
    dh_ptr,  # [M, N]
    h_ptr,  # [M, N]
    dsquares_ptr,  # [M, tiles of N] float32
    r_ptr,  # [M, N]
    row_scale_ptr,  # [M] float32, or None
    dsum_ptr,  # [M, N], out: the gradient of the sum, through h and through its squares
    dr_ptr,  # [M, N], out, or None where it is the gradient of the sum
    drow_scale_ptr,  # [M] float32, out, or None
    M,
    N,
    stride_dhm,
    stride_hm,
    stride_dsquaresm,
    stride_rm,
    stride_dsumm,
    stride_drm,
    TILE_N: tl.constexpr,  # columns in one sum of squares
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # one program: BLOCK_M whole rows, BLOCK_N columns at a time
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = offs_m < M
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + offs_m, mask=in_m, other=0.0)[:, None]
        drow_scale = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, N, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask = in_m[:, None] & (offs_n < N)[None, :]
        dsum = tl.load(dh_ptr + offs_m[:, None] * stride_dhm + offs_n[None, :], mask=mask, other=0.0)
        dsum = dsum.to(tl.float32)
        h = tl.load(h_ptr + offs_m[:, None] * stride_hm + offs_n[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        dsquares_ptrs = dsquares_ptr + offs_m[:, None] * stride_dsquaresm + offs_n[None, :] // TILE_N
        dsum += 2 * h * tl.load(dsquares_ptrs, mask=mask, other=0.0)
        dsum_ptrs = dsum_ptr + offs_m[:, None] * stride_dsumm + offs_n[None, :]
        tl.store(dsum_ptrs, dsum.to(dsum_ptr.dtype.element_ty), mask=mask)
        if row_scale_ptr is not None:
            r = tl.load(r_ptr + offs_m[:, None] * stride_rm + offs_n[None, :], mask=mask, other=0.0)
            drow_scale += dsum * r.to(tl.float32)
            dr_ptrs = dr_ptr + offs_m[:, None] * stride_drm + offs_n[None, :]
            tl.store(dr_ptrs, (dsum * row_scale).to(dr_ptr.dtype.element_ty), mask=mask)
    if row_scale_ptr is not None:
        tl.store(drow_scale_ptr + offs_m, tl.sum(drow_scale, axis=1), mask=in_m)


def _tile_width(N: int, tiles: int) -> int:
    """Columns in one sum of squares: the power of two that cuts a row into so many tiles, one or more."""
    return next(width for width in (2**i for i in range(32)) if triton.cdiv(N, width) == tiles)


def _residual_candidate(v: Tensor, w: Tensor, candidate: str | None) -> str:
    """Which of the two computes h: the one asked for, or the table's."""
    sizes = v.element_size(), w.shape[0], are_aligned(v, w)
    return tuning.choose("linear_residual", arch_of(v), *sizes, candidate)


def count_tiles(v: Tensor, w: Tensor, candidate: str | None) -> int:
    """Sums of squares a row."""
    if _residual_candidate(v, w, candidate) == "mm":
        return 1
    gemm = tuning.gemm("linear_residual", arch_of(v), v.element_size(), are_aligned(v, w), v.shape[0])
    return int(triton.cdiv(w.shape[0], gemm.BLOCK_N))


def fill_linear_residual(
    h: Tensor,
    squares: Tensor | None,
    v: Tensor,
    w: Tensor,
    r: Tensor,
    row_scale: Tensor | None,
    candidate: str | None,
) -> None:
    """h [M, N] and, where they are wanted, squares [M, count_tiles]."""
    M, K = v.shape
    N = w.shape[0]
    arch = arch_of(v)
    if _residual_candidate(v, w, candidate) == "mm":
        torch.mm(v, w.t(), out=h)
        tile = tuning.tile("linear_residual", arch)
        launch(
            _linear_residual_add_kernel,
            (triton.cdiv(M, tile.BLOCK_M),),
            h,
            r,
            row_scale,
            squares,
            M,
            N,
            h.stride(0),
            r.stride(0),
            **tile.meta,
        )
        return
    fill_linear(h, v, w, r, row_scale, squares)


def fill_linear(
    h: Tensor,
    v: Tensor,
    w: Tensor,
    r: Tensor | None = None,
    row_scale: Tensor | None = None,
    squares: Tensor | None = None,
) -> None:
    """h = v W^T + s r by one kernel; without r the plain product, where there is no torch.mm (native/)."""
    M, K = v.shape
    N = w.shape[0]
    gemm = tuning.gemm("linear_residual", arch_of(v), v.element_size(), are_aligned(v, w), M)
    if gemm.by_descriptors and M:
        _launch_by_descriptors(h, v, w, r, row_scale, squares, gemm)
        return
    launch(
        _linear_residual_fwd_kernel,
        grid(M, N, gemm),
        v,
        w,
        r,
        row_scale,
        h,
        squares,
        M,
        N,
        K,
        v.stride(0),
        w.stride(0),
        0 if r is None else r.stride(0),
        h.stride(0),
        0 if squares is None else squares.stride(0),
        PRECISION=input_precision(),
        **gemm.meta,
    )


def _launch_by_descriptors(
    h: Tensor,
    v: Tensor,
    w: Tensor,
    r: Tensor | None,
    row_scale: Tensor | None,
    squares: Tensor | None,
    gemm: tuning.GemmLaunch,
) -> None:
    """Errors: ValueError where a descriptor cannot say how r lies, or the GPU knows none."""
    arch = arch_of(v)
    if r is None or not are_aligned(r, h) or (arch != "any" and int(arch[2:]) < 90):
        raise ValueError(
            "linear_residual: settings by descriptors expected a GPU from sm90 on, and an r whose rows, like "
            f"those of h, begin at multiples of 16 elements, got {arch} and r "
            f"{None if r is None else (tuple(r.shape), r.stride())}."
        )
    from triton.tools.tensor_descriptor import TensorDescriptor

    (M, K), N, halves = v.shape, w.shape[0], [gemm.BLOCK_M, gemm.BLOCK_N // 2]
    launch(
        _linear_residual_by_descriptors_kernel,
        grid(M, N, gemm),
        TensorDescriptor.from_tensor(v, [gemm.BLOCK_M, gemm.BLOCK_K]),
        TensorDescriptor.from_tensor(w, [gemm.BLOCK_N, gemm.BLOCK_K]),
        TensorDescriptor.from_tensor(r, halves),
        row_scale,
        TensorDescriptor.from_tensor(h, halves),
        squares,
        M,
        N,
        K,
        0 if squares is None else squares.stride(0),
        **gemm.meta,
    )


@launcher
def _linear_residual_fwd(
    v: Tensor, w: Tensor, r: Tensor, row_scale: Tensor | None, candidate: str | None
) -> tuple[Tensor, Tensor]:
    h = v.new_empty(v.shape[0], w.shape[0])
    # the number of sums is seen outside: it must not depend on that of rows, which may not be known yet
    with tuning.as_for_rows(tuning.ANY_ROWS):
        squares = v.new_empty(v.shape[0], count_tiles(v, w, candidate), dtype=torch.float32)
        fill_linear_residual(h, squares, v, w, r, row_scale, candidate)
    return h, squares


@launcher
def _linear_residual_bwd(
    dh: Tensor,
    h: Tensor,
    dsquares: Tensor,
    r: Tensor,
    row_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    M, N = h.shape
    has_scale = row_scale is not None
    dsum = h.new_empty(M, N)
    dr = h.new_empty(M if has_scale else 0, N)
    drow_scale = h.new_empty(M if has_scale else 0, dtype=torch.float32)
    tile = tuning.tile("linear_residual", arch_of(h))
    launch(
        _linear_residual_bwd_kernel,
        (triton.cdiv(M, tile.BLOCK_M),),
        dh,
        h,
        dsquares,
        r,
        row_scale,
        dsum,
        dr if has_scale else None,
        drow_scale if has_scale else None,
        M,
        N,
        dh.stride(0),
        h.stride(0),
        dsquares.stride(0),
        r.stride(0),
        dsum.stride(0),
        dr.stride(0),
        TILE_N=_tile_width(N, dsquares.shape[1]),
        **tile.meta,
    )
    return dsum, dr, drow_scale


class _LinearResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, w, r, row_scale, candidate):
        h, squares = _linear_residual_fwd(v, w, r, row_scale, candidate)
        ctx.save_for_backward(v, w, r, row_scale, h)
        return h, squares

    @staticmethod
    def backward(ctx, dh, dsquares):
        v, w, r, row_scale, h = ctx.saved_tensors
        needs_v, needs_w, needs_r, needs_scale, _ = ctx.needs_input_grad
        dsum, dr, drow_scale = _linear_residual_bwd(rows_of(dh), h, rows_of(dsquares), r, row_scale)
        if row_scale is None:
            dr = dsum
        dv = torch.mm(dsum, w) if needs_v else None
        dw = weight_gradient(dsum, v) if needs_w else None
        return dv, dw, dr if needs_r else None, drow_scale if needs_scale else None, None


def linear_residual(
    v: Tensor,
    w: Tensor,
    r: Tensor,
    row_scale: Tensor | None = None,
    *,
    candidate: str | None = None,
) -> tuple[Tensor, Tensor]:
    """v W^T + s r and its sums of squares; differentiable.

    Args:
        v: [..., K], float32, float16 or bfloat16 (float64 by the reference).
        w: [N, K], in v's dtype.
        r: [..., N], in v's dtype.
        row_scale: s, [...] float32, or None for 1.
        candidate: "fused" for one kernel; "mm" for torch.mm and one kernel; None for what the settings table
            says.

    Returns:
        h, [..., N], in v's dtype, and squares, [..., tiles] float32. The settings say how many tiles.

    Raises:
        ValueError: When shapes, dtypes or devices disagree.
        RuntimeError: For a candidate that cannot run.
    """
    if w.ndim != 2 or v.ndim == 0 or v.shape[-1] != w.shape[1] or r.shape != (*v.shape[:-1], w.shape[0]):
        got = ", ".join(str(tuple(t.shape)) for t in (v, w, r))
        raise ValueError(f"linear_residual: expected v [..., K], w [N, K] and r [..., N], got {got}.")
    v, w, r = as_autocast(v, w, r)
    check_dtypes("linear_residual", v=v, w=w, r=r)
    check_devices("linear_residual", v=v, w=w, r=r)
    check_row_scale("linear_residual", row_scale, r)
    if not runs_candidate("linear_residual", candidate, v, w, r):
        return linear_residual_ref(v, w, r, row_scale)
    scale = None if row_scale is None else row_scale.reshape(-1)
    h, squares = _LinearResidual.apply(rows_of(v), rows_of(w), rows_of(r), scale, candidate)
    return h.view(r.shape), squares.view(*r.shape[:-1], squares.shape[1])
