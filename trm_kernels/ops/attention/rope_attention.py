"""rope_attention: o = softmax(rot(q) rot(k)^T / sqrt(K), where visible) v, from the fused projection q|k|v

rot turns each pair (u[j], u[j + K/2]) by the angle position * theta^(-2j/K): RoPE, see ops/attention/rope.py.

Shapes   qkv [B, T, (H + 2G) K] with H query heads, G key/value heads (H a multiple of G), head width K;
         positions [B, T] or [1, T], in tokens; S keys, S = T without a cache; o [B, T, H K].
Visible  key s to query t of row b, when all that is given agrees: key_mask[b, s] is True; with `causal`,
         s <= t + query_offset. Or `mask`, which says it all, broadcast to [B, H, T, S]: bool (True = may look
         at) or floating (added to the scores). A query that may look at nothing has o = 0 and passes no
         gradient (with a floating mask it is what the softmax makes of it).
Dtypes   qkv: any floating dtype, o has it too; angles, softmax and sums in float32 (float64 for float64).
Errors   ValueError when sizes disagree, H is no multiple of G, RoPE meets an odd K, or the implementation
         cannot do what was asked; RuntimeError when it is not there.
Source   RoPE: "RoFormer", Su et al., 2021, section 3.2. Attention: as in TRM, arXiv 2510.04871; kernels after
         "FlashAttention-2", Dao, 2023, algorithms 1 and 2, the gradient in two passes without atomics.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trm_kernels.ops.attention import library as library_attention
from trm_kernels.ops.attention.decode_attention import decode_attention
from trm_kernels.ops.attention.rope import (
    Angles,
    _rope_fwd,
    check_angles,
    rope,
    rope_angles,
    rope_ref,
    rows,
    tables,
    turn,
)
from trm_kernels.runtime import tuning
from trm_kernels.runtime.autocast import as_autocast
from trm_kernels.runtime.backend import current_backend, runs_triton
from trm_kernels.runtime.gemm_common import input_precision, mask_bytes
from trm_kernels.runtime.launch import arch_of, launch, launcher
from trm_kernels.runtime.optional_triton import tl, triton
from trm_kernels.runtime.precision import wide

# (keys, values) of the new tokens [B, G, T, K] -> those of all tokens so far [B, G, S, K]
UpdateCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

IMPLEMENTATIONS = ("auto", "triton", *library_attention.NAMES, "reference")


def visibility(
    T: int,
    S: int,
    device: torch.device,
    mask: Tensor | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    query_offset: int | None = None,
) -> Tensor | None:
    """What each query may look at, broadcast to [B, H, T, S]; None where everybody sees everything."""
    if mask is not None:
        return mask
    if causal:
        ahead = S - T if query_offset is None else query_offset  # by default the last query is the last key
        mask = torch.ones(T, S, dtype=torch.bool, device=device).tril(ahead)
    if key_mask is not None:
        _check_key_mask(key_mask, S)
        keys = key_mask[:, None, None, :]
        mask = keys if mask is None else mask & keys
    return mask


def rope_attention_ref(
    qkv: Tensor,
    angles: Angles | None,
    num_heads: int,
    num_key_value_heads: int,
    mask: Tensor | None = None,
    causal: bool = False,
    update_cache: UpdateCache | None = None,
    key_mask: Tensor | None = None,
    query_offset: int | None = None,
) -> Tensor:
    """The meaning of the op, in eager PyTorch."""
    B, T, width = qkv.shape
    H, G = num_heads, num_key_value_heads
    K = width // (H + 2 * G)
    qk, v = qkv.view(B, T, H + 2 * G, K).split((H + G, G), dim=2)
    if angles is not None:
        qk = rope_ref(qk, angles)
    q, k, v = (t.transpose(1, 2) for t in (*qk.split((H, G), dim=2), v))
    if update_cache is not None:
        k, v = update_cache(k, v)
    k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))

    scores = wide(q @ k.transpose(-1, -2)) * K**-0.5  # [B, H, T, S]
    visible = visibility(T, k.shape[-2], qkv.device, mask, causal, key_mask, query_offset)
    if visible is None:
        p = scores.softmax(dim=-1)
    elif visible.dtype == torch.bool:
        # the least finite number, not -inf: a row that sees nothing is uniform, no NaN, and then zero
        p = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(dim=-1)
        p = p.masked_fill(~visible, 0.0)
    else:
        p = (scores + visible).softmax(dim=-1)
    return (p.to(v.dtype) @ v).transpose(1, 2).reshape(B, T, H * K)


# What the kernels share: loads that turn, stores that turn back, and who may look at whom. A block of rows is
# given by their numbers `offs_r` and by which of them exist.


@triton.jit
def _load_halves(u_ptr, stride_u, offs_r, in_r, K: tl.constexpr, BLOCK_J: tl.constexpr):
    """Rows of u as two halves, each [rows, BLOCK_J]."""
    J: tl.constexpr = (K + 1) // 2
    offs_j = tl.arange(0, BLOCK_J)[None, :]
    u_ptr += offs_r.to(tl.int64)[:, None] * stride_u + offs_j
    low = tl.load(u_ptr, mask=in_r[:, None] & (offs_j < J), other=0.0)
    high = tl.load(u_ptr + J, mask=in_r[:, None] & (offs_j < K - J), other=0.0)
    return low, high


@triton.jit
def _load_angles(cos_ptr, sin_ptr, offs_r, in_r, J: tl.constexpr, BLOCK_J: tl.constexpr):
    offs_j = tl.arange(0, BLOCK_J)[None, :]
    offs, mask = offs_r[:, None] * J + offs_j, in_r[:, None] & (offs_j < J)
    return tl.load(cos_ptr + offs, mask=mask, other=0.0), tl.load(sin_ptr + offs, mask=mask, other=0.0)


@triton.jit
def _load_turned(u_ptr, stride_u, cos_ptr, sin_ptr, offs_r, in_r, K: tl.constexpr, BLOCK_J: tl.constexpr):
    """As _load_halves, with RoPE applied where there are angles."""
    low, high = _load_halves(u_ptr, stride_u, offs_r, in_r, K, BLOCK_J)
    if cos_ptr is not None:
        cos, sin = _load_angles(cos_ptr, sin_ptr, offs_r, in_r, K // 2, BLOCK_J)
        turned_low, turned_high = turn(low.to(tl.float32), high.to(tl.float32), cos, sin)
        low, high = turned_low.to(low.dtype), turned_high.to(high.dtype)
    return low, high


@triton.jit
def _store_turned_back(
    du_ptr, stride_du, low, high, cos_ptr, sin_ptr, offs_r, in_r, K: tl.constexpr, BLOCK_J: tl.constexpr
):
    """The gradient of u from that of its turned halves, both float32."""
    J: tl.constexpr = (K + 1) // 2
    offs_j = tl.arange(0, BLOCK_J)[None, :]
    if cos_ptr is not None:
        cos, sin = _load_angles(cos_ptr, sin_ptr, offs_r, in_r, J, BLOCK_J)
        low, high = turn(low, high, cos, -sin)
    du_ptr += offs_r.to(tl.int64)[:, None] * stride_du + offs_j
    tl.store(du_ptr, low.to(du_ptr.dtype.element_ty), mask=in_r[:, None] & (offs_j < J))
    tl.store(du_ptr + J, high.to(du_ptr.dtype.element_ty), mask=in_r[:, None] & (offs_j < K - J))


@triton.jit
def _load_rows(u_ptr, stride_u, offs_r, in_r, K: tl.constexpr, WIDTH: tl.constexpr):
    """Whole rows of u, [rows, WIDTH]."""
    offs_k = tl.arange(0, WIDTH)[None, :]
    u_ptr += offs_r.to(tl.int64)[:, None] * stride_u + offs_k
    return tl.load(u_ptr, mask=in_r[:, None] & (offs_k < K), other=0.0)


@triton.jit
def _store_rows(u_ptr, stride_u, u, offs_r, in_r, K: tl.constexpr, WIDTH: tl.constexpr):
    offs_k = tl.arange(0, WIDTH)[None, :]
    u_ptr += offs_r.to(tl.int64)[:, None] * stride_u + offs_k
    tl.store(u_ptr, u.to(u_ptr.dtype.element_ty), mask=in_r[:, None] & (offs_k < K))


@triton.jit
def _is_seen(seen_ptr, offs_n, S):
    """Which of these keys exist and are not padding."""
    seen = offs_n < S
    if seen_ptr is not None:
        seen = seen & (tl.load(seen_ptr + offs_n, mask=seen, other=0) != 0)
    return seen


@triton.jit
def _only_visible(scores, seen, key, query, query_offset, IS_CAUSAL: tl.constexpr):
    """The scores, -inf where a query may not look; seen, key and query shaped to broadcast."""
    visible = seen
    if IS_CAUSAL:
        visible = visible & (key <= query + query_offset)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _rope_attention_fwd_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, S, G, K]
    v_ptr,  # [B, S, G, K]
    cos_ptr,  # [B or 1, T, J] float32, or None: q and k are taken as they are
    sin_ptr,
    seen_ptr,  # [B, S] uint8, 0 where no query may look, or None
    o_ptr,  # [B, T, H, K], out
    lse_ptr,  # [B, H, T] float32, out: log2(sum(exp2(scores))), inf where nothing is visible
    T,
    S,
    H,
    query_offset,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kg,
    stride_vb,
    stride_vs,
    stride_vg,
    stride_ab,
    stride_ob,
    stride_ot,
    scale,  # log2(e) / sqrt(K): exp2 is what the hardware has
    K: tl.constexpr,
    GROUP: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WIDTH: tl.constexpr,  # K, rounded up to a power of two
):
    # one program: BLOCK_M queries of one head, over all keys they may look at
    num_m = tl.cdiv(T, BLOCK_M)
    start_m = tl.program_id(0) % num_m * BLOCK_M
    h = (tl.program_id(0) // num_m % H).to(tl.int64)
    b = (tl.program_id(0) // num_m // H).to(tl.int64)
    g = h // GROUP
    offs_m = start_m + tl.arange(0, BLOCK_M)
    in_m = offs_m < T

    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + g * stride_kg
    v_ptr += b * stride_vb + g * stride_vg
    if cos_ptr is not None:
        cos_ptr += b * stride_ab
        sin_ptr += b * stride_ab
    if seen_ptr is not None:
        seen_ptr += b * S

    q_low, q_high = _load_turned(q_ptr, stride_qt, cos_ptr, sin_ptr, offs_m, in_m, K, BLOCK_J)
    highest = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite, so that -inf - highest is no NaN
    total = tl.zeros((BLOCK_M,), tl.float32)
    o = tl.zeros((BLOCK_M, WIDTH), tl.float32)

    end_n = S
    if IS_CAUSAL:
        end_n = tl.minimum(S, start_m + BLOCK_M + query_offset)
    for start_n in range(0, end_n, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        in_n, seen = offs_n < S, _is_seen(seen_ptr, offs_n, S)
        k_low, k_high = _load_turned(k_ptr, stride_ks, cos_ptr, sin_ptr, offs_n, in_n, K, BLOCK_J)
        scores = tl.dot(q_low, tl.trans(k_low), input_precision=PRECISION)
        scores = tl.dot(q_high, tl.trans(k_high), scores, input_precision=PRECISION) * scale
        scores = _only_visible(
            scores, seen[None, :], offs_n[None, :], offs_m[:, None], query_offset, IS_CAUSAL
        )

        higher = tl.maximum(highest, tl.max(scores, axis=1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)  # what was summed so far, counted from the new highest
        total = total * shrink + tl.sum(p, axis=1)
        v = _load_rows(v_ptr, stride_vs, offs_n, in_n, K, WIDTH)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision=PRECISION)
        highest = higher

    sees = total > 0.0
    o = o / tl.where(sees, total, 1.0)[:, None]  # a query that may look at nothing: o = 0
    o_ptr += b * stride_ob + h * K
    _store_rows(o_ptr, stride_ot, o, offs_m, in_m, K, WIDTH)
    lse = tl.where(sees, highest + tl.log2(total), float("inf"))
    tl.store(lse_ptr + (b * H + h) * T + offs_m, lse, mask=in_m)


@triton.jit
def _rope_attention_bwd_dq_kernel(
    do_ptr,  # [B, T, H, K]
    q_ptr,  # [B, T, H, K], turned
    k_ptr,  # [B, S, G, K], turned
    v_ptr,  # [B, S, G, K]
    cos_ptr,  # [B or 1, T, J] float32, or None
    sin_ptr,
    seen_ptr,  # [B, S] uint8, or None
    o_ptr,  # [B, T, H, K]
    lse_ptr,  # [B, H, T] float32
    dq_ptr,  # [B, T, H, K], out
    delta_ptr,  # [B, H, T] float32, out: sum(do * o), for the kernel of dk and dv
    T,
    S,
    H,
    query_offset,
    stride_dob,
    stride_dot,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kg,
    stride_vb,
    stride_vs,
    stride_vg,
    stride_ab,
    stride_ob,
    stride_ot,
    stride_dqb,
    stride_dqt,
    stride_dqh,
    scale,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WIDTH: tl.constexpr,  # K, rounded up to a power of two
):
    # one program: BLOCK_M queries of one head;  dq = sum over keys of ds k,  ds = p (do v^T - delta)
    num_m = tl.cdiv(T, BLOCK_M)
    start_m = tl.program_id(0) % num_m * BLOCK_M
    h = (tl.program_id(0) // num_m % H).to(tl.int64)
    b = (tl.program_id(0) // num_m // H).to(tl.int64)
    g = h // GROUP
    offs_m = start_m + tl.arange(0, BLOCK_M)
    in_m = offs_m < T

    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + g * stride_kg
    v_ptr += b * stride_vb + g * stride_vg
    do_ptr += b * stride_dob + h * K
    o_ptr += b * stride_ob + h * K
    row_ptr = (b * H + h) * T + offs_m
    if cos_ptr is not None:
        cos_ptr += b * stride_ab
        sin_ptr += b * stride_ab
    if seen_ptr is not None:
        seen_ptr += b * S

    do = _load_rows(do_ptr, stride_dot, offs_m, in_m, K, WIDTH)
    o = _load_rows(o_ptr, stride_ot, offs_m, in_m, K, WIDTH)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)  # off by what o lost when it was rounded
    off_by = tl.zeros((BLOCK_M,), tl.float32)

    q_low, q_high = _load_halves(q_ptr, stride_qt, offs_m, in_m, K, BLOCK_J)
    lse = tl.load(lse_ptr + row_ptr, mask=in_m, other=float("inf"))
    dq_low = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
    dq_high = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)

    end_n = S
    if IS_CAUSAL:
        end_n = tl.minimum(S, start_m + BLOCK_M + query_offset)
    for start_n in range(0, end_n, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        in_n, seen = offs_n < S, _is_seen(seen_ptr, offs_n, S)
        k_low, k_high = _load_halves(k_ptr, stride_ks, offs_n, in_n, K, BLOCK_J)
        scores = tl.dot(q_low, tl.trans(k_low), input_precision=PRECISION)
        scores = tl.dot(q_high, tl.trans(k_high), scores, input_precision=PRECISION) * scale
        scores = _only_visible(
            scores, seen[None, :], offs_n[None, :], offs_m[:, None], query_offset, IS_CAUSAL
        )
        p = tl.exp2(scores - lse[:, None])
        v = _load_rows(v_ptr, stride_vs, offs_n, in_n, K, WIDTH)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        off_by += tl.sum(ds, axis=1)  # each row of p sums to one, and of ds to zero, if delta is right
        ds = ds.to(k_low.dtype)
        dq_low = tl.dot(ds, k_low, dq_low, input_precision=PRECISION)
        dq_high = tl.dot(ds, k_high, dq_high, input_precision=PRECISION)

    tl.store(delta_ptr + row_ptr, delta + off_by, mask=in_m)
    LN_2: tl.constexpr = 0.6931471805599453
    to_scores = scale * LN_2  # 1 / sqrt(K)
    dq_ptr += b * stride_dqb + h * stride_dqh
    _store_turned_back(
        dq_ptr,
        stride_dqt,
        dq_low * to_scores,
        dq_high * to_scores,
        cos_ptr,
        sin_ptr,
        offs_m,
        in_m,
        K,
        BLOCK_J,
    )


@triton.jit
def _rope_attention_bwd_dkv_kernel(
    do_ptr,  # [B, T, H, K]
    q_ptr,  # [B, T, H, K], turned
    k_ptr,  # [B, S, G, K], turned
    v_ptr,  # [B, S, G, K]
    cos_ptr,  # [B or 1, T, J] float32, or None
    sin_ptr,
    seen_ptr,  # [B, S] uint8, or None
    lse_ptr,  # [B, H, T] float32
    delta_ptr,  # [B, H, T] float32
    dk_ptr,  # [B, S, G, K], out
    dv_ptr,  # [B, S, G, K], out
    T,
    S,
    H,
    query_offset,
    stride_dob,
    stride_dot,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kg,
    stride_vb,
    stride_vs,
    stride_vg,
    stride_ab,
    stride_dkb,
    stride_dks,
    stride_dkg,
    stride_dvb,
    stride_dvs,
    stride_dvg,
    scale,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WIDTH: tl.constexpr,  # K, rounded up to a power of two
):
    # one program: BLOCK_N keys of one group, over its heads and all queries that may look at them;
    # dv = sum of p^T do,  dk = sum of ds^T q: always in the same order, so always to the same bit
    num_n = tl.cdiv(S, BLOCK_N)
    G = H // GROUP
    start_n = tl.program_id(0) % num_n * BLOCK_N
    g = (tl.program_id(0) // num_n % G).to(tl.int64)
    b = (tl.program_id(0) // num_n // G).to(tl.int64)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    in_n = offs_n < S

    k_ptr += b * stride_kb + g * stride_kg
    v_ptr += b * stride_vb + g * stride_vg
    if cos_ptr is not None:
        cos_ptr += b * stride_ab
        sin_ptr += b * stride_ab
    if seen_ptr is not None:
        seen_ptr += b * S

    seen = _is_seen(seen_ptr, offs_n, S)
    k_low, k_high = _load_halves(k_ptr, stride_ks, offs_n, in_n, K, BLOCK_J)
    v = _load_rows(v_ptr, stride_vs, offs_n, in_n, K, WIDTH)
    dk_low = tl.zeros((BLOCK_N, BLOCK_J), tl.float32)
    dk_high = tl.zeros((BLOCK_N, BLOCK_J), tl.float32)
    dv = tl.zeros((BLOCK_N, WIDTH), tl.float32)

    first = 0
    if IS_CAUSAL:  # the first block with a query that may look at the first of these keys
        first = tl.maximum(0, start_n - query_offset) // BLOCK_M
    blocks = tl.cdiv(T, BLOCK_M) - first
    for i in range(0, GROUP * blocks):  # one loop for heads and blocks: two, nested, spill
        h = g * GROUP + i // blocks
        start_m = (first + i % blocks) * BLOCK_M
        offs_m = start_m + tl.arange(0, BLOCK_M)
        in_m = offs_m < T
        q_low, q_high = _load_halves(
            q_ptr + b * stride_qb + h * stride_qh, stride_qt, offs_m, in_m, K, BLOCK_J
        )
        row_ptr = (b * H + h) * T + offs_m
        lse = tl.load(lse_ptr + row_ptr, mask=in_m, other=float("inf"))
        delta = tl.load(delta_ptr + row_ptr, mask=in_m, other=0.0)

        scores = tl.dot(k_low, tl.trans(q_low), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        scores = tl.dot(k_high, tl.trans(q_high), scores, input_precision=PRECISION) * scale
        scores = _only_visible(
            scores, seen[:, None], offs_n[:, None], offs_m[None, :], query_offset, IS_CAUSAL
        )
        p = tl.exp2(scores - lse[None, :])
        do = _load_rows(do_ptr + b * stride_dob + h * K, stride_dot, offs_m, in_m, K, WIDTH)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = (p * (dp - delta[None, :])).to(q_low.dtype)
        dk_low = tl.dot(ds, q_low, dk_low, input_precision=PRECISION)
        dk_high = tl.dot(ds, q_high, dk_high, input_precision=PRECISION)

    LN_2: tl.constexpr = 0.6931471805599453
    to_scores = scale * LN_2
    dk_ptr += b * stride_dkb + g * stride_dkg
    dv_ptr += b * stride_dvb + g * stride_dvg
    _store_turned_back(
        dk_ptr,
        stride_dks,
        dk_low * to_scores,
        dk_high * to_scores,
        cos_ptr,
        sin_ptr,
        offs_n,
        in_n,
        K,
        BLOCK_J,
    )
    _store_rows(dv_ptr, stride_dvs, dv, offs_n, in_n, K, WIDTH)


@triton.jit
def _rope_attention_bwd_tile_kernel(
    do_ptr,  # [B, T, H, K]
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, S, H, K]
    v_ptr,  # [B, S, H, K]
    cos_ptr,  # [B or 1, T, J] float32, or None
    sin_ptr,
    seen_ptr,  # [B, S] uint8, or None
    lse_ptr,  # [B, H, T] float32
    dq_ptr,  # [B, T, H, K], out
    dk_ptr,  # [B, S, H, K], out
    dv_ptr,  # [B, S, H, K], out
    T,
    S,
    H,
    query_offset,
    stride_dob,
    stride_dot,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kg,
    stride_vb,
    stride_vs,
    stride_vg,
    stride_ab,
    stride_dqb,
    stride_dqt,
    stride_dqh,
    stride_dkb,
    stride_dks,
    stride_dkg,
    stride_dvb,
    stride_dvs,
    stride_dvg,
    scale,
    K: tl.constexpr,
    GROUP: tl.constexpr,  # 1: a group of several heads takes the two kernels above
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WIDTH: tl.constexpr,  # K, rounded up to a power of two
):
    # one program: all queries and keys of one head in one tile; everything is read once, scores made once
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_m, in_n = offs_m < T, offs_n < S
    if cos_ptr is not None:
        cos_ptr += b * stride_ab
        sin_ptr += b * stride_ab
    if seen_ptr is not None:
        seen_ptr += b * S

    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kg
    q_low, q_high = _load_turned(q_ptr, stride_qt, cos_ptr, sin_ptr, offs_m, in_m, K, BLOCK_J)
    k_low, k_high = _load_turned(k_ptr, stride_ks, cos_ptr, sin_ptr, offs_n, in_n, K, BLOCK_J)
    seen = _is_seen(seen_ptr, offs_n, S)
    lse = tl.load(lse_ptr + (b * H + h) * T + offs_m, mask=in_m, other=float("inf"))
    scores = tl.dot(q_low, tl.trans(k_low), input_precision=PRECISION)
    scores = tl.dot(q_high, tl.trans(k_high), scores, input_precision=PRECISION) * scale
    scores = _only_visible(scores, seen[None, :], offs_n[None, :], offs_m[:, None], query_offset, IS_CAUSAL)
    p = tl.exp2(scores - lse[:, None])

    do = _load_rows(do_ptr + b * stride_dob + h * K, stride_dot, offs_m, in_m, K, WIDTH)
    dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
    dv_ptr += b * stride_dvb + h * stride_dvg
    _store_rows(dv_ptr, stride_dvs, dv, offs_n, in_n, K, WIDTH)

    v = _load_rows(v_ptr + b * stride_vb + h * stride_vg, stride_vs, offs_n, in_n, K, WIDTH)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    delta = tl.sum(p * dp, axis=1)  # the row is whole, so o is not needed
    LN_2: tl.constexpr = 0.6931471805599453
    ds = (p * (dp - delta[:, None]) * (scale * LN_2)).to(q_low.dtype)

    dq_low = tl.dot(ds, k_low, input_precision=PRECISION)
    dq_high = tl.dot(ds, k_high, input_precision=PRECISION)
    dq_ptr += b * stride_dqb + h * stride_dqh
    _store_turned_back(dq_ptr, stride_dqt, dq_low, dq_high, cos_ptr, sin_ptr, offs_m, in_m, K, BLOCK_J)

    dk_low = tl.dot(tl.trans(ds), q_low, input_precision=PRECISION)
    dk_high = tl.dot(tl.trans(ds), q_high, input_precision=PRECISION)
    dk_ptr += b * stride_dkb + h * stride_dkg
    _store_turned_back(dk_ptr, stride_dks, dk_low, dk_high, cos_ptr, sin_ptr, offs_n, in_n, K, BLOCK_J)


def _meta(row: tuning.AttentionLaunch, q: Tensor, k: Tensor, causal: bool) -> dict[str, Any]:
    """What every kernel of this op is compiled with."""
    K = int(q.shape[-1])
    return {
        "K": K,
        "GROUP": int(q.shape[2]) // int(k.shape[2]),
        "IS_CAUSAL": causal,
        "PRECISION": input_precision(),
        "BLOCK_M": row.BLOCK_M,
        "BLOCK_N": row.BLOCK_N,
        "BLOCK_J": max(16, triton.next_power_of_2((K + 1) // 2)),  # tl.dot sums over 16 or more
        "WIDTH": max(16, triton.next_power_of_2(K)),
        "num_warps": row.num_warps,
        "num_stages": row.num_stages,
        "maxnreg": 255,  # all there are: left alone, ptxas spills a few bytes to make room for more warps
    }


def _log2_scale(q: Tensor) -> float:
    return math.log2(math.e) * int(q.shape[-1]) ** -0.5


def _batch_stride(angles: Tensor | None) -> int:
    return 0 if angles is None or angles.shape[0] == 1 else angles.stride(0)


def _fill_rope_attention(
    o: Tensor,  # [B, T, H K]
    lse: Tensor,  # [B, H, T] float32
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, S, G, K]
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    causal: bool,
    query_offset: int,
) -> None:
    B, T, H, K = q.shape
    S = k.shape[1]
    row = tuning.lookup_attention("rope_attention_fwd", arch_of(q), int(K), q.element_size(), S)
    launch(
        _rope_attention_fwd_kernel,
        (triton.cdiv(T, row.BLOCK_M) * B * H,),
        q,
        k,
        v,
        cos,
        sin,
        key_mask,
        o,
        lse,
        T,
        S,
        H,
        query_offset,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        _batch_stride(cos),
        *o.stride()[:2],
        _log2_scale(q),
        **_meta(row, q, k, causal),
    )


@launcher
def _rope_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    causal: bool,
    query_offset: int,
) -> tuple[Tensor, Tensor]:
    B, T, H, K = q.shape
    o, lse = q.new_empty(B, T, H * K), q.new_empty(B, H, T, dtype=torch.float32)
    _fill_rope_attention(o, lse, q, k, v, cos, sin, key_mask, causal, query_offset)
    return o, lse


@launcher
def _rope_attention_bwd(
    do: Tensor,  # [B, T, H K]
    q: Tensor,  # [B, T, H, K], turned
    k: Tensor,  # [B, S, G, K], turned
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    query_offset: int,
    is_fused: bool,
) -> list[Tensor]:
    B, T, H, K = q.shape
    S, G = k.shape[1:3]
    grads, (dq, dk, dv) = _empty_gradients(q, k, is_fused)
    delta = torch.empty_like(lse)
    inputs = *do.stride()[:2], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], _batch_stride(cos)
    sizes = arch_of(q), int(K), q.element_size(), S
    row = tuning.lookup_attention("rope_attention_bwd_dq", *sizes)
    launch(
        _rope_attention_bwd_dq_kernel,
        (triton.cdiv(T, row.BLOCK_M) * B * H,),
        do,
        q,
        k,
        v,
        cos,
        sin,
        key_mask,
        o,
        lse,
        dq,
        delta,
        T,
        S,
        H,
        query_offset,
        *inputs,
        *o.stride()[:2],
        *dq.stride()[:3],
        _log2_scale(q),
        **_meta(row, q, k, causal),
    )
    row = tuning.lookup_attention("rope_attention_bwd_dkv", *sizes)
    launch(
        _rope_attention_bwd_dkv_kernel,
        (triton.cdiv(S, row.BLOCK_N) * B * G,),
        do,
        q,
        k,
        v,
        cos,
        sin,
        key_mask,
        lse,
        delta,
        dk,
        dv,
        T,
        S,
        H,
        query_offset,
        *inputs,
        *dk.stride()[:3],
        *dv.stride()[:3],
        _log2_scale(q),
        **_meta(row, q, k, causal),
    )
    return grads


@launcher
def _rope_attention_bwd_tile(
    do: Tensor,  # [B, T, H K]
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, S, G, K]
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    lse: Tensor,
    causal: bool,
    query_offset: int,
    is_fused: bool,
) -> list[Tensor]:
    B, T, H, K = q.shape
    S = k.shape[1]
    grads, (dq, dk, dv) = _empty_gradients(q, k, is_fused)
    row = tuning.lookup_attention("rope_attention_bwd_tile", arch_of(q), int(K), q.element_size(), max(T, S))
    launch(
        _rope_attention_bwd_tile_kernel,
        (B * H,),
        do,
        q,
        k,
        v,
        cos,
        sin,
        key_mask,
        lse,
        dq,
        dk,
        dv,
        T,
        S,
        H,
        query_offset,
        *do.stride()[:2],
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        _batch_stride(cos),
        *dq.stride()[:3],
        *dk.stride()[:3],
        *dv.stride()[:3],
        _log2_scale(q),
        **_meta(row, q, k, causal),
    )
    return grads


def _empty_gradients(q: Tensor, k: Tensor, is_fused: bool) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """(what is returned, dq, dk and dv in it): one tensor laid out as the projection, or three."""
    B, T, H, K = q.shape
    S, G = k.shape[1:3]
    if is_fused:
        dqkv = q.new_empty(B, T, H + 2 * G, K)
        return [dqkv], dqkv.split((H, G, G), dim=2)
    grads = [q.new_empty(B, T, H, K), *(k.new_empty(B, S, G, K) for _ in range(2))]
    return grads, tuple(grads)


class _RopeAttention(torch.autograd.Function):
    """Over the fused projection [B, T, H + 2G, K], or over q, k and v apart [B, tokens, heads, K]."""

    @staticmethod
    def forward(ctx, H, G, cos, sin, key_mask, causal, query_offset, *inputs):
        q, k, v = _apart(inputs, H, G)
        o, lse = _rope_attention_fwd(q, k, v, cos, sin, key_mask, causal, query_offset)
        ctx.save_for_backward(cos, sin, key_mask, o, lse, *inputs)
        ctx.sizes = H, G, causal, query_offset
        return o

    @staticmethod
    def backward(ctx, do):
        cos, sin, key_mask, o, lse, *inputs = ctx.saved_tensors
        grads = _rope_attention_gradients(rows(do), inputs, cos, sin, key_mask, o, lse, *ctx.sizes)
        return None, None, None, None, None, None, None, *grads


def _rope_attention_gradients(
    do: Tensor,
    inputs: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    H: int,
    G: int,
    causal: bool,
    query_offset: int,
) -> list[Tensor]:
    """Those of the inputs of _RopeAttention, in one tile where it holds everything."""
    is_fused = len(inputs) == 1
    q, k, v = _apart(inputs, H, G)
    tokens = max(q.shape[1], k.shape[1])
    tile = "rope_attention_bwd_tile", arch_of(q), int(q.shape[3]), q.element_size(), tokens
    if H == G and tuning.find_attention(*tile) is not None:
        grads = _rope_attention_bwd_tile(do, q, k, v, cos, sin, key_mask, lse, causal, query_offset, is_fused)
    else:
        if cos is not None:  # once, not again for every block: in the inner loops it spills
            turned = _rope_fwd(inputs[0][:, :, : H + G], cos, sin, False)
            q, k = turned.split((H, G), dim=2)
        grads = _rope_attention_bwd(do, q, k, v, cos, sin, key_mask, o, lse, causal, query_offset, is_fused)
    return grads


def _apart(inputs, H: int, G: int) -> tuple[Tensor, ...]:
    return inputs[0].split((H, G, G), dim=2) if len(inputs) == 1 else tuple(inputs)


def rope_attention(
    qkv: Tensor,
    positions: Tensor | None,
    num_heads: int,
    num_key_value_heads: int | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    rope_theta: float | None = 10000.0,
    update_cache: UpdateCache | None = None,
    *,
    key_mask: Tensor | None = None,
    query_offset: int | None = None,
    angles: Angles | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Attention over the fused projection. See the top of this file for shapes, dtypes and what is visible.

    positions        None counts from 0, or from query_offset
    rope_theta       None leaves positions out
    update_cache     given the new keys (RoPE applied) and values, returns those of all tokens
    query_offset     keys before the first query; None: the last query is the last key
    angles           rope_angles(positions, K, rope_theta), for a caller who calls more than once
    implementation   "auto": Triton or SDPA on CUDA, by the settings table (SDPA for a general mask), and the
                     reference elsewhere; "triton": our kernels, which take no general mask; "reference"; or
                     one of ops/attention/library.py. One that was asked for is had, or is an error.
    """
    H, G = num_heads, num_key_value_heads or num_heads
    _check(qkv, H, G, positions, mask, key_mask, angles, rope_theta)
    (qkv,) = as_autocast(qkv)
    B, T = qkv.shape[:2]
    K = int(qkv.shape[2]) // (H + 2 * G)
    name = _choose(implementation, qkv, K, mask)

    if angles is None and rope_theta is not None:
        if positions is None:
            positions = torch.arange(T, device=qkv.device)[None] + (query_offset or 0)
        angles = rope_angles(positions, K, rope_theta)
        check_angles("rope_attention", angles, B, T, K)
    if name == "reference":
        return rope_attention_ref(qkv, angles, H, G, mask, causal, update_cache, key_mask, query_offset)

    heads = rows(qkv).unflatten(-1, (H + 2 * G, K))
    if name == "triton" and update_cache is None:
        return _apply(H, G, angles, key_mask, causal, query_offset or 0, heads)

    # RoPE beforehand: a cache keeps turned keys, a library knows nothing of angles
    qk, v = heads.split((H + G, G), dim=2)
    q, k = (qk if angles is None else rope(qk, angles)).split((H, G), dim=2)
    if update_cache is not None:
        k, v = (t.transpose(1, 2) for t in update_cache(k.transpose(1, 2), v.transpose(1, 2)))
    S = k.shape[1]
    last = S - T if query_offset is None else query_offset
    sees_all_keys = not causal or last >= S - 1  # even the first query does
    if name != "triton":
        # SDPA's own causal mask begins at the first key, flash-attn's ends at the last
        is_plain = mask is None and key_mask is None and last == (S - T if name == "flash_attn" else 0)
        is_causal = causal and not sees_all_keys and is_plain and (name == "flash_attn" or S == T)
        visible = None
        if not is_causal:
            visible = visibility(T, S, qkv.device, mask, not sees_all_keys, key_mask, last)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        o = library_attention.attend("rope_attention", name, q, k, v, visible, is_causal)
        return o.transpose(1, 2).reshape(B, T, H * K)

    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if T == 1 and sees_all_keys and not wants_gradient:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return decode_attention(q[:, 0], k, v, key_mask=key_mask).reshape(B, 1, H * K)
    return _apply(H, G, None, key_mask, causal, last, rows(q), rows(k), rows(v))


