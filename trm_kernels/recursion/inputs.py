"""What the attention of a recursion reads besides its tokens: positions, masks, and a cache it may fill."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trm_kernels.ops.attention.rope import Angles

# (evaluation, qkv [B, T, (H + 2G) K]) -> o [B, T, H K], see ops/attention/rope_attention.py
Attend = Callable[[int, Tensor], Tensor]


class EvaluationCache(Protocol):
    """Keeps keys and values; a function of this form does.

    Evaluations of a layer are counted from 0: cycle by cycle, step by step, layer by layer.

    One that can be written to in place also has two methods. `room(x, num_key_value_heads, head_width,
    evaluations)` returns the tensors for the keys and values of x's tokens, a CacheRoom, or None where it
    cannot. `written(tokens)` is called after that many were written to them.

    One for a recursion with cache "last" has `so_far(slab)`: the keys and values [B, G, S, K] that it keeps
    of a layer, and None where there are none yet. Such a cache has one slab a layer. One of a row of many
    sequences has instead `rounds(T, device)`, which tokens of the row [N] go together, round after round, and
    `write(slab, tokens, keys, values)`, which writes those over what it has of them, and returns all.
    """

    def __call__(self, evaluation: int, keys: Tensor, values: Tensor, /) -> tuple[Tensor, Tensor]:
        """Keeps the keys and values of some tokens [B, G, T, K]; returns those of all so far."""


class CacheRoom(NamedTuple):
    """Where a call writes its keys and values: one tensor each for every evaluation of a layer.

    Attributes:
        keys: [B, G, capacity, K] each, with room after the tokens they hold.
        values: As keys.
        lengths: [] int64 each, on the device: the tokens they hold, to which the kernel adds its own. Or
            none, and then `seen` says it.
        seen: Tokens that they hold.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: list[Tensor]
    seen: int


class AttentionInputs(NamedTuple):
    """What the attention of a recursion reads besides its tokens' projections.

    Attributes:
        positions: [B, T] or [1, T], in tokens, for RoPE; None counts from 0.
        angles: RoPE's table of these positions, for a caller with more than one call.
        mask: General, see ops/attention/rope_attention.py.
        key_mask: [B, S] bool, False for keys that no query attends to.
        update_cache: Keeps the keys and values of every evaluation of a layer.
        attend: Does the whole attention of every evaluation, RoPE included, instead of ours: a server's, with
            its own cache. Nothing else of these inputs is read then. For cache "last" it has the `rounds` of
            an EvaluationCache, and `of_tokens(slab, tokens, qkv)` is called in place of itself.
    """

    positions: Tensor | None = None
    angles: Angles | None = None
    mask: Tensor | None = None
    key_mask: Tensor | None = None
    update_cache: EvaluationCache | None = None
    attend: Attend | None = None


def room_in(cache: EvaluationCache | None, *what: Any) -> CacheRoom | None:
    """Where a cache lets a call write; None where it cannot."""
    find = getattr(cache, "room", None)
    return None if find is None else find(*what)  # torch 2.11 does not trace whether a method is true


def check_key_mask(key_mask: Tensor | None, x: Tensor, room: CacheRoom | None = None) -> None:
    """Refuse a mask of another shape or dtype. Errors: ValueError with what was expected and what came."""
    if key_mask is None:
        return
    B, S = x.shape[0], x.shape[1]
    if room is not None:  # where only the device knows how many keys there are, the mask may have any length
        S = key_mask.shape[1] if room.lengths else S + room.seen
    if key_mask.shape != (B, S) or key_mask.dtype != torch.bool:
        raise ValueError(
            f"trm_recursion: expected key_mask {(B, S)} of bool, "
            f"got {tuple(key_mask.shape)} of {key_mask.dtype}."
        )
