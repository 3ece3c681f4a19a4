"""injection_blend: h' = h + strength * gate * (y W_out^T), the way back into the language model

gate is 1, or sigmoid(y g + b): one score a token, computed from the recursion's answer. u = y W_out^T is not
written to memory: the score is summed while y is multiplied, and the blend is the product's epilogue. The
gradient does not need u either. Per token, with t = dh' W_out,

    sum over D of dh' * u = sum over d of t * y

is what the gate's gradient is made of, and t is computed anyway for the gradient of y.

Shapes   h, h' [..., D]; y [..., d]; w_out [D, d]; gate_weight g [1, d]; gate_bias b [1].
Dtypes   y, w_out and the gate's: one dtype, float32, float16 or bfloat16; h' has h's, one of these; score,
         gate and products in float32. float64 stays float64 throughout, in the reference only.
Errors   ValueError when shapes, dtypes or devices disagree, or the gate comes without its bias; RuntimeError
         for a candidate that cannot run.
Source   the last line of the mathematics in README.md, "What is computed".

With w_out at zero h' equals h bit for bit: a sum with zero changes no float. Rows whose elements do not lie
side by side are copied first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

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
    scaled_mm,
    tile_of_program,
    weight_gradient,
)
from trm_kernels.runtime.launch import arch_of, launch, launcher
from trm_kernels.runtime.optional_triton import tl, triton
from trm_kernels.runtime.precision import wide


def injection_blend_ref(
    h: Tensor,
    y: Tensor,
    w_out: Tensor,
    strength: float = 1.0,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """The meaning of the op, in eager PyTorch."""
    u = F.linear(y, w_out) * strength
    if gate_weight is not None:
        u = wide(F.linear(y, gate_weight, gate_bias)).sigmoid().to(u.dtype) * u
    return h + u.to(h.dtype)


@triton.jit
def rows_by_weight_and_score(
    y_ptr,  # [M, K]
    w_ptr,  # [N, K]
    gate_weight_ptr,  # [K], or None
    offs_m,
    in_m,
    offs_n,
    in_n,
    K,
    stride_ym,
    stride_wn,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of y W^T, [BLOCK_M, BLOCK_N] float32, and the rows' scores y g [BLOCK_M], or zeros."""
    offs_k = tl.arange(0, BLOCK_K)
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_k[None, :]
    w_ptrs = w_ptr + offs_n[None, :] * stride_wn + offs_k[:, None]
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    scores = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        in_k = offs_k < K - k
        y = tl.load(y_ptrs, mask=in_m[:, None] & in_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=in_k[:, None] & in_n[None, :], other=0.0)
        product = tl.dot(y, w, product, input_precision=PRECISION)
        if gate_weight_ptr is not None:
            gate_weight = tl.load(gate_weight_ptr + k + offs_k, mask=in_k, other=0.0).to(tl.float32)
            scores += y.to(tl.float32) * gate_weight[None, :]
        y_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return product, tl.sum(scores, axis=1)


