"""add_rms_norm: y = h * rstd,  h = x + r or x + r + s,  rstd = rsqrt(mean(h^2) + eps)

The sum of three is the first norm of each f in the recursion: f starts from v = z + (y + x), which is not
normalised, and its first layer ends in rms(v + attention(v)).

Shapes   x, r, s, y [..., D]; rstd [M], with M the product of the leading sizes.
Dtypes   x, r and s of one dtype, float32, float16 or bfloat16; sums and rstd in float32; y has x's dtype.
         float64 stays float64 throughout, in the reference only.
Errors   ValueError when shapes, dtypes or devices disagree, when D is 0 or above the widest tuned row.
Source   "Root Mean Square Layer Normalization", Zhang and Sennrich, 2019, eq. 4, without the gain, as in
         "Less is More: Recursive Reasoning with Tiny Networks", arXiv 2510.04871.
"""

import torch
from torch import Tensor

from trm_kernels.runtime import tuning
from trm_kernels.runtime.autocast import as_widest
from trm_kernels.runtime.backend import runs_triton
from trm_kernels.runtime.gemm_common import check_devices, check_dtypes, listed, rows_of
from trm_kernels.runtime.launch import arch_of, launch, launcher
from trm_kernels.runtime.optional_triton import tl, triton
from trm_kernels.runtime.precision import wide


def rms_norm_ref(v: Tensor, eps: float = 1e-5) -> Tensor:
    """v * rsqrt(mean(v^2) + eps) over the last axis of v [..., D]: in float32, returned in v's dtype."""
    h = wide(v)
    return (h * _rstd(h, eps)).to(v.dtype)


def add_rms_norm_ref(x: Tensor, r: Tensor, eps: float = 1e-5, s: Tensor | None = None) -> Tensor:
    """The meaning of the op: the sum is not rounded to x's dtype before it is normalised."""
    h = wide(x) + wide(r)
    if s is not None:
        h = h + wide(s)
    rstd = _rstd(h, eps)
    return (h * rstd if h.requires_grad else h.mul_(rstd)).to(x.dtype)


def _rstd(h: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)


@triton.jit
def _add_rms_norm_fwd_kernel(
    x_ptr,  # [M, D]
    r_ptr,  # [M, D]
    s_ptr,  # [M, D], or None
    y_ptr,  # [M, D], out
    rstd_ptr,  # [M] float32, out
    M,
    stride_xm,
    stride_rm,
    stride_sm,
    stride_ym,
    eps,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: BLOCK_M whole rows
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_m < M)[:, None] & (offs_d < D)[None, :]

    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    r = tl.load(r_ptr + offs_m[:, None] * stride_rm + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)

    h = x + r
    if s_ptr is not None:
        h += tl.load(s_ptr + offs_m[:, None] * stride_sm + offs_d[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    rstd = tl.rsqrt(tl.sum(h * h, axis=1) / D + eps)  # [BLOCK_M]
    y = h * rstd[:, None]

    tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + offs_m, rstd, mask=offs_m < M)


@triton.jit
def _add_rms_norm_bwd_kernel(
    dy_ptr,  # [M, D]
    y_ptr,  # [M, D]
    rstd_ptr,  # [M] float32
    dh_ptr,  # [M, D], out: the gradient of x, r and s, h being their sum
    M,
    stride_dym,
    stride_ym,
    stride_dhm,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: BLOCK_M whole rows of dh = rstd * (dy - y * mean(y * dy))
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_m < M)[:, None] & (offs_d < D)[None, :]

    dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offs_m[:, None] * stride_ym + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + offs_m, mask=offs_m < M, other=0.0)

    along_y = tl.sum(y * dy, axis=1) / D  # [BLOCK_M]: the share of dy that only scales h, which y ignores
    dh = rstd[:, None] * (dy - y * along_y[:, None])

    tl.store(
        dh_ptr + offs_m[:, None] * stride_dhm + offs_d[None, :], dh.to(dh_ptr.dtype.element_ty), mask=mask
    )


@launcher
def _add_rms_norm_fwd(x: Tensor, r: Tensor, s: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    M, D = x.shape[0], int(x.shape[1])
    BLOCK_D = triton.next_power_of_2(D)
    row = tuning.lookup("add_rms_norm", arch_of(x), BLOCK_D)
    y = x.new_empty(M, D)
    rstd = x.new_empty(M, dtype=torch.float32)
    launch(
        _add_rms_norm_fwd_kernel,
        (triton.cdiv(M, row.BLOCK_M),),
        x,
        r,
        s,
        y,
        rstd,
        M,
        x.stride(0),
        r.stride(0),
        0 if s is None else s.stride(0),
        y.stride(0),
        eps,
        D=D,
        BLOCK_M=row.BLOCK_M,
        BLOCK_D=BLOCK_D,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
    )
    return y, rstd


@launcher
def _add_rms_norm_bwd(dy: Tensor, y: Tensor, rstd: Tensor) -> Tensor:
    M, D = y.shape[0], int(y.shape[1])
    BLOCK_D = triton.next_power_of_2(D)
    row = tuning.lookup("add_rms_norm", arch_of(y), BLOCK_D)
    dh = y.new_empty(M, D)
    launch(
        _add_rms_norm_bwd_kernel,
        (triton.cdiv(M, row.BLOCK_M),),
        dy,
        y,
        rstd,
        dh,
        M,
        dy.stride(0),
        y.stride(0),
        dh.stride(0),
        D=D,
        BLOCK_M=row.BLOCK_M,
        BLOCK_D=BLOCK_D,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
    )
    return dh


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, r, s, eps):
        y, rstd = _add_rms_norm_fwd(x, r, s, eps)
        ctx.save_for_backward(y, rstd)  # all its gradient needs: x, r and s may be freed
        ctx.has_s = s is not None
        return y

    @staticmethod
    def backward(ctx, dy):
        dh = _add_rms_norm_bwd(rows_of(dy), *ctx.saved_tensors)
        return dh, dh, dh if ctx.has_s else None, None


def add_rms_norm(x: Tensor, r: Tensor, eps: float = 1e-5, s: Tensor | None = None) -> Tensor:
    """The RMS norm of x + r, or x + r + s, over the last axis; differentiable.

    Args:
        x: [..., D], float32, float16 or bfloat16 (float64 by the reference).
        r: [..., D], in x's dtype.
        eps: Added to the mean of squares.
        s: [..., D], in x's dtype, or None.

    Returns:
        y, [..., D], in x's dtype.

    Raises:
        ValueError: When shapes, dtypes or devices disagree, or D is 0 or above the widest tuned row.
    """
    tensors = {"x": x, "r": r} | ({} if s is None else {"s": s})
    if any(t.shape != x.shape for t in tensors.values()) or x.ndim == 0 or x.shape[-1] == 0:
        names, shapes = listed(tensors), listed(tuple(t.shape) for t in tensors.values())
        raise ValueError(f"add_rms_norm: expected {names} of one shape [..., D] with D > 0, got {shapes}.")
    tensors = dict(zip(tensors, as_widest(*tensors.values()), strict=True))
    check_dtypes("add_rms_norm", **tensors)
    check_devices("add_rms_norm", **tensors)
    x, r, s = tensors["x"], tensors["r"], tensors.get("s")
    if not runs_triton("add_rms_norm", x, r, has_kernel=x.dtype != torch.float64):
        return add_rms_norm_ref(x, r, eps, s)
    return _AddRMSNorm.apply(rows_of(x), rows_of(r), None if s is None else rows_of(s), eps).view(x.shape)
