"""decode_attention: o = softmax(q k^T / sqrt(K), where visible) v for one query a sequence, over its cache

Shapes   q [B, H, K]; k, v [B, G, S, K] with H a multiple of G; o [B, H, K]; q and k have RoPE already.
Visible  key s to row b, when all that is given agrees: starts[b] <= s < ends[b]; key_mask[b, s] is True.
         starts [B] are left padding, ends [B] the filled part of a cache, both integer; key_mask [B, S] bool.
         A row that may attend to nothing has o = 0.
Dtypes   q, k and v of one floating dtype, o has it too; softmax and sums in float32 (float64 for float64).
Gradient that of the reference; the kernels have none, and `auto` takes the reference where one is wanted.
Errors   ValueError when sizes, dtypes or devices disagree or K is above the widest tuned head.
Source   "Flash-Decoding for long-context inference", Dao, Haziza, Massa and Sizov, 2023.

A few rows keep few programs busy, so the keys are split into parts of a fixed length, a program each: which
sums are made depends neither on the device nor on the batch. A second, small launch merges the parts in their
order. The last program to finish could do it instead, but its counter would have to be zeroed: by a launch as
well, or by state that outlives an aborted call.
"""

import math

import torch
from torch import Tensor

from trm_kernels.ops.attention.rope import rows
from trm_kernels.runtime import tuning
from trm_kernels.runtime.autocast import as_autocast
from trm_kernels.runtime.backend import current_backend, runs_triton
from trm_kernels.runtime.gemm_common import input_precision, mask_bytes
from trm_kernels.runtime.launch import arch_of, launch, launcher
from trm_kernels.runtime.optional_triton import tl, triton
from trm_kernels.runtime.precision import wide

_BLOCK_H = 16  # the fewest rows tl.dot takes


