"""rope: each pair (u[j], u[j + K/2]) of a head rotated by the angle position * theta^(-2j/K)

Shapes   u [B, T, N, K], N heads of any kind; angles [B, T, K/2] or [1, T, K/2]; the result has u's shape.
Dtypes   u: any floating dtype, the result has it too; angles and arithmetic in float32 (float64 for float64).
Errors   ValueError when sizes or devices disagree, K is odd, or above the widest tuned head.
Source   "RoFormer", Su et al., 2021, section 3.2, in its rotate-half form.

The cosines and sines are a table, made once for all heads, layers and steps. A recursion in one launch makes
the table itself, by `cos_and_sin`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trm_kernels.runtime import tuning
from trm_kernels.runtime.backend import runs_triton
from trm_kernels.runtime.launch import arch_of, launch, launcher
from trm_kernels.runtime.optional_triton import tl, triton
from trm_kernels.runtime.precision import wide


class Angles(NamedTuple):
    """The angles of RoPE, [B, T, K/2] or [1, T, K/2], float32."""

    cos: Tensor
    sin: Tensor


def rope_frequencies(head_width: int, theta: float, device: torch.device) -> Tensor:
    """[K/2] float32: by how much the angle of each pair grows from one position to the next."""
    exponents = torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width
    return theta**-exponents


def rope_angles(positions: Tensor, head_width: int, theta: float) -> Angles:
    """RoPE's table for some tokens, made once for all heads, layers and steps.

    Args:
        positions: [B, T] or [1, T], in tokens, of any dtype.
        head_width: K, even.
        theta: RoPE's base.

    Returns:
        cos and sin of position * theta^(-2j/K), [B or 1, T, K/2] float32.
    """
    angles = positions[..., None].float() * rope_frequencies(head_width, theta, positions.device)
    return Angles(angles.cos(), angles.sin())


def tables(angles: Angles | None) -> tuple[Tensor | None, Tensor | None]:
    """Cosines and sines as kernels read them; (None, None) without positions."""
    return (None, None) if angles is None else (angles.cos.contiguous(), angles.sin.contiguous())


def rope_ref(u: Tensor, angles: Angles) -> Tensor:
    """The meaning of the op; u is rotated in float32.

    low cos - high sin | high cos + low sin, in passes over whole heads: half the time, on a CPU.
    """
    cos, sin = (t[:, :, None] for t in angles)  # [B, T, 1, K/2]: the same for all heads
    u_wide = wide(u)
    low, high = u_wide.chunk(2, dim=-1)
    crossed = torch.cat((high, low), dim=-1) * torch.cat((-sin, sin), dim=-1)
    return crossed.add_(u_wide * torch.cat((cos, cos), dim=-1)).to(u.dtype)


@triton.jit
def rotate(low, high, cos, sin):
    """The two halves of some heads, rotated by an angle; -sin rotates back."""
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def cos_and_sin(angle):
    """Of a float32 angle, to float32's precision up to 2^24. tl.cos would take a stack for a large one.

    In float64, where a quarter turn can be taken away as often as it fits. Of the rest, at most pi/4 to
    either side, the Taylor series leave out less than 2e-10.
    """
    angle = angle.to(tl.float64)
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)  # 2/pi
    r = angle - quarters * 1.5707963267948966
    s = r * r
    cos = 1 - s * (1 / 2) * (1 - s * (1 / 12) * (1 - s * (1 / 30) * (1 - s * (1 / 56) * (1 - s * (1 / 90)))))
    sin = 1 - s * (1 / 6) * (1 - s * (1 / 20) * (1 - s * (1 / 42) * (1 - s * (1 / 72) * (1 - s * (1 / 110)))))
    sin *= r
    turns = quarters.to(tl.int32) & 3
    is_odd, is_behind = (turns & 1) == 1, turns >= 2
    cos, sin = tl.where(is_odd, -sin, cos), tl.where(is_odd, cos, sin)
    cos, sin = tl.where(is_behind, -cos, cos), tl.where(is_behind, -sin, sin)
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit
def _rope_fwd_kernel(
    u_ptr,  # [B, T, N, K]
    cos_ptr,  # [B or 1, T, J] float32, J = K/2
    sin_ptr,
    y_ptr,  # [B, T, N, K], out
    T,
    N,
    M,
    stride_ub,
    stride_ut,
    stride_un,
    stride_ab,
    J: tl.constexpr,
    IS_BACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    # one program: BLOCK_M heads of M = B T N, whichever tokens they belong to
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_j = tl.arange(0, BLOCK_J)[None, :]
    mask = (offs_m < M)[:, None] & (offs_j < J)
    n, t, b = offs_m % N, offs_m // N % T, offs_m // N // T

    u_ptr += (b * stride_ub + t * stride_ut + n * stride_un)[:, None] + offs_j
    angle = (b * stride_ab + t * J)[:, None] + offs_j
    low = tl.load(u_ptr, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(u_ptr + J, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    low, high = rotate(low, high, cos, -sin if IS_BACK else sin)

    y_ptr += offs_m[:, None] * (2 * J) + offs_j
    tl.store(y_ptr, low.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + J, high.to(y_ptr.dtype.element_ty), mask=mask)


@launcher
def rope_fwd(u: Tensor, cos: Tensor, sin: Tensor, is_back: bool) -> Tensor:
    """u [B, T, N, K] rotated; with is_back by the opposite angles, which is the gradient."""
    B, T, N, K = u.shape
    row = tuning.lookup("rope", arch_of(u), triton.next_power_of_2(int(K)))
    y = u.new_empty(B, T, N, K)
    launch(
        _rope_fwd_kernel,
        (triton.cdiv(B * T * N, row.BLOCK_M),),
        u,
        cos,
        sin,
        y,
        T,
        N,
        B * T * N,
        u.stride(0),
        u.stride(1),
        u.stride(2),
        cos.stride(0) if cos.shape[0] > 1 else 0,
        J=int(K) // 2,
        IS_BACK=is_back,
        BLOCK_M=row.BLOCK_M,
        BLOCK_J=triton.next_power_of_2(int(K) // 2),
        num_warps=row.num_warps,
        num_stages=row.num_stages,
    )
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rope_fwd(u, cos, sin, False)

    @staticmethod
    def backward(ctx, dy):
        return rope_fwd(rows(dy), *ctx.saved_tensors, True), None, None


def rows(t: Tensor) -> Tensor:
    """t, copied where neighbouring elements of its last axis do not lie side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