def _apply(H, G, angles, key_mask, causal, query_offset, *inputs) -> Tensor:
    if key_mask is not None:
        _check_key_mask(key_mask, inputs[-1].shape[1])
    return _RopeAttention.apply(H, G, *tables(angles), mask_bytes(key_mask), causal, query_offset, *inputs)


def _choose(implementation: str, qkv: Tensor, K: int, mask: Tensor | None) -> str:
    """The implementation to run; RuntimeError or ValueError where the one asked for cannot."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"rope_attention: expected implementation to be one of {', '.join(IMPLEMENTATIONS)}, "
            f"got {implementation!r}."
        )
    has_kernel = qkv.dtype != torch.float64
    if implementation == "auto":
        if current_backend() == "triton":
            implementation = "triton"
        elif not runs_triton("rope_attention", qkv, has_kernel=has_kernel):
            return "reference"
        elif mask is not None:
            return "sdpa"
        else:
            return tuning.attention_implementation(arch_of(qkv), qkv.shape[1], K)
    if implementation == "triton":
        if mask is not None:
            raise ValueError(
                "rope_attention: the Triton kernels expected causal, key_mask and query_offset to say what "
                f"is visible, got a mask {tuple(mask.shape)}; 'sdpa' and 'reference' take one."
            )
        runs_triton("rope_attention", qkv, has_kernel=has_kernel, choice="triton")
        tuning.lookup_attention("rope_attention_fwd", arch_of(qkv), K, qkv.element_size(), qkv.shape[1])
    elif implementation != "reference":
        library_attention.check_available("rope_attention", implementation, qkv)
    return implementation


def _check(
    qkv: Tensor,
    H: int,
    G: int,
    positions: Tensor | None,
    mask: Tensor | None,
    key_mask: Tensor | None,
    angles: Angles | None,
    rope_theta: float | None,
) -> None:
    fits = qkv.ndim == 3 and H > 0 and H % G == 0 and qkv.shape[-1] > 0 and qkv.shape[-1] % (H + 2 * G) == 0
    if not fits or not qkv.is_floating_point():
        raise ValueError(
            "rope_attention: expected floating qkv [B, T, (H + 2G) K] with H a multiple of G and K > 0, "
            f"got {tuple(qkv.shape)} of {qkv.dtype} with H = {H} and G = {G}."
        )
    K = qkv.shape[-1] // (H + 2 * G)
    if (rope_theta is not None or angles is not None) and K % 2:
        raise ValueError(f"rope_attention: RoPE expected an even head width K, got {K}.")
    if angles is not None:
        check_angles("rope_attention", angles, qkv.shape[0], qkv.shape[1], K)
    if key_mask is not None:
        if mask is not None:
            raise ValueError("rope_attention: expected mask or key_mask, got both.")
        if key_mask.ndim != 2 or key_mask.shape[0] != qkv.shape[0] or key_mask.dtype != torch.bool:
            raise ValueError(
                f"rope_attention: expected key_mask [{qkv.shape[0]}, S] of bool, "
                f"got {tuple(key_mask.shape)} of {key_mask.dtype}."
            )
    for t in (positions, mask, key_mask, *(angles or ())):
        if t is not None and t.device != qkv.device:
            raise ValueError(
                f"rope_attention: expected all tensors on {qkv.device}, where qkv is, got {t.device}."
            )


def _check_key_mask(key_mask: Tensor, S: int) -> None:
    """The rest of the check: only a cache says how many keys there are."""
    if key_mask.shape[1] != S:
        raise ValueError(
            f"rope_attention: expected key_mask [{key_mask.shape[0]}, {S}], one entry a key, "
            f"got {tuple(key_mask.shape)}."
        )
