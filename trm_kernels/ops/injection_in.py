"""injection_in: x = rms(h) W_in^T, or x = rms(rms(h) W_in^T): from the language model into the recursion

The norm has no weight, so rms(h) W_in^T = rstd * (h W_in^T): the squares of h are summed while it is
multiplied, and the product is scaled at its end.

The second norm brings x to the size that y and z have. Without it W_in may grow until x drowns them in
z + y + x, and the steps of the recursion make no difference.

Shapes   h [..., D]; w_in [d, D]; x [..., d]; D the language model's width, d the TRM's.
Dtypes   h and w_in of one dtype, float32, float16 or bfloat16, x has it too; the norm in float32, products
         summed in float32. float64 stays float64 throughout, in the reference only. Under autocast w_in and
         x have the dtype that it says, and h keeps its own (autocast.py).
Errors   ValueError when shapes, dtypes or devices disagree, when D is above the widest tuned row;
         RuntimeError for a candidate that cannot run.
Source   the first line of the mathematics in README.md, "What is computed".

Rows whose elements do not lie side by side are copied first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trm_kernels.ops.add_rms_norm import add_rms_norm, rms_norm_ref
from trm_kernels.runtime import tuning
from trm_kernels.runtime.autocast import as_autocast
from trm_kernels.runtime.gemm_common import (
    are_aligned,
    check_devices,
    check_dtypes,
    grid,
    input_precision,
    rows_of,
    runs_candidate,
    tile_of_program,
    weight_gradient,
)
from trm_kernels.runtime.launch import arch_of, launch, launcher
from trm_kernels.runtime.optional_triton import tl, triton


def injection_in_ref(h: Tensor, w_in: Tensor, eps: float = 1e-5, norms_x: bool = False) -> Tensor:
    """The meaning of the op, in eager PyTorch."""
    x = F.linear(rms_norm_ref(h, eps), w_in)
    return rms_norm_ref(x, eps) if norms_x else x


@triton.jit
def rows_by_weight_and_squares(
    h_ptr,  # [M, K]
    w_ptr,  # [N, K]
    offs_m,
    in_m,
    offs_n,
    in_n,
    K,
    stride_hm,
    stride_wn,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of h W^T, [BLOCK_M, BLOCK_N] float32, and the rows' sums of squares [BLOCK_M]."""
    offs_k = tl.arange(0, BLOCK_K)
    h_ptrs = h_ptr + offs_m[:, None] * stride_hm + offs_k[None, :]
    w_ptrs = w_ptr + offs_n[None, :] * stride_wn + offs_k[:, None]
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        in_k = offs_k < K - k
        h = tl.load(h_ptrs, mask=in_m[:, None] & in_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=in_k[:, None] & in_n[None, :], other=0.0)
        product = tl.dot(h.to(w.dtype), w, product, input_precision=PRECISION)
        h = h.to(tl.float32)
        squares += h * h
        h_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return product, tl.sum(squares, axis=1)


@triton.jit
def _injection_in_fwd_kernel(
    h_ptr,  # [M, K]
    w_in_ptr,  # [N, K]
    x_ptr,  # [M, N], out
    rstd_ptr,  # [M] float32, out
    M,
    N,
    K,
    stride_hm,
    stride_w_inn,
    stride_xm,
    eps,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # one program: a tile of x = rstd * (h W_in^T); the tiles of a row each find its rstd anew
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = offs_m < M, offs_n < N
    x, squares = rows_by_weight_and_squares(
        h_ptr,
        w_in_ptr,
        offs_m,
        in_m,
        offs_n,
        in_n,
        K,
        stride_hm,
        stride_w_inn,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    rstd = tl.rsqrt(squares / K + eps)  # [BLOCK_M]
    x *= rstd[:, None]
    mask = in_m[:, None] & in_n[None, :]
    tl.store(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], x.to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + offs_m, rstd, mask=in_m & (tile_n == 0))


@triton.jit
def _injection_in_norm_kernel(
    h_ptr,  # [M, D]
    y_ptr,  # [M, D], out
    rstd_ptr,  # [M] float32, out
    M,
    stride_hm,
    stride_ym,
    eps,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: BLOCK_M whole rows of y = rms(h), which torch.mm multiplies
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_m < M)[:, None] & (offs_d < D)[None, :]
    h = tl.load(h_ptr + offs_m[:, None] * stride_hm + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(h * h, axis=1) / D + eps)  # [BLOCK_M]
    y = h * rstd[:, None]
    tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + offs_m, rstd, mask=offs_m < M)


@triton.jit
def _injection_in_bwd_kernel(
    h_ptr,  # [M, D]
    rstd_ptr,  # [M] float32
    dy_ptr,  # [M, D], or None: the gradient of y = rms(h)
    y_ptr,  # [M, D], out, or None: y once more, for the gradient of w_in
    dh_ptr,  # [M, D], out, or None
    M,
    stride_hm,
    stride_dym,
    stride_ym,
    stride_dhm,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: BLOCK_M whole rows of y = rstd * h and of dh = rstd * (dy - y * mean(y * dy))
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_m < M)[:, None] & (offs_d < D)[None, :]
    h = tl.load(h_ptr + offs_m[:, None] * stride_hm + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None]
    y = h * rstd
    if y_ptr is not None:
        tl.store(
            y_ptr + offs_m[:, None] * stride_ym + offs_d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask
        )
    if dy_ptr is not None:
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_d[None, :], mask=mask, other=0.0)
        dy = dy.to(tl.float32)
        along_y = tl.sum(y * dy, axis=1) / D  # [BLOCK_M]: the share of dy that only scales h, which y ignores
        dh = rstd * (dy - y * along_y[:, None])
        dh_ptrs = dh_ptr + offs_m[:, None] * stride_dhm + offs_d[None, :]
        tl.store(dh_ptrs, dh.to(dh_ptr.dtype.element_ty), mask=mask)


