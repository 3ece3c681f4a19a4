"""rope_attention: o = softmax(rot(q) rot(k)^T / sqrt(K), where visible) v, from the fused projection q|k|v

rot rotates each pair (u[j], u[j + K/2]) by the angle position * theta^(-2j/K): RoPE, see rope.py.

Shapes   qkv [B, T, (H + 2G) K] with H query heads, G key/value heads (H a multiple of G), head width K;
         positions [B, T] or [1, T], in tokens; S keys, S = T without a cache; o [B, T, H K].
Visible  key s to query t of row b, when all that is given agrees: key_mask[b, s] is True; with `causal`,
         s <= t + query_offset. Or `mask` alone, broadcast to [B, H, T, S]: bool (True: may attend to) or
         floating (added to the scores). A query that may attend to nothing has o = 0 and no gradient (with a
         floating mask, the softmax of equal scores).
Dtypes   qkv: any floating dtype, o has it too; angles, softmax and sums in float32 (float64 for float64).
Errors   ValueError when sizes disagree, H is no multiple of G, RoPE meets an odd K, or the implementation
         cannot do what was asked; RuntimeError when it is not there.
Source   RoPE: "RoFormer", Su et al., 2021, section 3.2. Attention: as in TRM, arXiv 2510.04871; kernels after
         "FlashAttention-2", Dao, 2023, algorithms 1 and 2, the gradient in two passes without atomics.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from trm_kernels.ops.attention import library
from trm_kernels.ops.attention.decode_attention import decode_attention
from trm_kernels.ops.attention.launchers import (
    AttentionContext,
    rope_attention_fwd,
    rope_attention_gradients,
    split_heads,
)
from trm_kernels.ops.attention.reference import (
    UpdateCache,
    Visibility,
    check_number_of_keys,
    rope_attention_ref,
    visibility,
)
from trm_kernels.ops.attention.rope import Angles, check_angles, rope, rope_angles, rows, tables
from trm_kernels.runtime import tuning
from trm_kernels.runtime.autocast import as_autocast
from trm_kernels.runtime.backend import current_backend, runs_triton
from trm_kernels.runtime.gemm_common import mask_bytes
from trm_kernels.runtime.launch import arch_of

IMPLEMENTATIONS = ("auto", "triton", *library.NAMES, "reference")


class _RopeAttention(torch.autograd.Function):
    """Over the fused projection [B, T, H + 2G, K], or over q, k and v apart [B, tokens, heads, K].

    What is applied: H, G, the fields of an AttentionContext, and the inputs.
    """

    @staticmethod
    def forward(ctx, H, G, cos, sin, key_mask, causal, query_offset, *inputs):
        context = AttentionContext(cos, sin, key_mask, causal, query_offset)
        q, k, v = split_heads(inputs, H, G)
        o, lse = rope_attention_fwd(q, k, v, *context)
        ctx.save_for_backward(cos, sin, key_mask, o, lse, *inputs)
        ctx.heads, ctx.visible = (H, G), (causal, query_offset)
        return o

    @staticmethod
    def backward(ctx, do):
        cos, sin, key_mask, o, lse, *inputs = ctx.saved_tensors
        context = AttentionContext(cos, sin, key_mask, *ctx.visible)
        grads = rope_attention_gradients(rows(do), inputs, ctx.heads, context, o, lse)
        return None, None, None, None, None, None, None, *grads


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
    """Attention with RoPE over the fused projection; differentiable.

    Args:
        qkv: [B, T, (H + 2G) K] of any floating dtype: queries, keys and values, in that order.
        positions: [B, T] or [1, T], in tokens; None counts from 0, or from query_offset.
        num_heads: H.
        num_key_value_heads: G, of which H is a multiple; None for H.
        mask: General mask, broadcast to [B, H, T, S]: bool (True: may attend to), or floating, which is added
            to the scores.
        causal: Whether no query attends to a later key.
        rope_theta: RoPE's base; None for no positions.
        update_cache: Called with the new keys (rotated) and values [B, G, T, K]; returns those of all tokens
            so far, [B, G, S, K].
        key_mask: [B, S] bool, False for keys that no query attends to; not with a general mask.
        query_offset: Keys before the first query; None: the last query is at the last key.
        angles: rope_angles(positions, K, rope_theta), for a caller with more than one call.
        implementation: "auto" takes Triton or SDPA on CUDA, by the settings table (SDPA for a general mask),
            SDPA on a CPU unless the mask is floating or qkv carries a forward-mode derivative, and the
            reference elsewhere and where backend("reference") says so. "triton": our kernels, which take no
            general mask. "reference" (the one that can be differentiated twice), or one of library.py's. One
            that was asked for by name runs or is an error.

    Returns:
        o, [B, T, H K], in qkv's dtype.

    Raises:
        ValueError: When sizes disagree, H is no multiple of G, RoPE meets an odd K, or the implementation
            cannot do what was asked.
        RuntimeError: When the implementation is not there.
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
    visible = Visibility(mask, causal, key_mask, query_offset)
    if name == "reference":
        return rope_attention_ref(qkv, angles, H, G, visible, update_cache)
    heads = rows(qkv).unflatten(-1, (H + 2 * G, K))
    if name == "triton" and update_cache is None:
        return _by_kernels((H, G), angles, visible._replace(query_offset=query_offset or 0), heads)
    return _rotated_first(name, heads, (H, G), angles, visible, update_cache)


