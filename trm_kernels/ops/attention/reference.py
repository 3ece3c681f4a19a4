"""What rope_attention means, in eager PyTorch. Shapes, dtypes and source: rope_attention.py."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trm_kernels.ops.attention.rope import Angles, rope_ref
from trm_kernels.runtime.precision import wide

# (keys, values) of the new tokens [B, G, T, K] -> those of all tokens so far [B, G, S, K]
UpdateCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Visibility(NamedTuple):
    """Which keys each query may attend to, as rope_attention is told it."""

    mask: Tensor | None = None
    causal: bool = False
    key_mask: Tensor | None = None
    query_offset: int | None = None


def visibility(
    T: int,
    S: int,
    device: torch.device,
    mask: Tensor | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    query_offset: int | None = None,
) -> Tensor | None:
    """Which keys each query may attend to, broadcast to [B, H, T, S]; None where every query sees all.

    Args:
        T: Queries.
        S: Keys.
        device: Where the result is.
        mask: If given, the result.
        causal: No query attends to a later key.
        key_mask: [B, S] bool, False for keys that no query attends to.
        query_offset: Keys before the first query; None: the last query is at the last key.
    """
    if mask is not None:
        if mask.ndim and mask.shape[-1] not in (1, S):
            raise ValueError(f"rope_attention: expected a mask of {S} keys or 1, got {tuple(mask.shape)}.")
        return mask
    if causal:
        ahead = S - T if query_offset is None else query_offset  # by default the last query is the last key
        mask = torch.ones(T, S, dtype=torch.bool, device=device).tril(ahead)
    if key_mask is not None:
        check_number_of_keys(key_mask, S)
        keys = key_mask[:, None, None, :]
        mask = keys if mask is None else mask & keys
    return mask


def rope_attention_ref(
    qkv: Tensor,
    angles: Angles | None,
    num_heads: int,
    num_key_value_heads: int,
    visible: Visibility,
    update_cache: UpdateCache | None = None,
) -> Tensor:
    """The meaning of the op, in eager PyTorch: o [B, T, H K] of qkv [B, T, (H + 2G) K]."""
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
    mask = visibility(T, k.shape[-2], qkv.device, *visible)
    if mask is None:
        p = scores.softmax(dim=-1)
    elif mask.dtype == torch.bool:
        # the least finite number, not -inf: a row that sees nothing is uniform, no NaN, and then zero
        p = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)
        p = p.masked_fill(~mask, 0.0)
    else:
        p = (scores + mask).softmax(dim=-1)
    return (p.to(v.dtype) @ v).transpose(1, 2).reshape(B, T, H * K)


def check_number_of_keys(key_mask: Tensor, S: int) -> None:
    """Refuse a key mask that has not one entry a key: only after a cache is updated is their number known.

    Errors: ValueError with what was expected and what came.
    """
    if key_mask.shape[1] != S:
        raise ValueError(
            f"rope_attention: expected key_mask [{key_mask.shape[0]}, {S}], one entry a key, "
            f"got {tuple(key_mask.shape)}."
        )