@launcher
def _injection_in_fwd(h: Tensor, w_in: Tensor, eps: float, candidate: str | None) -> tuple[Tensor, Tensor]:
    M, K = h.shape
    N = w_in.shape[0]
    arch = arch_of(h)
    rstd = h.new_empty(M, dtype=torch.float32)
    is_aligned = are_aligned(h, w_in)
    if h.dtype != w_in.dtype and candidate is None:  # autocast: a large h is narrowed after it is normed
        candidate = "mm"
    if tuning.choose("injection_in", arch, w_in.element_size(), N, is_aligned, candidate) == "mm":
        BLOCK_D = triton.next_power_of_2(K)
        row = tuning.lookup("injection_in", arch, BLOCK_D)
        y = w_in.new_empty(M, K)
        launch(
            _injection_in_norm_kernel,
            (triton.cdiv(M, row.BLOCK_M),),
            h,
            y,
            rstd,
            M,
            h.stride(0),
            y.stride(0),
            eps,
            D=int(K),
            BLOCK_M=row.BLOCK_M,
            BLOCK_D=BLOCK_D,
            num_warps=row.num_warps,
            num_stages=row.num_stages,
        )
        return torch.mm(y, w_in.t()), rstd
    gemm = tuning.gemm("injection_in", arch, w_in.element_size(), is_aligned, M)
    x = w_in.new_empty(M, N)
    launch(
        _injection_in_fwd_kernel,
        grid(M, N, gemm),
        h,
        w_in,
        x,
        rstd,
        M,
        N,
        K,
        h.stride(0),
        w_in.stride(0),
        x.stride(0),
        eps,
        PRECISION=input_precision(),
        **gemm.meta,
    )
    return x, rstd


@launcher
def _injection_in_bwd(
    h: Tensor, rstd: Tensor, dy: Tensor | None, wants_y: bool, y_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    M, D = h.shape[0], int(h.shape[1])
    y = h.new_empty(M if wants_y else 0, D, dtype=y_dtype)
    dh = h.new_empty(0 if dy is None else M, D)
    BLOCK_D = triton.next_power_of_2(D)
    row = tuning.lookup("injection_in", arch_of(h), BLOCK_D)
    launch(
        _injection_in_bwd_kernel,
        (triton.cdiv(M, row.BLOCK_M),),
        h,
        rstd,
        dy,
        y if wants_y else None,
        None if dy is None else dh,
        M,
        h.stride(0),
        0 if dy is None else dy.stride(0),
        y.stride(0),
        dh.stride(0),
        D=D,
        BLOCK_M=row.BLOCK_M,
        BLOCK_D=BLOCK_D,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
    )
    return y, dh


class _InjectionIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w_in, eps, candidate):
        x, rstd = _injection_in_fwd(h, w_in, eps, candidate)
        ctx.save_for_backward(h, w_in, rstd)
        return x

    @staticmethod
    def backward(ctx, dx):
        h, w_in, rstd = ctx.saved_tensors
        needs_h, needs_w_in, *_ = ctx.needs_input_grad
        dx = rows_of(dx)
        dy = torch.mm(dx, w_in) if needs_h else None
        y, dh = _injection_in_bwd(h, rstd, dy, needs_w_in, w_in.dtype)
        dw_in = weight_gradient(dx, y) if needs_w_in else None
        return dh if needs_h else None, dw_in, None, None


def injection_in(
    h: Tensor, w_in: Tensor, eps: float = 1e-5, *, norms_x: bool = False, candidate: str | None = None
) -> Tensor:
    """rms(h) W_in^T, from the language model's hidden state to the recursion's input; differentiable.

    Args:
        h: [..., D], float32, float16 or bfloat16 (float64 by the reference).
        w_in: [d, D], in h's dtype; under autocast in autocast's.
        eps: Added to the mean of squares.
        norms_x: Whether x is normed as well, by add_rms_norm.
        candidate: "fused" for one kernel; "mm" for torch.mm and one kernel; None for what the settings table
            says.

    Returns:
        x, [..., d], in w_in's dtype.

    Raises:
        ValueError: When shapes, dtypes or devices disagree, or D is 0 or above the widest tuned row.
        RuntimeError: For a candidate that cannot run.
    """
    if w_in.ndim != 2 or h.ndim == 0 or h.shape[-1] != w_in.shape[1] or h.shape[-1] == 0:
        raise ValueError(
            "injection_in: expected h [..., D] and w_in [d, D] with D > 0, "
            f"got {tuple(h.shape)} and {tuple(w_in.shape)}."
        )
    narrow_h, w_in = as_autocast(h, w_in)  # only to be checked: what is normed is h
    check_dtypes("injection_in", h=narrow_h, w_in=w_in)
    check_devices("injection_in", h=h, w_in=w_in)
    if not runs_candidate("injection_in", candidate, h, w_in):
        return injection_in_ref(h, w_in, eps, norms_x)
    x = _InjectionIn.apply(rows_of(h), rows_of(w_in), eps, candidate)
    x = add_rms_norm(x, torch.zeros_like(x), eps) if norms_x else x
    return x.view(*h.shape[:-1], w_in.shape[0])