def _rotated_first(
    name: str,
    heads: Tensor,
    counts: tuple[int, int],
    angles: Angles | None,
    visible: Visibility,
    update_cache: UpdateCache | None,
) -> Tensor:
    """Attention after RoPE: a cache keeps rotated keys, and a library takes no angles.

    heads is [B, T, H + 2G, K], counts are H and G.
    """
    (B, T, _, K), (H, G) = heads.shape, counts
    qk, v = heads.split((H + G, G), dim=2)
    q, k = (qk if angles is None else rope(qk, angles)).split((H, G), dim=2)
    if update_cache is not None:
        k, v = (t.transpose(1, 2) for t in update_cache(k.transpose(1, 2), v.transpose(1, 2)))
    S = k.shape[1]
    last = S - T if visible.query_offset is None else visible.query_offset
    visible = visible._replace(query_offset=last)
    sees_all_keys = not visible.causal or last >= S - 1  # even the first query does
    if name != "triton":
        visible = visible._replace(causal=not sees_all_keys)
        return _by_library(name, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), visible)
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if T == 1 and sees_all_keys and not wants_gradient:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return decode_attention(q[:, 0], k, v, key_mask=visible.key_mask).reshape(B, 1, H * K)
    return _by_kernels((H, G), None, visible, rows(q), rows(k), rows(v))


def _by_library(name: str, q: Tensor, k: Tensor, v: Tensor, visible: Visibility) -> Tensor:
    """o [B, T, H K] of q [B, H, T, K] and k, v [B, G, S, K], by the candidate `name`."""
    (B, H, T, K), S = q.shape, k.shape[2]
    # SDPA's own causal mask begins at the first key, flash-attn's ends at the last
    first = S - T if name == "flash_attn" else 0
    is_plain = visible.mask is None and visible.key_mask is None and visible.query_offset == first
    # a branch: of a traced length the condition is symbolic, and SDPA takes only a bool
    is_causal = True if visible.causal and is_plain and (name == "flash_attn" or S == T) else False  # noqa: SIM210
    mask = None if is_causal else visibility(T, S, q.device, *visible)
    if mask is not None and mask.ndim < 2:  # SDPA reads the last two axes
        mask = mask.expand(T, S)
    o = library.attend("rope_attention", name, q, k, v, mask, is_causal)
    return o.transpose(1, 2).reshape(B, T, H * K)


def _by_kernels(
    counts: tuple[int, int], angles: Angles | None, visible: Visibility, *inputs: Tensor
) -> Tensor:
    """By our own kernels; counts are H and G, and inputs those of _RopeAttention."""
    key_mask = visible.key_mask
    if key_mask is not None:
        check_number_of_keys(key_mask, inputs[-1].shape[1])
    assert visible.query_offset is not None
    context = AttentionContext(*tables(angles), mask_bytes(key_mask), visible.causal, visible.query_offset)
    o: Tensor = _RopeAttention.apply(*counts, *context, *inputs)
    return o


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
            return _without_kernels(qkv, mask)
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
        library.check_available("rope_attention", implementation, qkv)
    return implementation


def _without_kernels(qkv: Tensor, mask: Tensor | None) -> str:
    """SDPA makes a CPU faster by a fifth at width 64, but errs under floating masks that hide all."""
    on_cpu = qkv.device.type == "cpu" and current_backend() == "auto"
    fits = mask is None or mask.dtype == torch.bool
    return "sdpa" if on_cpu and fits and not _is_dual(qkv) else "reference"


def _is_dual(u: Tensor) -> bool:
    """Whether forward-mode derivatives are computed, which SDPA has none of on a CPU."""
    return not torch.compiler.is_compiling() and forward_ad.unpack_dual(u).tangent is not None


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
    if mask is not None:
        _check_mask(mask, (qkv.shape[0], H, qkv.shape[1]))
    for t in (positions, mask, key_mask, *(angles or ())):
        if t is not None and t.device != qkv.device:
            raise ValueError(
                f"rope_attention: expected all tensors on {qkv.device}, where qkv is, got {t.device}."
            )


def _check_mask(mask: Tensor, sizes: tuple[int, int, int]) -> None:
    """A mask is broadcast to [B, H, T, S]; S is known when the keys are, see reference.py."""
    axes = mask.shape[:-1]
    fits = len(axes) <= 3 and all(
        axis in (1, size) for axis, size in zip(axes[::-1], sizes[::-1], strict=False)
    )
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        B, H, T = sizes
        raise ValueError(
            f"rope_attention: expected a mask that is broadcast to [{B}, {H}, {T}, S], bool or floating, got "
            f"{tuple(mask.shape)} of {mask.dtype}."
        )
