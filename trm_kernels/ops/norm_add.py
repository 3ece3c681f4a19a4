"""norm_add: y = rms(h) + r,  rms(h) = h * rstd,  rstd = rsqrt(mean(h^2) + eps)

How a layer of the recursion starts: the layer before left h un-normalised (see ops/linear_residual.py), and
an f starts from a sum, z + (y + x) or z + y. A row is read whole, so only h need be kept.

Shapes   h, r, y [..., D]; r may be missing.
Dtypes   h and r of one dtype, float32, float16 or bfloat16, y has it too; sums and rstd in float32.
         float64 stays float64 throughout, in the reference only.
Errors   ValueError when shapes, dtypes or devices disagree, when D is 0 or above the widest tuned row.
Source   "Root Mean Square Layer Normalization", Zhang and Sennrich, 2019, eq. 4, without the gain.
"""

import torch
from torch import Tensor

from trm_kernels.ops.add_rms_norm import rms_norm_ref
from trm_kernels.runtime import tuning
from trm_kernels.runtime.autocast import as_widest
from trm_kernels.runtime.backend import runs_triton
from trm_kernels.runtime.gemm_common import check_devices, check_dtypes, rows_of
from trm_kernels.runtime.launch import arch_of, launch, launcher
from trm_kernels.runtime.optional_triton import tl, triton
from trm_kernels.runtime.precision import wide