@triton.jit
def _injection_blend_fwd_kernel(
    h_ptr,  # [M, N]
    y_ptr,  # [M, K]
    w_out_ptr,  # [N, K]
    gate_weight_ptr,  # [K], or None
    gate_bias_ptr,  # [1], or None
    out_ptr,  # [M, N], out
    gate_ptr,  # [M] float32, out, or None
    M,
    N,
    K,
    stride_hm,
    stride_ym,
    stride_w_outn,
    stride_outm,
    strength,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # one program: a tile of h'; the tiles of a row each find its gate anew
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = offs_m < M, offs_n < N
    u, score = rows_by_weight_and_score(
        y_ptr,
        w_out_ptr,
        gate_weight_ptr,
        offs_m,
        in_m,
        offs_n,
        in_n,
        K,
        stride_ym,
        stride_w_outn,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    u *= strength
    if gate_weight_ptr is not None:
        gate = tl.sigmoid(score + tl.load(gate_bias_ptr).to(tl.float32))  # [BLOCK_M]
        u *= gate[:, None]
        tl.store(gate_ptr + offs_m, gate, mask=in_m & (tile_n == 0))
    mask = in_m[:, None] & in_n[None, :]
    h = tl.load(h_ptr + offs_m[:, None] * stride_hm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + offs_m[:, None] * stride_outm + offs_n[None, :]
    tl.store(out_ptrs, (h + u).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _injection_blend_add_kernel(
    h_ptr,  # [M, N]
    y_ptr,  # [M, K]
    u_ptr,  # [M, N]: y W_out^T from torch.mm
    gate_weight_ptr,  # [K], or None
    gate_bias_ptr,  # [1], or None
    out_ptr,  # [M, N], out
    gate_ptr,  # [M] float32, out, or None
    M,
    N,
    K,
    stride_hm,
    stride_ym,
    stride_um,
    stride_outm,
    strength,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # one program: BLOCK_M whole rows, BLOCK_N columns at a time
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = offs_m < M
    share = tl.full((BLOCK_M,), strength, tl.float32)
    if gate_weight_ptr is not None:
        scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, K, BLOCK_N):
            offs_k = first + tl.arange(0, BLOCK_N)
            in_k = offs_k < K
            y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_k[None, :]
            y = tl.load(y_ptrs, mask=in_m[:, None] & in_k[None, :], other=0.0).to(tl.float32)
            gate_weight = tl.load(gate_weight_ptr + offs_k, mask=in_k, other=0.0).to(tl.float32)
            scores += y * gate_weight[None, :]
        gate = tl.sigmoid(tl.sum(scores, axis=1) + tl.load(gate_bias_ptr).to(tl.float32))
        share *= gate
        tl.store(gate_ptr + offs_m, gate, mask=in_m)
    for first in range(0, N, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask = in_m[:, None] & (offs_n < N)[None, :]
        h = tl.load(h_ptr + offs_m[:, None] * stride_hm + offs_n[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        u = tl.load(u_ptr + offs_m[:, None] * stride_um + offs_n[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        out_ptrs = out_ptr + offs_m[:, None] * stride_outm + offs_n[None, :]
        tl.store(out_ptrs, (h + u * share[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _injection_blend_bwd_kernel(
    t_ptr,  # [M, K]: dh' W_out
    y_ptr,  # [M, K]
    gate_weight_ptr,  # [K]
    gate_ptr,  # [M] float32
    dy_ptr,  # [M, K], out
    shared_y_ptr,  # [M, K], out: strength * gate * y, of which and dh' the gradient of w_out is the product
    dscore_ptr,  # [M] float32, out
    M,
    K,
    stride_tm,
    stride_ym,
    stride_dym,
    stride_shared_ym,
    strength,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # one program: BLOCK_M whole rows, BLOCK_N columns at a time, once for the score and once for the rest
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = offs_m < M
    gate = tl.load(gate_ptr + offs_m, mask=in_m, other=0.0)
    dgates = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_N):
        offs_k = first + tl.arange(0, BLOCK_N)
        mask = in_m[:, None] & (offs_k < K)[None, :]
        t = tl.load(t_ptr + offs_m[:, None] * stride_tm + offs_k[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        y = tl.load(y_ptr + offs_m[:, None] * stride_ym + offs_k[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        dgates += t * y
    dscore = strength * tl.sum(dgates, axis=1) * gate * (1 - gate)  # [BLOCK_M]
    tl.store(dscore_ptr + offs_m, dscore, mask=in_m)

    share = (strength * gate)[:, None]
    for first in range(0, K, BLOCK_N):
        offs_k = first + tl.arange(0, BLOCK_N)
        mask = in_m[:, None] & (offs_k < K)[None, :]
        t = tl.load(t_ptr + offs_m[:, None] * stride_tm + offs_k[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        y = tl.load(y_ptr + offs_m[:, None] * stride_ym + offs_k[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        gate_weight = tl.load(gate_weight_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
        dy = share * t + dscore[:, None] * gate_weight[None, :]
        dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_k[None, :]
        tl.store(dy_ptrs, dy.to(dy_ptr.dtype.element_ty), mask=mask)
        shared_y_ptrs = shared_y_ptr + offs_m[:, None] * stride_shared_ym + offs_k[None, :]
        tl.store(shared_y_ptrs, (share * y).to(shared_y_ptr.dtype.element_ty), mask=mask)


@launcher
def _injection_blend_fwd(
    h: Tensor,
    y: Tensor,
    w_out: Tensor,
    strength: float,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    candidate: str | None,
) -> tuple[Tensor, Tensor]:
    """(h', the gate [M] float32, or an empty one where there is none)"""
    M, K = y.shape
    out = h.new_empty(h.shape)
    gate = h.new_empty(0 if gate_weight is None else M, dtype=torch.float32)
    is_aligned = are_aligned(y, w_out)
    if tuning.choose("injection_blend", arch_of(h), y.element_size(), K, is_aligned, candidate) == "mm":
        _fill_blend(out, gate, h, y, torch.mm(y, w_out.t()), strength, gate_weight, gate_bias)
    else:
        _fill_fused(out, gate, h, y, w_out, strength, gate_weight, gate_bias)
    return out, gate


def _fill_blend(
    out: Tensor,
    gate: Tensor,
    h: Tensor,
    y: Tensor,
    u: Tensor,
    strength: float,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
) -> None:
    """out and gate, from the product u = y W_out^T [M, N] that torch.mm computed."""
    (M, N), K = h.shape, y.shape[1]
    tile = tuning.tile("injection_blend", arch_of(h))
    launch(
        _injection_blend_add_kernel,
        (triton.cdiv(M, tile.BLOCK_M),),
        h,
        y,
        u,
        gate_weight,
        gate_bias,
        out,
        None if gate_weight is None else gate,
        M,
        N,
        K,
        h.stride(0),
        y.stride(0),
        u.stride(0),
        out.stride(0),
        strength,
        **tile.meta,
    )


def _fill_fused(
    out: Tensor,
    gate: Tensor,
    h: Tensor,
    y: Tensor,
    w_out: Tensor,
    strength: float,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
) -> None:
    """out and gate, by one kernel."""
    (M, N), K = h.shape, y.shape[1]
    gemm = tuning.gemm("injection_blend", arch_of(h), y.element_size(), are_aligned(y, w_out), M)
    launch(
        _injection_blend_fwd_kernel,
        grid(M, N, gemm),
        h,
        y,
        w_out,
        gate_weight,
        gate_bias,
        out,
        None if gate_weight is None else gate,
        M,
        N,
        K,
        h.stride(0),
        y.stride(0),
        w_out.stride(0),
        out.stride(0),
        strength,
        PRECISION=input_precision(),
        **gemm.meta,
    )


@launcher
def _injection_blend_bwd(
    t: Tensor, y: Tensor, gate_weight: Tensor, gate: Tensor, strength: float
) -> tuple[Tensor, Tensor, Tensor]:
    M, K = y.shape
    dy, shared_y = y.new_empty(M, K), y.new_empty(M, K)
    dscore = y.new_empty(M, dtype=torch.float32)
    tile = tuning.tile("injection_blend", arch_of(y))
    launch(
        _injection_blend_bwd_kernel,
        (triton.cdiv(M, tile.BLOCK_M),),
        t,
        y,
        gate_weight,
        gate,
        dy,
        shared_y,
        dscore,
        M,
        K,
        t.stride(0),
        y.stride(0),
        dy.stride(0),
        shared_y.stride(0),
        strength,
        **tile.meta,
    )
    return dy, shared_y, dscore


class _InjectionBlend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, y, w_out, strength, gate_weight, gate_bias, candidate):
        out, gate = _injection_blend_fwd(h, y, w_out, strength, gate_weight, gate_bias, candidate)
        ctx.save_for_backward(y, w_out, gate_weight, gate)
        ctx.strength = strength
        return out

    @staticmethod
    def backward(ctx, dout):
        y, w_out, gate_weight, gate = ctx.saved_tensors
        needs_h, needs_y, needs_w_out, _, needs_gate_weight, needs_gate_bias, _ = ctx.needs_input_grad
        dh = dout if needs_h else None
        dout = rows_of(dout).to(y.dtype)
        dy = dw_out = dgate_weight = dgate_bias = None
        if gate_weight is None:
            dy = scaled_mm(dout, w_out, ctx.strength) if needs_y else None
            dw_out = weight_gradient(dout, y, ctx.strength) if needs_w_out else None
            return dh, dy, dw_out, None, None, None, None
        if not any((needs_y, needs_w_out, needs_gate_weight, needs_gate_bias)):
            return dh, None, None, None, None, None, None
        t = torch.mm(dout, w_out)
        dy, shared_y, dscore = _injection_blend_bwd(t, y, gate_weight, gate, ctx.strength)
        dw_out = weight_gradient(dout, shared_y) if needs_w_out else None
        if needs_gate_weight:
            dgate_weight = weight_gradient(dscore[:, None].to(y.dtype), y).view(-1)
        if needs_gate_bias:
            dgate_bias = dscore.sum(0, keepdim=True).to(y.dtype)
        return dh, dy if needs_y else None, dw_out, None, dgate_weight, dgate_bias, None


def injection_blend(
    h: Tensor,
    y: Tensor,
    w_out: Tensor,
    strength: float = 1.0,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    *,
    candidate: str | None = None,
) -> Tensor:
    """h + strength * gate * (y W_out^T), from the recursion back to the language model; differentiable.

    Args:
        h: [..., D], float32, float16 or bfloat16 (float64 by the reference).
        y: [..., d], as w_out and the gate in one dtype, which need not be h's.
        w_out: [D, d].
        strength: The factor of what is added.
        gate_weight: [1, d], or None for a gate of 1.
        gate_bias: [1]; given with gate_weight only.
        candidate: "fused" for one kernel; "mm" for torch.mm and one kernel; None for what the settings table
            says.

    Returns:
        h', [..., D], in h's dtype.

    Raises:
        ValueError: When shapes, dtypes or devices disagree, or the gate comes without its bias.
        RuntimeError: For a candidate that cannot run.
    """
    D, d = (h.shape[-1], y.shape[-1]) if h.ndim and y.ndim else (0, 0)
    if w_out.shape != (D, d) or h.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            "injection_blend: expected h [..., D], y [..., d] and w_out [D, d], "
            f"got {tuple(h.shape)}, {tuple(y.shape)} and {tuple(w_out.shape)}."
        )
    shapes = tuple(None if t is None else tuple(t.shape) for t in (gate_weight, gate_bias))
    if shapes not in ((None, None), ((1, d), (1,))):
        raise ValueError(
            f"injection_blend: expected gate_weight [1, {d}] and gate_bias [1] or neither, got {shapes}."
        )
    y, w_out = as_autocast(y, w_out)
    factors = {"y": y, "w_out": w_out}
    if gate_weight is not None and gate_bias is not None:
        gate_weight, gate_bias = as_autocast(gate_weight, gate_bias)
        factors |= {"gate_weight": gate_weight, "gate_bias": gate_bias}
    check_dtypes("injection_blend", **factors)
    check_dtypes("injection_blend", h=h)
    check_devices("injection_blend", h=h, **factors)
    if not runs_candidate("injection_blend", candidate, h, y):
        return injection_blend_ref(h, y, w_out, strength, gate_weight, gate_bias)
    if gate_weight is not None:
        gate_weight = gate_weight.reshape(-1)
    out = _InjectionBlend.apply(
        rows_of(h), rows_of(y), rows_of(w_out), strength, gate_weight, gate_bias, candidate
    )
    return out.view(h.shape)