def decode_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The meaning of the op, in eager PyTorch."""
    (B, H, K), (G, S) = q.shape, k.shape[1:3]
    k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))
    keys = torch.arange(S, device=q.device)
    visible = torch.ones(B, S, dtype=torch.bool, device=q.device) if key_mask is None else key_mask
    if starts is not None:
        visible = visible & (keys >= starts[:, None])
    if ends is not None:
        visible = visible & (keys < ends[:, None])

    scores = wide(q[:, :, None] @ k.transpose(-1, -2)) * K**-0.5  # [B, H, 1, S]
    hidden = ~visible[:, None, None]
    p = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(dim=-1).masked_fill(hidden, 0.0)
    return (p.to(v.dtype) @ v)[:, :, 0]


@triton.jit
def softmax_step(o, total, highest, scores, v, PRECISION: tl.constexpr):
    """Some keys more: o, the sum of p v, and total, the sum of p, both counted from the highest score."""
    higher = tl.maximum(highest, tl.max(scores, axis=1))
    p = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(highest - higher)
    total = total * shrink + tl.sum(p, axis=1)
    o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision=PRECISION)
    return o, total, higher


@triton.jit
def _decode_attention_fwd_kernel(
    q_ptr,  # [B, H, K]
    k_ptr,  # [B, G, S, K]
    v_ptr,  # [B, G, S, K]
    starts_ptr,  # [B], or None
    ends_ptr,  # [B], or None
    seen_ptr,  # [B, S] uint8, or None
    o_ptr,  # [B, H, P, K], out: P parts, each as if its keys were all
    lse_ptr,  # [B, H, P] float32, out: log2(sum(exp2(scores))), -inf where nothing is visible
    S,
    G,
    P,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kg,
    stride_ks,
    stride_vb,
    stride_vg,
    stride_vs,
    scale,  # log2(e) / sqrt(K)
    K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,  # K, rounded up to a power of two
):
    # one program: KEYS keys of one group, for BLOCK_H of the group's heads
    CHUNKS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    part, rest = tl.program_id(0) % P, tl.program_id(0) // P
    chunk, rest = rest % CHUNKS, rest // CHUNKS
    b, g = (rest // G).to(tl.int64), (rest % G).to(tl.int64)
    offs_h, offs_k = chunk * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, WIDTH)[None, :]
    heads = g * GROUP + offs_h  # this group's; those past GROUP are padding for tl.dot
    is_head = (offs_h < GROUP)[:, None] & (offs_k < K)
    q = tl.load(
        q_ptr + b * stride_qb + heads[:, None] * stride_qh + offs_k,
        mask=is_head,
        other=0.0,
    )

    first_n = part * KEYS
    end_n = tl.minimum(first_n + KEYS, S)
    start = 0
    if starts_ptr is not None:
        start = tl.load(starts_ptr + b).to(tl.int32)
        first_n = tl.maximum(first_n, start // BLOCK_N * BLOCK_N)
    if ends_ptr is not None:
        end_n = tl.minimum(end_n, tl.load(ends_ptr + b).to(tl.int32))

    highest = tl.full((BLOCK_H,), -1e30, tl.float32)  # finite, so that -inf - highest is no NaN
    total = tl.zeros((BLOCK_H,), tl.float32)
    o = tl.zeros((BLOCK_H, WIDTH), tl.float32)
    for start_n in range(first_n, end_n, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        visible = (offs_n >= start) & (offs_n < end_n)
        row = offs_n.to(tl.int64)[:, None]
        mask = visible[:, None] & (offs_k < K)
        k = tl.load(k_ptr + b * stride_kb + g * stride_kg + row * stride_ks + offs_k, mask=mask, other=0.0)
        v = tl.load(v_ptr + b * stride_vb + g * stride_vg + row * stride_vs + offs_k, mask=mask, other=0.0)
        if seen_ptr is not None:
            visible = visible & (tl.load(seen_ptr + b * S + offs_n, mask=visible, other=0) != 0)

        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(visible[None, :], scores, float("-inf"))
        o, total, highest = softmax_step(o, total, highest, scores, v, PRECISION)

    sees = total > 0.0
    o = o / tl.where(sees, total, 1.0)[:, None]
    lse = tl.where(sees, highest + tl.log2(total), float("-inf"))
    row = (b * G * GROUP + heads) * P + part
    tl.store(o_ptr + row[:, None] * K + offs_k, o.to(o_ptr.dtype.element_ty), mask=is_head)
    tl.store(lse_ptr + row, lse, mask=offs_h < GROUP)


@triton.jit
def merge_parts(part_ptr, lse_ptr, o_ptr, m, P, K: tl.constexpr, BLOCK_P: tl.constexpr, WIDTH: tl.constexpr):
    """Row m of o = sum of 2^lse part / sum of 2^lse, the parts in their order; see the kernel below."""
    offs_p, offs_k = tl.arange(0, BLOCK_P), tl.arange(0, WIDTH)
    highest = tl.full((1,), -1e30, tl.float32)
    total = tl.zeros((1,), tl.float32)
    o = tl.zeros((WIDTH,), tl.float32)
    for start_p in range(0, P, BLOCK_P):
        in_p = start_p + offs_p < P
        row = m * P + start_p + offs_p
        lse = tl.load(lse_ptr + row, mask=in_p, other=float("-inf"))
        part = tl.load(
            part_ptr + row[:, None] * K + offs_k[None, :],
            mask=in_p[:, None] & (offs_k < K)[None, :],
            other=0.0,
        )
        higher = tl.maximum(highest, tl.max(lse, axis=0))
        weight = tl.exp2(lse - higher)
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weight, axis=0)
        o = o * shrink + tl.sum(weight[:, None] * part, axis=0)
        highest = higher
    o = o / tl.where(total > 0.0, total, 1.0)
    tl.store(o_ptr + m * K + offs_k, o.to(o_ptr.dtype.element_ty), mask=offs_k < K)


@triton.jit
def _decode_attention_merge_kernel(
    part_ptr,  # [M, P, K] float32
    lse_ptr,  # [M, P] float32
    o_ptr,  # [M, K], out
    P,
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WIDTH: tl.constexpr,  # K, rounded up to a power of two
):
    # one program: one head
    merge_parts(part_ptr, lse_ptr, o_ptr, tl.program_id(0).to(tl.int64), P, K, BLOCK_P, WIDTH)


@launcher
def _decode_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    B, H, K = q.shape[0], q.shape[1], int(q.shape[2])
    G, S = k.shape[1:3]
    row = tuning.lookup_decode(arch_of(q), K, q.element_size())
    GROUP, WIDTH = int(H) // int(G), max(16, triton.next_power_of_2(K))
    P = max(triton.cdiv(S, row.keys), 1)  # a cache without keys still has zeros to write
    o = q.new_empty(B, H, K)
    parts = o if P == 1 else q.new_empty(B, H, P, K, dtype=torch.float32)
    lse = q.new_empty(B, H, P, dtype=torch.float32)
    launch(
        _decode_attention_fwd_kernel,
        (B * G * triton.cdiv(GROUP, _BLOCK_H) * P,),
        q,
        k,
        v,
        starts,
        ends,
        key_mask,
        parts,
        lse,
        S,
        G,
        P,
        *q.stride()[:2],
        *k.stride()[:3],
        *v.stride()[:3],
        math.log2(math.e) * K**-0.5,
        K=K,
        GROUP=GROUP,
        PRECISION=input_precision(),
        KEYS=row.keys,
        BLOCK_H=_BLOCK_H,
        BLOCK_N=row.BLOCK_N,
        WIDTH=WIDTH,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
    )
    if P > 1:
        launch(
            _decode_attention_merge_kernel,
            (B * H,),
            parts,
            lse,
            o,
            P,
            K=K,
            BLOCK_P=16,
            WIDTH=WIDTH,
            num_warps=1,
            num_stages=1,
        )
    return o


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attention of one query a sequence over its cache. Its kernels have no gradient; the reference has.

    Args:
        q: [B, H, K] of any floating dtype, rotated by RoPE already.
        k: [B, G, S, K], in q's dtype, rotated; H is a multiple of G.
        v: [B, G, S, K], in q's dtype.
        starts: [B] integers, the first key that counts in each row; None for 0.
        ends: [B] integers, the end of the keys that count, exclusive; None for S.
        key_mask: [B, S] bool, False for keys that are not attended to.

    Returns:
        o, [B, H, K], in q's dtype; zero for a row that may attend to nothing.

    Raises:
        ValueError: When sizes, dtypes or devices disagree, or K is above the widest tuned head.
        RuntimeError: When the backend "triton" was asked for and a gradient is wanted.
    """
    q, k, v = as_autocast(q, k, v)
    _check(q, k, v, starts, ends, key_mask)
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if wants_gradient and current_backend() == "triton":
        raise RuntimeError(
            "decode_attention: the backend 'triton' was asked for, and its kernels have no gradient, which "
            "q, k or v require; those of rope_attention have one."
        )
    has_kernel = q.dtype != torch.float64 and not wants_gradient
    if not runs_triton("decode_attention", q, has_kernel=has_kernel):
        return decode_attention_ref(q, k, v, starts, ends, key_mask)
    return _decode_attention_fwd(rows(q), rows(k), rows(v), starts, ends, mask_bytes(key_mask))


