"""linear_swiglu: a = silu(g) * u,  g = s v Wg^T,  u = s v Wu^T,  with [Wg | Wu] stacked in one weight

s is 1 or one number a row: v may be the un-normalised rows of a weightless RMS norm and s their rstd, since
rms(v) W^T = rstd * (v W^T). In the recursion the kernels find s themselves, from sums of squares that
ops/linear_residual.py left.

Shapes   v [..., D]; gate_up [2F, D], the gate's F rows first; row_scale s [...]; a [..., F].
Dtypes   v and gate_up of one dtype, float32, float16 or bfloat16, a has it too; row_scale float32; products
         summed in float32. float64 stays float64 throughout, in the reference only.
Errors   ValueError when shapes, dtypes or devices disagree; RuntimeError for a candidate that cannot run.
Source   "GLU Variants Improve Transformer", Shazeer, 2020, eq. 6; row order as in TRM, arXiv 2510.04871.

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
    wants_gradient,
    weight_gradient,
)
from trm_kernels.runtime.launch import arch_of, launch, launcher
from trm_kernels.runtime.optional_triton import tl, triton
from trm_kernels.runtime.precision import wide


def linear_swiglu_ref(v: Tensor, gate_up: Tensor, row_scale: Tensor | None = None) -> Tensor:
    """The meaning of the op, in eager PyTorch."""
    if row_scale is not None:
        v = (wide(v) * row_scale[..., None]).to(v.dtype)
    gate, up = F.linear(v, gate_up).chunk(2, dim=-1)
    a = F.silu(gate)
    return a * up if a.requires_grad else a.mul_(up)


@triton.jit
def rstd_of_tiles(
    squares_ptr, stride_squaresm, offs_m, in_m, D, eps, TILES: tl.constexpr, BLOCK_T: tl.constexpr
):
    """[BLOCK_M]: rstd of rows of D elements, from the sums of squares of their tiles [M, TILES]."""
    offs_t = tl.arange(0, BLOCK_T)
    squares_ptrs = squares_ptr + offs_m[:, None] * stride_squaresm + offs_t[None, :]
    squares = tl.load(squares_ptrs, mask=in_m[:, None] & (offs_t < TILES)[None, :], other=0.0)
    return tl.rsqrt(tl.sum(squares, axis=1) / D + eps)


@triton.jit
def rows_by_two_weights(
    v_ptr,  # [M, K]
    w_ptr,  # [.., K], in the dtype of v, or a narrower one that is widened as it is read
    offs_m,
    in_m,
    offs_a,
    offs_b,
    in_n,
    K,
    stride_vm,
    stride_wn,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Two tiles of v W^T, [BLOCK_M, BLOCK_N] float32: the same rows of v by rows a of w, and by rows b."""
    offs_k = tl.arange(0, BLOCK_K)
    v_ptrs = v_ptr + offs_m[:, None] * stride_vm + offs_k[None, :]
    wa_ptrs = w_ptr + offs_a[None, :] * stride_wn + offs_k[:, None]
    wb_ptrs = w_ptr + offs_b[None, :] * stride_wn + offs_k[:, None]
    a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        in_k = offs_k < K - k
        v = tl.load(v_ptrs, mask=in_m[:, None] & in_k[None, :], other=0.0)
        wa = tl.load(wa_ptrs, mask=in_k[:, None] & in_n[None, :], other=0.0)
        wb = tl.load(wb_ptrs, mask=in_k[:, None] & in_n[None, :], other=0.0)
        a = tl.dot(v, as_wide_as(wa, v), a, input_precision=PRECISION)
        b = tl.dot(v, as_wide_as(wb, v), b, input_precision=PRECISION)
        v_ptrs += BLOCK_K
        wa_ptrs += BLOCK_K
        wb_ptrs += BLOCK_K
    return a, b


