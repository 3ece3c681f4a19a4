"""The launchers of rope_attention: allocate, look up the settings, launch."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trm_kernels.ops.attention.kernels import (
    rope_attention_bwd_dkv_kernel,
    rope_attention_bwd_dq_kernel,
    rope_attention_bwd_tile_kernel,
    rope_attention_fwd_kernel,
)
from trm_kernels.ops.attention.rope import rope_fwd
from trm_kernels.runtime import tuning
from trm_kernels.runtime.gemm_common import input_precision
from trm_kernels.runtime.launch import arch_of, launch, launcher
from trm_kernels.runtime.optional_triton import triton


class AttentionContext(NamedTuple):
    """What the kernels read besides q, k and v: RoPE's table, and which keys each query may attend to.

    Attributes:
        cos: [B or 1, T, K/2] float32; None where q and k are taken as they are.
        sin: As cos.
        key_mask: [B, S] uint8, 0 for keys that no query attends to; None for none.
        causal: Whether no query attends to a key after it.
        query_offset: Keys before the first query.
    """

    cos: Tensor | None
    sin: Tensor | None
    key_mask: Tensor | None
    causal: bool
    query_offset: int


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


def fill_rope_attention(
    o: Tensor,  # [B, T, H K]
    lse: Tensor,  # [B, H, T] float32
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, S, G, K]
    v: Tensor,
    context: AttentionContext,
) -> None:
    """Fills o and lse, the base-2 logarithm of the softmax's sums."""
    B, T, H, K = q.shape
    S = k.shape[1]
    row = tuning.attention("rope_attention_fwd", arch_of(q), int(K), q.element_size(), S)
    launch(
        rope_attention_fwd_kernel,
        (triton.cdiv(T, row.BLOCK_M) * B * H,),
        q,
        k,
        v,
        context.cos,
        context.sin,
        context.key_mask,
        o,
        lse,
        T,
        S,
        H,
        context.query_offset,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        _batch_stride(context.cos),
        *o.stride()[:2],
        _log2_scale(q),
        **_meta(row, q, k, context.causal),
    )


@launcher
def rope_attention_fwd(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
    """(o, lse); see fill_rope_attention."""
    B, T, H, K = q.shape
    o, lse = q.new_empty(B, T, H * K), q.new_empty(B, H, T, dtype=torch.float32)
    fill_rope_attention(o, lse, q, k, v, context)
    return o, lse


@launcher
def rope_attention_bwd(
    do: Tensor,  # [B, T, H K]
    q: Tensor,  # [B, T, H, K], rotated
    k: Tensor,  # [B, S, G, K], rotated
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    context: AttentionContext,
    is_fused: bool,
) -> list[Tensor]:
    """The gradients of q, k and v, in one tensor or three; see _empty_gradients."""
    grads, (dq, dk, dv) = _empty_gradients(q, k, is_fused)
    delta = torch.empty_like(lse)
    _fill_dq(dq, delta, do, (q, k, v), o, lse, context)
    _fill_dkv((dk, dv), do, (q, k, v), lse, delta, context)
    return grads


def _fill_dq(
    dq: Tensor,
    delta: Tensor,  # [B, H, T] float32: sum(do * o) of each query and head
    do: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    o: Tensor,
    lse: Tensor,
    context: AttentionContext,
) -> None:
    q, k, v = qkv
    B, T, H, K = q.shape
    S = k.shape[1]
    row = tuning.attention("rope_attention_bwd_dq", arch_of(q), int(K), q.element_size(), S)
    launch(
        rope_attention_bwd_dq_kernel,
        (triton.cdiv(T, row.BLOCK_M) * B * H,),
        do,
        q,
        k,
        v,
        context.cos,
        context.sin,
        context.key_mask,
        o,
        lse,
        dq,
        delta,
        T,
        S,
        H,
        context.query_offset,
        *_input_strides(do, qkv, context),
        *o.stride()[:2],
        *dq.stride()[:3],
        _log2_scale(q),
        **_meta(row, q, k, context.causal),
    )


def _fill_dkv(
    dkv: tuple[Tensor, Tensor],
    do: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    lse: Tensor,
    delta: Tensor,
    context: AttentionContext,
) -> None:
    (dk, dv), (q, k, v) = dkv, qkv
    B, T, H, K = q.shape
    S, G = k.shape[1:3]
    row = tuning.attention("rope_attention_bwd_dkv", arch_of(q), int(K), q.element_size(), S)
    launch(
        rope_attention_bwd_dkv_kernel,
        (triton.cdiv(S, row.BLOCK_N) * B * G,),
        do,
        q,
        k,
        v,
        context.cos,
        context.sin,
        context.key_mask,
        lse,
        delta,
        dk,
        dv,
        T,
        S,
        H,
        context.query_offset,
        *_input_strides(do, qkv, context),
        *dk.stride()[:3],
        *dv.stride()[:3],
        _log2_scale(q),
        **_meta(row, q, k, context.causal),
    )


def _input_strides(
    do: Tensor, qkv: tuple[Tensor, Tensor, Tensor], context: AttentionContext
) -> tuple[int, ...]:
    q, k, v = qkv
    of_angles = _batch_stride(context.cos)
    return *do.stride()[:2], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], of_angles