def _check(q, k, v, starts, ends, key_mask) -> None:
    if q.ndim != 3 or k.ndim != 4 or k.shape != v.shape or k.shape[0] != q.shape[0]:
        fits = False
    else:
        fits = k.shape[3] == q.shape[2] > 0 and k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    if not fits:
        raise ValueError(
            "decode_attention: expected q [B, H, K] and k, v [B, G, S, K] with H a multiple of G, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(
            "decode_attention: expected q, k and v of one floating dtype, "
            f"got {q.dtype}, {k.dtype} and {v.dtype}."
        )
    B, S = q.shape[0], k.shape[2]
    for name, t in (("starts", starts), ("ends", ends)):
        if t is not None and (t.shape != (B,) or t.dtype not in (torch.int32, torch.int64)):
            raise ValueError(
                f"decode_attention: expected {name} [{B}] of int32 or int64, "
                f"got {tuple(t.shape)} of {t.dtype}."
            )
    if key_mask is not None and (key_mask.shape != (B, S) or key_mask.dtype != torch.bool):
        raise ValueError(
            f"decode_attention: expected key_mask [{B}, {S}] of bool, "
            f"got {tuple(key_mask.shape)} of {key_mask.dtype}."
        )
    for t in (k, v, starts, ends, key_mask):
        if t is not None and t.device != q.device:
            raise ValueError(
                f"decode_attention: expected all tensors on {q.device}, where q is, got {t.device}."
            )
