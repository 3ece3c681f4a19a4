"""How a recursion is launched: what was asked for or what the settings table says, and what can run

"auto" goes per op where the table's regime cannot run. One that was asked for by name runs or is an error.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trm_kernels.recursion.one_launch.addresses import are_in_step
from trm_kernels.recursion.one_launch.launchers import CacheRoom, by_kind
from trm_kernels.recursion.weights import AttentionWeights, LayerWeights
from trm_kernels.runtime import tuning
from trm_kernels.runtime.backend import runs_triton
from trm_kernels.runtime.gemm_common import are_aligned, rows_of, wants_gradient
from trm_kernels.runtime.launch import arch_of

_WIDEST_HEAD, _WIDEST_ROW = 128, 8192
_MULTIPLE = 16  # elements of a row: what Triton asks for to load 16 bytes at a time; others spill


def choose_regime(
    asked: str,
    x: Tensor,
    weights: Sequence[LayerWeights],
    scales: Sequence[LayerWeights] | None,
    inputs: Sequence[Tensor],
    find_room: Callable[[], CacheRoom | None] | None,
    *,
    num_heads: int,
    mask: Tensor | None,
    query_offset: int | None,
    attention: str,
    candidate: str | None,
    projections: Sequence[Tensor] = (),
) -> tuple[str, CacheRoom | None]:
    """(the regime, where it writes its keys and values): no room where it goes per op, or has no cache.

    asked       one of tuning.REGIMES or "auto"
    x           [B, T, D], or a tensor like it
    inputs      inputs that may require gradients, beside the weights
    find_room   of the cache; None: there is none
    projections [d, D] and [D, d], of an injection point: in x's dtype, whatever the other weights have

    Errors: RuntimeError where what was asked for cannot run, with the reason.
    """
    B, T, D = x.shape
    regime = asked if asked != "auto" else tuning.regime(arch_of(x), B * T, T, D)
    flat = [*projections, *(t for w in weights for part in w for t in part)]
    if regime == "per_op":
        return regime, None
    # rows that are not aligned load slowly; where a graph is traced, nobody knows where they lie
    if asked == "auto" and not torch.compiler.is_compiling() and not are_aligned(*map(rows_of, flat)):
        return "per_op", None
    has_gradient = wants_gradient(*inputs, *flat)
    why = _why_not(
        x,
        inputs,
        weights,
        scales,
        projections,
        num_heads,
        mask,
        query_offset,
        attention,
        candidate,
        has_gradient,
    )
    room = None
    if why is None and find_room is not None:
        room = find_room()
        why = _why_not_into(room, x)
    if why is None:
        return regime, room
    if asked != "auto":
        raise RuntimeError(f"trm_recursion: the regime {asked!r} was asked for, and it cannot run: {why}.")
    return "per_op", None


def _why_not(
    x: Tensor,
    inputs: Sequence[Tensor],
    weights: Sequence[LayerWeights],
    scales: Sequence[LayerWeights] | None,
    projections: Sequence[Tensor],
    num_heads: int,
    mask: Tensor | None,
    query_offset: int | None,
    attention: str,
    candidate: str | None,
    wants_gradient: bool,
) -> str | None:
    """Why a recursion cannot run in one launch; None: it can."""
    K = x.shape[2] // num_heads
    if wants_gradient:
        return "it has no gradient, which is wanted"
    if not runs_triton("trm_recursion", x, has_kernel=x.dtype != torch.float64):
        return f"the reference computes {x.dtype} tensors on {x.device} here"
    if not all(isinstance(w.mixer, AttentionWeights) for w in weights):
        return "it expected layers that mix tokens by attention"
    if any(
        [t.shape for part in w for t in part] != [t.shape for part in weights[0] for t in part]
        for w in weights
    ):
        return "it expected layers of one shape"
    if mixed := [t.dtype for t in inputs if t.dtype != x.dtype]:
        return f"it expected all of its input in one dtype, got {x.dtype} and {mixed[0]}"
    in_its_dtype = [*projections, *(t for w in weights for part in w for t in part if scales is None)]
    if any(t.dtype != x.dtype for t in in_its_dtype):
        return f"it expected weights of {x.dtype}, as x"
    if K % 2 or K > _WIDEST_HEAD or x.shape[2] > _WIDEST_ROW:
        return (
            f"it expected an even head width of at most {_WIDEST_HEAD} and a width of at most {_WIDEST_ROW}, "
            f"got {K} and {x.shape[2]}"
        )
    widths = [*(t.shape[1] for t in projections[:1]), x.shape[2], weights[0].mlp.down_proj.shape[1]]
    if any(width % _MULTIPLE for width in widths):
        return f"it expected widths that are multiples of {_MULTIPLE}, got {' and '.join(map(str, widths))}"
    if mask is not None or attention not in ("auto", "triton"):
        return "it expected causal and key_mask to say what is visible, and our own attention"
    if query_offset:
        return f"it counts the keys before the first query itself, and got query_offset={query_offset}"
    if candidate is not None:
        return f"its products are its own, and the candidate {candidate!r} was asked for"
    if not all(are_in_step(kind) for kind in [*by_kind(weights), *by_kind(scales or [])]):
        return "it expected weights that start at addresses of one alignment"
    return None


def _why_not_into(room: CacheRoom | None, x: Tensor) -> str | None:
    """Why a recursion in one launch cannot write into a cache; None: it can."""
    if room is None:
        return "it expected a cache whose tensors it can write to"
    first = room.keys[0]
    alike = (first.shape, first.stride(), x.dtype, x.device)
    tensors = [*room.keys, *room.values]
    if first.stride(3) != 1 or any((t.shape, t.stride(), t.dtype, t.device) != alike for t in tensors):
        return "it expected keys and values of one layout, in the dtype and on the device of x"
    if any(t.dtype != torch.int64 or t.device != x.device for t in room.lengths):
        return "it expected the lengths of a cache as int64 on the device of x"
    if not all(are_in_step(kind) for kind in (room.keys, room.values, room.lengths)):
        return "it expected the tensors of a cache to start at addresses of one alignment"
    return None
