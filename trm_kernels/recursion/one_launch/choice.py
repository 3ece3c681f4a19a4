"""How a recursion is launched: what was asked for or what the settings table says, and what can run

"auto" goes per op where the table's regime cannot run. One that was asked for by name runs or is an error.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trm_kernels.recursion.inputs import AttentionInputs, CacheRoom, EvaluationCache, room_in
from trm_kernels.recursion.one_launch.addresses import are_in_step
from trm_kernels.recursion.one_launch.launchers import by_kind
from trm_kernels.recursion.spec import RecursionSpec
from trm_kernels.recursion.weights import AttentionWeights, LayerWeights, flat_weights
from trm_kernels.runtime import tuning
from trm_kernels.runtime.backend import runs_triton
from trm_kernels.runtime.gemm_common import are_aligned, rows_of, wants_gradient
from trm_kernels.runtime.launch import arch_of

_WIDEST_HEAD, _WIDEST_ROW = 128, 8192
_MULTIPLE = 16  # elements of a row: what Triton asks for to load 16 bytes at a time; others spill


def preferred_regime(regime: str, x: Tensor, width: int) -> str:
    """The regime asked for; for "auto" the settings table's, for tokens [B, T, ...] like x and that width."""
    B, T = x.shape[:2]
    return regime if regime != "auto" else tuning.regime(arch_of(x), B * T, T, width)


def choose_regime(
    x: Tensor,
    weights: Sequence[LayerWeights],
    scales: Sequence[LayerWeights] | None,
    spec: RecursionSpec,
    inputs: AttentionInputs,
    tensors: Sequence[Tensor],
    projections: Sequence[Tensor] = (),
) -> tuple[str, CacheRoom | None]:
    """Decides how a call is launched.

    Args:
        x: [B, T, D], or a tensor like it.
        weights: The layers' matrices.
        scales: Of weights in 8 bits.
        spec: Its `regime` is what was asked for.
        inputs: What attention reads besides.
        tensors: Inputs that may require gradients, besides the weights.
        projections: Of an injection point, [d, D] and [D, d].

    Returns:
        The regime, and where it writes its keys and values: None where it goes per op or has no cache.

    Raises:
        RuntimeError: Where what was asked for cannot run, with the reason.
    """
    regime = preferred_regime(spec.regime, x, x.shape[2])
    if regime == "per_op":
        return regime, None
    flat = [*projections, *flat_weights(weights)]
    # rows that are not aligned load slowly; while a graph is traced, addresses are not known
    is_auto = spec.regime == "auto"
    if is_auto and not torch.compiler.is_compiling() and not are_aligned(*map(rows_of, flat)):
        return "per_op", None
    why = (
        ("it has no gradient, which is wanted" if wants_gradient(*tensors, *flat) else None)
        or _why_not_here(x)
        or _why_not_these(x, weights, scales, tensors, projections)
        or _why_not_of_sizes(x, weights, spec, projections)
        or _why_not_as_asked(x, spec, inputs)
        or _why_not_at_addresses(weights, scales)
    )
    room = None
    if why is None and inputs.update_cache is not None:
        K = x.shape[2] // spec.num_heads
        room = _room(inputs.update_cache, x, spec, K, len(weights))
        why = _why_not_into(room, x)
    if why is None:
        return regime, room
    if not is_auto:
        raise RuntimeError(f"trm_recursion: the regime {regime!r} was asked for, and it cannot run: {why}.")
    return "per_op", None


def _room(
    cache: EvaluationCache | None, x: Tensor, spec: RecursionSpec, head_width: int, num_layers: int
) -> CacheRoom | None:
    """Where each evaluation writes its keys and values; with cache "last" over those of the one before."""
    slabs = spec.slabs(num_layers)
    room = room_in(cache, x, spec.num_key_value_heads, head_width, slabs)
    times = spec.evaluations(num_layers) // slabs
    if room is None or times == 1:
        return room
    if room.lengths:  # each evaluation would add the token to the one length
        return None
    return room._replace(keys=room.keys * times, values=room.values * times)


def _why_not_here(x: Tensor) -> str | None:
    if not runs_triton("trm_recursion", x, has_kernel=x.dtype != torch.float64):
        return f"the reference computes {x.dtype} tensors on {x.device} here"
    return None


def _why_not_these(
    x: Tensor,
    weights: Sequence[LayerWeights],
    scales: Sequence[LayerWeights] | None,
    tensors: Sequence[Tensor],
    projections: Sequence[Tensor],
) -> str | None:
    if not all(isinstance(w.mixer, AttentionWeights) for w in weights):
        return "it expected layers that mix tokens by attention"
    shapes = [[t.shape for t in flat_weights([w])] for w in weights]
    if any(of_layer != shapes[0] for of_layer in shapes):
        return "it expected layers of one shape"
    if mixed := [t.dtype for t in tensors if t.dtype != x.dtype]:
        return f"it expected all of its input in one dtype, got {x.dtype} and {mixed[0]}"
    in_its_dtype = [*projections, *(flat_weights(weights) if scales is None else ())]
    if any(t.dtype != x.dtype for t in in_its_dtype):
        return f"it expected weights of {x.dtype}, as x"
    return None


def _why_not_of_sizes(
    x: Tensor, weights: Sequence[LayerWeights], spec: RecursionSpec, projections: Sequence[Tensor]
) -> str | None:
    D = x.shape[2]
    K = D // spec.num_heads
    if K % 2 or K > _WIDEST_HEAD or D > _WIDEST_ROW:
        return (
            f"it expected an even head width of at most {_WIDEST_HEAD} and a width of at most {_WIDEST_ROW}, "
            f"got {K} and {D}"
        )
    widths = [*(t.shape[1] for t in projections[:1]), D, weights[0].mlp.down_proj.shape[1]]
    if any(width % _MULTIPLE for width in widths):
        return f"it expected widths that are multiples of {_MULTIPLE}, got {' and '.join(map(str, widths))}"
    return None


def _why_not_as_asked(x: Tensor, spec: RecursionSpec, inputs: AttentionInputs) -> str | None:
    if spec.cache == "last" and x.shape[1] > 1:
        return f"with cache 'last' it expected one token at a time, as decoding has it, got {x.shape[1]}"
    if inputs.attend is not None:
        return "its attention is its own, and attend was given"
    if inputs.mask is not None or spec.attention not in ("auto", "triton"):
        return "it expected causal and key_mask to say what is visible, and our own attention"
    if spec.candidate is not None:
        return f"its products are its own, and the candidate {spec.candidate!r} was asked for"
    return None


def _why_not_at_addresses(
    weights: Sequence[LayerWeights], scales: Sequence[LayerWeights] | None
) -> str | None:
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