@launcher
def rope_attention_bwd_tile(
    do: Tensor,  # [B, T, H K]
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, S, G, K]
    v: Tensor,
    lse: Tensor,
    context: AttentionContext,
    is_fused: bool,
) -> list[Tensor]:
    """As rope_attention_bwd, where one tile holds all queries and keys of a head."""
    B, T, H, K = q.shape
    S = k.shape[1]
    grads, (dq, dk, dv) = _empty_gradients(q, k, is_fused)
    row = tuning.attention("rope_attention_bwd_tile", arch_of(q), int(K), q.element_size(), max(T, S))
    launch(
        rope_attention_bwd_tile_kernel,
        (B * H,),
        do,
        q,
        k,
        v,
        context.cos,
        context.sin,
        context.key_mask,
        lse,
        dq,
        dk,
        dv,
        T,
        S,
        H,
        context.query_offset,
        *_input_strides(do, (q, k, v), context),
        *dq.stride()[:3],
        *dk.stride()[:3],
        *dv.stride()[:3],
        _log2_scale(q),
        **_meta(row, q, k, context.causal),
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


def rope_attention_gradients(
    do: Tensor,
    inputs: Sequence[Tensor],
    heads: tuple[int, int],
    context: AttentionContext,
    o: Tensor,
    lse: Tensor,
) -> list[Tensor]:
    """The gradients of the inputs, in one tile where that holds everything.

    Args:
        do: [B, T, H K].
        inputs: The fused projection [B, T, H + 2G, K], or q, k and v apart [B, tokens, heads, K].
        heads: H and G.
        context: As the forward was given it.
        o: [B, T, H K], of the forward.
        lse: [B, H, T] float32, of the forward.
    """
    is_fused, (H, G) = len(inputs) == 1, heads
    q, k, v = split_heads(inputs, H, G)
    tokens = max(q.shape[1], k.shape[1])
    tile = "rope_attention_bwd_tile", arch_of(q), int(q.shape[3]), q.element_size(), tokens
    if H == G and tuning.find_attention(*tile) is not None:
        grads: list[Tensor] = rope_attention_bwd_tile(do, q, k, v, lse, *context, is_fused)
    else:
        if context.cos is not None:  # once, not again for every block: in the inner loops it spills
            rotated = rope_fwd(inputs[0][:, :, : H + G], context.cos, context.sin, False)
            q, k = rotated.split((H, G), dim=2)
        grads = rope_attention_bwd(do, q, k, v, o, lse, *context, is_fused)
    return grads


def split_heads(inputs: Sequence[Tensor], H: int, G: int) -> tuple[Tensor, ...]:
    """q, k and v of the fused projection, or as they are."""
    return inputs[0].split((H, G, G), dim=2) if len(inputs) == 1 else tuple(inputs)