def norm_add_ref(h: Tensor, r: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """The meaning of the op: the norm is not rounded to h's dtype before r is added."""
    y = rms_norm_ref(wide(h), eps)
    return (y if r is None else y + wide(r)).to(h.dtype)


@triton.jit
def _norm_add_fwd_kernel(
    h_ptr,  # [M, D]
    r_ptr,  # [M, D], or None
    y_ptr,  # [M, D], out
    M,
    stride_hm,
    stride_rm,
    stride_ym,
    eps,
    IS_NORMED: tl.constexpr,  # h is taken as it is: y = h + r
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: BLOCK_M whole rows
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_m < M)[:, None] & (offs_d < D)[None, :]
    y = tl.load(h_ptr + offs_m[:, None] * stride_hm + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    if not IS_NORMED:
        y *= tl.rsqrt(tl.sum(y * y, axis=1) / D + eps)[:, None]
    if r_ptr is not None:
        r = tl.load(r_ptr + offs_m[:, None] * stride_rm + offs_d[None, :], mask=mask, other=0.0)
        y += r.to(tl.float32)
    tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_add_bwd_kernel(
    dy_ptr,  # [M, D]
    dy2_ptr,  # [M, D], or None: a second part of dy
    scaled_dy_ptr,  # [M, D], or None: a third, rstd included
    h_ptr,  # [M, D]
    dh_ptr,  # [M, D], out
    dy_sum_ptr,  # [M, D] float32, in and out, or None: to which dy is added
    M,
    stride_dym,
    stride_dy2m,
    stride_scaled_dym,
    stride_hm,
    stride_dhm,
    stride_dy_summ,
    eps,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: BLOCK_M whole rows of dh = rstd * (dy - y * mean(y * dy)), y = rms(h)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_m < M)[:, None] & (offs_d < D)[None, :]

    h = tl.load(h_ptr + offs_m[:, None] * stride_hm + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(h * h, axis=1) / D + eps)  # [BLOCK_M]
    dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    if dy2_ptr is not None:
        dy2 = tl.load(dy2_ptr + offs_m[:, None] * stride_dy2m + offs_d[None, :], mask=mask, other=0.0)
        dy += dy2.to(tl.float32)
    if dy_sum_ptr is not None:
        dy_sum_ptrs = dy_sum_ptr + offs_m[:, None] * stride_dy_summ + offs_d[None, :]
        tl.store(dy_sum_ptrs, tl.load(dy_sum_ptrs, mask=mask, other=0.0) + dy, mask=mask)
    dy *= rstd[:, None]
    if scaled_dy_ptr is not None:
        scaled_dy_ptrs = scaled_dy_ptr + offs_m[:, None] * stride_scaled_dym + offs_d[None, :]
        dy += tl.load(scaled_dy_ptrs, mask=mask, other=0.0).to(tl.float32)

    y = h * rstd[:, None]
    along_y = tl.sum(y * dy, axis=1) / D  # [BLOCK_M]: the share of dy that only scales h, which y ignores
    dh = dy - y * along_y[:, None]
    tl.store(
        dh_ptr + offs_m[:, None] * stride_dhm + offs_d[None, :], dh.to(dh_ptr.dtype.element_ty), mask=mask
    )


def fill_norm_add(y: Tensor, h: Tensor, r: Tensor | None, eps: float, is_normed: bool = False) -> None:
    """y = rms(h) + r, all [M, D]; or h + r, where h is normed already."""
    M, D = y.shape[0], int(y.shape[1])
    BLOCK_D = triton.next_power_of_2(D)
    row = tuning.lookup("norm_add", arch_of(h), BLOCK_D)
    launch(
        _norm_add_fwd_kernel,
        (triton.cdiv(M, row.BLOCK_M),),
        h,
        r,
        y,
        M,
        h.stride(0),
        0 if r is None else r.stride(0),
        y.stride(0),
        eps,
        IS_NORMED=is_normed,
        D=D,
        BLOCK_M=row.BLOCK_M,
        BLOCK_D=BLOCK_D,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
    )


def fill_norm_add_bwd(
    dh: Tensor,
    dy: Tensor,
    h: Tensor,
    eps: float,
    dy2: Tensor | None = None,
    scaled_dy: Tensor | None = None,
    dy_sum: Tensor | None = None,
) -> None:
    """dh [M, D], the gradient of y being dy + dy2 + scaled_dy / rstd.

    dy_sum   float32, to which dy + dy2 is added: of something else that was added to y
    """
    M, D = h.shape[0], int(h.shape[1])
    BLOCK_D = triton.next_power_of_2(D)
    row = tuning.lookup("norm_add", arch_of(h), BLOCK_D)
    launch(
        _norm_add_bwd_kernel,
        (triton.cdiv(M, row.BLOCK_M),),
        dy,
        dy2,
        scaled_dy,
        h,
        dh,
        dy_sum,
        M,
        dy.stride(0),
        0 if dy2 is None else dy2.stride(0),
        0 if scaled_dy is None else scaled_dy.stride(0),
        h.stride(0),
        dh.stride(0),
        0 if dy_sum is None else dy_sum.stride(0),
        eps,
        D=D,
        BLOCK_M=row.BLOCK_M,
        BLOCK_D=BLOCK_D,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
    )


@launcher
def _norm_add_fwd(h: Tensor, r: Tensor | None, eps: float) -> Tensor:
    y = h.new_empty(h.shape)
    fill_norm_add(y, h, r, eps)
    return y


@launcher
def _norm_add_bwd(dy: Tensor, h: Tensor, eps: float) -> Tensor:
    dh = h.new_empty(h.shape)
    fill_norm_add_bwd(dh, dy, h, eps)
    return dh


class _NormAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, r, eps):
        ctx.save_for_backward(h)
        ctx.eps = eps
        return _norm_add_fwd(h, r, eps)

    @staticmethod
    def backward(ctx, dy):
        (h,) = ctx.saved_tensors
        needs_h, needs_r, _ = ctx.needs_input_grad
        dh = _norm_add_bwd(rows_of(dy), h, ctx.eps) if needs_h else None
        return dh, dy if needs_r else None, None


def norm_add(h: Tensor, r: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """rms(h) + r over the last axis; differentiable.

    Args:
        h: [..., D], float32, float16 or bfloat16 (float64 by the reference).
        r: [..., D], in h's dtype, or None.
        eps: Added to the mean of squares.

    Returns:
        y, [..., D], in h's dtype.

    Raises:
        ValueError: When shapes, dtypes or devices disagree, or D is 0 or above the widest tuned row.
    """
    if h.ndim == 0 or h.shape[-1] == 0 or (r is not None and r.shape != h.shape):
        got = tuple(h.shape) if r is None else f"{tuple(h.shape)} and {tuple(r.shape)}"
        raise ValueError(f"norm_add: expected h and r of one shape [..., D] with D > 0, got {got}.")
    if r is not None:
        h, r = as_widest(h, r)
    tensors = {"h": h} if r is None else {"h": h, "r": r}
    check_dtypes("norm_add", **tensors)
    check_devices("norm_add", **tensors)
    if not runs_triton("norm_add", h, has_kernel=h.dtype != torch.float64):
        return norm_add_ref(h, r, eps)
    return _NormAdd.apply(rows_of(h), None if r is None else rows_of(r), eps).view(h.shape)