def check_angles(op: str, angles: Angles, B: int, T: int, K: int) -> None:
    """Refuse a table of other sizes. Errors: ValueError with what was expected and what came."""
    for t in angles:
        if K % 2 or t.shape[0] not in (1, B) or t.shape[1:] != (T, K // 2) or t.dtype != torch.float32:
            raise ValueError(
                f"{op}: expected float32 angles [{B} or 1, {T}, K/2] for an even head width K, "
                f"got {tuple(t.shape)} {t.dtype} for K = {K}."
            )


def rope(u: Tensor, angles: Angles) -> Tensor:
    """u with RoPE applied; differentiable.

    Args:
        u: [B, T, N, K] of any floating dtype, N heads of any kind.
        angles: rope_angles of the tokens' positions, [B or 1, T, K/2] float32.

    Returns:
        The rotated heads, [B, T, N, K], in u's dtype.

    Raises:
        ValueError: When sizes or devices disagree, or K is odd or above the widest tuned head.
    """
    if u.ndim != 4 or not u.is_floating_point():
        raise ValueError(f"rope: expected floating u [B, T, N, K], got {tuple(u.shape)} of {u.dtype}.")
    check_angles("rope", angles, u.shape[0], u.shape[1], u.shape[3])
    for t in angles:
        if t.device != u.device:
            raise ValueError(f"rope: expected angles on {u.device}, where u is, got {t.device}.")
    if not runs_triton("rope", u, has_kernel=u.dtype != torch.float64):
        return rope_ref(u, angles)
    return _Rope.apply(rows(u), angles.cos.contiguous(), angles.sin.contiguous())