@triton.jit
def rows_by_joined_weights(
    v_ptr,  # [M, K]
    w_ptr,  # [2N, K], in the dtype of v, or a narrower one that is widened as it is read
    offs_m,
    in_m,
    first_n,
    N,
    K,
    stride_vm,
    stride_wn,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As rows_by_two_weights, rows n and N + n of w in one tile: one product reads the rows of v once."""
    offs_k = tl.arange(0, BLOCK_K)
    offs_j = tl.arange(0, 2 * BLOCK_N)
    offs_n = first_n + offs_j % BLOCK_N
    in_n = offs_n < N
    v_ptrs = v_ptr + offs_m[:, None] * stride_vm + offs_k[None, :]
    w_ptrs = w_ptr + (offs_n + offs_j // BLOCK_N * N).to(tl.int64)[None, :] * stride_wn + offs_k[:, None]
    product = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        in_k = offs_k < K - k
        v = tl.load(v_ptrs, mask=in_m[:, None] & in_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=in_k[:, None] & in_n[None, :], other=0.0)
        product = tl.dot(v, as_wide_as(w, v), product, input_precision=PRECISION)
        v_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return halves_of_columns(product)


@triton.jit
def _linear_swiglu_fwd_kernel(
    v_ptr,  # [M, K]
    gate_up_ptr,  # [2N, K]
    squares_ptr,  # [M, TILES] float32, or None
    row_scale_ptr,  # [M] float32, or None; out where it follows from the squares
    a_ptr,  # [M, N], out
    gu_ptr,  # [M, 2N], out, or None: the products v Wg^T | v Wu^T, without the row scale
    M,
    N,
    K,
    stride_vm,
    stride_gate_upn,
    stride_squaresm,
    stride_am,
    stride_gum,
    eps,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    JOINS_WEIGHTS: tl.constexpr,
):
    # one program: a tile of g and the same tile of u
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = offs_m < M, offs_n < N
    if JOINS_WEIGHTS:
        # of columns: narrow numbers take fewer registers
        first_n = (tile_n * BLOCK_N).to(tl.int32)
        offs_n = first_n + tl.arange(0, BLOCK_N)
        in_n = offs_n < N
        g, u = rows_by_joined_weights(
            v_ptr,
            gate_up_ptr,
            offs_m,
            in_m,
            first_n,
            N,
            K,
            stride_vm,
            stride_gate_upn,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    else:
        g, u = rows_by_two_weights(
            v_ptr,
            gate_up_ptr,
            offs_m,
            in_m,
            offs_n,
            N + offs_n,
            in_n,
            K,
            stride_vm,
            stride_gate_upn,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )

    mask = in_m[:, None] & in_n[None, :]
    if gu_ptr is not None:
        gu_ptrs = gu_ptr + offs_m[:, None] * stride_gum + offs_n[None, :]
        tl.store(gu_ptrs, g.to(gu_ptr.dtype.element_ty), mask=mask)
        tl.store(gu_ptrs + N, u.to(gu_ptr.dtype.element_ty), mask=mask)
    if row_scale_ptr is not None:
        if squares_ptr is not None:
            row_scale = rstd_of_tiles(squares_ptr, stride_squaresm, offs_m, in_m, K, eps, TILES, BLOCK_T)
            tl.store(row_scale_ptr + offs_m, row_scale, mask=in_m & (tile_n == 0))
        else:
            row_scale = tl.load(row_scale_ptr + offs_m, mask=in_m, other=0.0)
        g *= row_scale[:, None]
        u *= row_scale[:, None]
    a = g * tl.sigmoid(g) * u
    tl.store(a_ptr + offs_m[:, None] * stride_am + offs_n[None, :], a.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _linear_swiglu_act_kernel(
    gu_ptr,  # [M, 2N]
    squares_ptr,  # [M, TILES] float32, or None
    row_scale_ptr,  # [M] float32, or None; out where it follows from the squares
    a_ptr,  # [M, N], out
    M,
    N,
    K,
    stride_gum,
    stride_squaresm,
    stride_am,
    eps,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # one program: a tile of a, from products that torch.mm computed
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m = offs_m < M
    mask = in_m[:, None] & (offs_n < N)[None, :]

    gu_ptrs = gu_ptr + offs_m[:, None] * stride_gum + offs_n[None, :]
    g = tl.load(gu_ptrs, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gu_ptrs + N, mask=mask, other=0.0).to(tl.float32)
    if row_scale_ptr is not None:
        if squares_ptr is not None:
            row_scale = rstd_of_tiles(squares_ptr, stride_squaresm, offs_m, in_m, K, eps, TILES, BLOCK_T)
            tl.store(row_scale_ptr + offs_m, row_scale, mask=in_m & (tl.program_id(1) == 0))
        else:
            row_scale = tl.load(row_scale_ptr + offs_m, mask=in_m, other=0.0)
        g *= row_scale[:, None]
        u *= row_scale[:, None]
    a = g * tl.sigmoid(g) * u
    tl.store(a_ptr + offs_m[:, None] * stride_am + offs_n[None, :], a.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_gradient(da, g, u):
    """a, dg and du of a = silu(g) * u, in float32."""
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    return silu * u, da * u * (sigmoid + silu * (1 - sigmoid)), da * silu


@triton.jit
def _linear_swiglu_bwd_kernel(
    da_ptr,  # [M, N]
    gu_ptr,  # [M, 2N]
    row_scale_ptr,  # [M] float32, or None
    dgu_ptr,  # [M, 2N], out: the gradient of the products, row scale included
    a_ptr,  # [M, N], out, or None: the activation once more
    drow_scale_ptr,  # [M] float32, out, or None
    M,
    N,
    stride_dam,
    stride_gum,
    stride_dgum,
    stride_am,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # one program: BLOCK_M whole rows, BLOCK_N columns at a time
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = offs_m < M
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + offs_m, mask=in_m, other=0.0)[:, None]
    drow_scale = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, N, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask = in_m[:, None] & (offs_n < N)[None, :]
        gu_ptrs = gu_ptr + offs_m[:, None] * stride_gum + offs_n[None, :]
        dgu_ptrs = dgu_ptr + offs_m[:, None] * stride_dgum + offs_n[None, :]

        da = tl.load(da_ptr + offs_m[:, None] * stride_dam + offs_n[None, :], mask=mask, other=0.0)
        da = da.to(tl.float32)
        g = tl.load(gu_ptrs, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(gu_ptrs + N, mask=mask, other=0.0).to(tl.float32)
        if row_scale_ptr is not None:
            a, dg, du = swiglu_gradient(da, g * row_scale, u * row_scale)
            if drow_scale_ptr is not None:
                drow_scale += tl.sum(dg * g + du * u, axis=1)
            dg *= row_scale
            du *= row_scale
        else:
            a, dg, du = swiglu_gradient(da, g, u)

        tl.store(dgu_ptrs, dg.to(dgu_ptr.dtype.element_ty), mask=mask)
        tl.store(dgu_ptrs + N, du.to(dgu_ptr.dtype.element_ty), mask=mask)
        if a_ptr is not None:
            a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_n[None, :]
            tl.store(a_ptrs, a.to(a_ptr.dtype.element_ty), mask=mask)
    if drow_scale_ptr is not None:
        tl.store(drow_scale_ptr + offs_m, drow_scale, mask=in_m)


def swiglu_candidate(v: Tensor, gate_up: Tensor, candidate: str | None) -> str:
    """Which of the two computes a: the one asked for, or the table's."""
    sizes = v.element_size(), v.shape[1], are_aligned(v, gate_up)
    return tuning.choose("linear_swiglu", arch_of(v), *sizes, candidate)


def fill_linear_swiglu(
    a: Tensor,
    gu: Tensor | None,
    v: Tensor,
    gate_up: Tensor,
    row_scale: Tensor | None,
    candidate: str | None,
    squares: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """a [M, N] and the products gu [M, 2N]; "fused" does without gu.

    squares   [M, tiles], the sums of squares of v: row_scale is filled as well, with rstd
    """
    if swiglu_candidate(v, gate_up, candidate) == "mm":
        assert gu is not None, "torch.mm leaves its products in memory"
        torch.mm(v, gate_up.t(), out=gu)
        _fill_activation(a, gu, v.shape[1], row_scale, squares, eps)
        return
    M, K = v.shape
    N = a.shape[1]
    is_aligned = are_aligned(v, gate_up)
    gemm = tuning.gemm("linear_swiglu", arch_of(v), v.element_size(), is_aligned, M, gu is not None)
    launch(
        _linear_swiglu_fwd_kernel,
        grid(M, N, gemm),
        v,
        gate_up,
        squares,
        row_scale,
        a,
        gu,
        M,
        N,
        K,
        v.stride(0),
        gate_up.stride(0),
        0 if squares is None else squares.stride(0),
        a.stride(0),
        2 * N if gu is None else gu.stride(0),
        eps,
        **_norm_meta(squares),
        PRECISION=input_precision(),
        JOINS_WEIGHTS=gemm.joins_weights,
        **gemm.meta,
    )


def _fill_activation(
    a: Tensor, gu: Tensor, K: int, row_scale: Tensor | None, squares: Tensor | None, eps: float
) -> None:
    """a [M, N] from products gu [M, 2N] that torch.mm computed; K is the width of the rows it multiplied."""
    M, N = a.shape
    tile = tuning.tile("linear_swiglu", arch_of(a))
    launch(
        _linear_swiglu_act_kernel,
        (triton.cdiv(M, tile.BLOCK_M), triton.cdiv(N, tile.BLOCK_N)),
        gu,
        squares,
        row_scale,
        a,
        M,
        N,
        K,
        gu.stride(0),
        0 if squares is None else squares.stride(0),
        a.stride(0),
        eps,
        **_norm_meta(squares),
        **tile.meta,
    )


def _norm_meta(squares: Tensor | None) -> dict[str, int]:
    tiles = 1 if squares is None else int(squares.shape[1])
    return {"TILES": tiles, "BLOCK_T": triton.next_power_of_2(tiles)}


@launcher
def linear_swiglu_fwd(
    v: Tensor, gate_up: Tensor, row_scale: Tensor | None, save_gu: bool, candidate: str | None
) -> tuple[Tensor, Tensor]:
    """(a [M, F], the products gu [M, 2F] or, where they are not to be saved, an empty tensor)"""
    M, N = v.shape[0], gate_up.shape[0] // 2
    a = v.new_empty(M, N)
    wants_gu = save_gu or swiglu_candidate(v, gate_up, candidate) == "mm"
    gu = v.new_empty(M, 2 * N) if wants_gu else None
    fill_linear_swiglu(a, gu, v, gate_up, row_scale, candidate)
    return a, gu if gu is not None and save_gu else v.new_empty(0, 2 * N)


@launcher
def linear_swiglu_bwd(
    da: Tensor, gu: Tensor, row_scale: Tensor | None, wants_a: bool, wants_row_scale: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(the gradient of the products [M, 2F], a or an empty tensor, the gradient of row_scale or one)"""
    M, N = da.shape
    dgu = torch.empty_like(gu)
    a = da.new_empty(M if wants_a else 0, N)
    wants_row_scale = wants_row_scale and row_scale is not None
    drow_scale = da.new_empty(M if wants_row_scale else 0, dtype=torch.float32)
    tile = tuning.tile("linear_swiglu", arch_of(da))
    launch(
        _linear_swiglu_bwd_kernel,
        (triton.cdiv(M, tile.BLOCK_M),),
        da,
        gu,
        row_scale,
        dgu,
        a if wants_a else None,
        drow_scale if wants_row_scale else None,
        M,
        N,
        da.stride(0),
        gu.stride(0),
        dgu.stride(0),
        a.stride(0),
        **tile.meta,
    )
    return dgu, a, drow_scale


class _LinearSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, gate_up, row_scale, save_gu, candidate):
        a, gu = linear_swiglu_fwd(v, gate_up, row_scale, save_gu, candidate)
        ctx.save_for_backward(v, gate_up, row_scale, gu if save_gu else None)
        return a

    @staticmethod
    def backward(ctx, da):
        v, gate_up, row_scale, gu = ctx.saved_tensors
        if gu is None:
            gu = torch.mm(v, gate_up.t())
        needs_v, needs_gate_up, needs_scale, *_ = ctx.needs_input_grad
        dgu, _, drow_scale = linear_swiglu_bwd(rows_of(da), gu, row_scale, False, needs_scale)
        dv = torch.mm(dgu, gate_up) if needs_v else None
        dgate_up = weight_gradient(dgu, v) if needs_gate_up else None
        return dv, dgate_up, drow_scale if needs_scale else None, None, None


def linear_swiglu(
    v: Tensor,
    gate_up: Tensor,
    row_scale: Tensor | None = None,
    *,
    recompute: bool = False,
    candidate: str | None = None,
) -> Tensor:
    """silu(s v Wg^T) * (s v Wu^T); differentiable.

    Args:
        v: [..., D], float32, float16 or bfloat16 (float64 by the reference).
        gate_up: [2F, D], the gate's F rows first, in v's dtype.
        row_scale: s, [...] float32, or None for 1.
        recompute: Keep only v for backward, and compute the products [M, 2F] there once more.
        candidate: "fused" for one kernel; "mm" for torch.mm and one kernel; None for what the settings table
            says.

    Returns:
        a, [..., F], in v's dtype.

    Raises:
        ValueError: When shapes, dtypes or devices disagree.
        RuntimeError: For a candidate that cannot run.
    """
    if gate_up.ndim != 2 or gate_up.shape[0] % 2 or v.ndim == 0 or v.shape[-1] != gate_up.shape[1]:
        raise ValueError(
            "linear_swiglu: expected v [..., D] and gate_up [2F, D], "
            f"got {tuple(v.shape)} and {tuple(gate_up.shape)}."
        )
    v, gate_up = as_autocast(v, gate_up)
    check_dtypes("linear_swiglu", v=v, gate_up=gate_up)
    check_devices("linear_swiglu", v=v, gate_up=gate_up)
    check_row_scale("linear_swiglu", row_scale, v)
    if not runs_candidate("linear_swiglu", candidate, v, gate_up):
        return linear_swiglu_ref(v, gate_up, row_scale)
    save_gu = not recompute and wants_gradient(v, gate_up, row_scale)
    scale = None if row_scale is None else row_scale.reshape(-1)
    a = _LinearSwiGLU.apply(rows_of(v), rows_of(gate_up), scale, save_gu, candidate)
    return a.view(*v.shape[:-1], gate_up.shape[0] // 2)
