"""trm_recursion without gradient in one launch: its launcher as a custom op, and what can run this way

What is computed, shapes and dtypes: ops/recursion.py. Weights may also be int8 or float8_e4m3fn with one
float32 scale an output channel: w = scale[:, None] * values.

Keys and values are written where they stay. With a cache that is the cache's own tensors, [B, G, capacity,
K] for each evaluation of a layer; how full they are is a number, or a number on the device for each
evaluation, to which the kernel adds its own tokens. Without a cache it is one tensor that all evaluations
share.

One token a sequence (decoding) splits long keys into parts of a fixed length; more than one does not.

    one_launch   all phases in one cooperative launch, a program on each multiprocessor
    per_phase    the same kernel, launched once a phase: the fallback, and what one_launch is held against

Errors   RuntimeError for a regime that cannot run, with the reason.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trm_kernels import tuning
from trm_kernels.backend import runs_triton
from trm_kernels.launch import arch_of, is_recording, launch, launcher
from trm_kernels.ops.one_launch.addresses import are_in_step, distances
from trm_kernels.ops.one_launch.grid_barrier import counter_for
from trm_kernels.ops.one_launch.kernel import _one_launch_kernel, count_phases
from trm_kernels.ops.one_launch.phases import STATES
from trm_kernels.ops.rope import Angles, tables
from trm_kernels.ops.weights import AttentionWeights, LayerWeights
from trm_kernels.optional_triton import triton
from trm_kernels.products import as_autocast, input_precision, mask_bytes, rows_of

_WIDEST_HEAD, _WIDEST_ROW = 128, 8192


class CacheRoom(NamedTuple):
    """Where a call writes its keys and values: one tensor each for every evaluation of a layer.

    keys, values   [B, G, capacity, K], with room after the tokens they hold
    lengths        [] int64 each: the tokens they hold, to which the kernel adds its own; or none, and then
    seen           so many
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: list[Tensor]
    seen: int


@launcher(mutates_args=("keys", "values", "lengths"))
def _one_launch_recursion(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    keys: list[Tensor],
    values: list[Tensor],
    lengths: list[Tensor],
    seen: int,
    H: int,
    G: int,
    causal: bool,
    eps: float,
    num_recursion_steps: int,
    num_cycles: int,
    regime: str,
    programs: int,
) -> tuple[Tensor, Tensor]:
    """(y, z). Weights and scales lie kind by kind: all layers' qkv_proj, then o_proj, gate_up and down.

    programs   of the grid; 0: one on each multiprocessor
    """
    (B, T), D = x.shape[:2], int(x.shape[2])
    M, L = B * T, len(weights) // 4
    K, F = D // H, int(weights[3 * L].shape[1])
    E = num_cycles * (num_recursion_steps + 1) * L
    if not keys:
        keys, values = ([t] * E for t in (x.new_empty(B, G, T, K), x.new_empty(B, G, T, K)))
    capacity = keys[0].shape[2]
    row = tuning.one_launch(arch_of(x), weights[0].element_size(), M)
    tiles = triton.cdiv(D, row.BLOCK_N)
    keys_per_part = row.keys if T == 1 else capacity
    parts = triton.cdiv(capacity, keys_per_part)
    counts = B * G * triton.cdiv(H // G * T, row.BLOCK_Q)
    x, y, z = rows_of(x).contiguous(), rows_of(y), rows_of(z)
    kinds = [weights[i * L : (i + 1) * L] for i in range(4)]
    scale_kinds = [scales[i * L : (i + 1) * L] for i in range(4)] if scales else [[x] * L] * 4
    scale_of = [kind[0] if scales else None for kind in scale_kinds]
    y_end, z_end = torch.empty_like(x), torch.empty_like(x)

    resident = _programs_at_once(x)
    programs = programs or resident
    if regime == "one_launch" and programs > resident:
        raise RuntimeError(
            f"trm_recursion: the regime 'one_launch' expected a grid of at most {resident} programs, which "
            f"is what {x.device} runs at once, got {programs}: they would wait for each other forever."
        )
    counts_of_parts = x.new_empty(counts, dtype=torch.int32)
    args = (
        x,
        y,
        z,
        *(kind[0] for kind in kinds),
        *scale_of,
        cos,
        sin,
        key_mask,
        distances([*kinds, *scale_kinds, keys, values, lengths]),
        keys[0],
        values[0],
        lengths[0] if lengths else None,
        y_end,
        z_end,
        x.new_empty(STATES, M, D),
        x.new_empty(STATES, M, tiles, dtype=torch.float32),
        x.new_empty(M, D),
        x.new_empty(M, D),
        x.new_empty(M, F),
        x.new_empty(M, H, parts, K, dtype=torch.float32),
        x.new_empty(M, H, parts, dtype=torch.float32),
        counts_of_parts,
    )
    sizes = (M, B, T, E, capacity, counts, seen, 0 if key_mask is None else key_mask.shape[1], keys_per_part)
    of_angles = 0 if cos is None or cos.shape[0] == 1 else cos.stride(0)
    strides = (y.stride(0), z.stride(0), of_angles, *keys[0].stride()[:3])
    meta = {
        "L": L,
        "D": D,
        "H": H,
        "G": G,
        "K": K,
        "F": F,
        "TILES": tiles,
        "IS_CAUSAL": causal,
        "PRECISION": input_precision(),
        "BLOCK_D": triton.next_power_of_2(D),
        "BLOCK_T": triton.next_power_of_2(tiles),
        "WIDTH": max(16, triton.next_power_of_2(K)),
        **row.meta,
    }

    def start(counter: Tensor, from_phase: int, to_phase: int, **how: bool) -> None:
        numbers = (*sizes, num_recursion_steps, from_phase, to_phase, *strides)
        launch(
            _one_launch_kernel,
            (programs,),
            *args,
            counter,
            *numbers,
            math.log2(math.e) * K**-0.5,
            eps,
            **meta,
            **how,
        )

    phases = count_phases(E)
    if regime == "per_phase":
        for phase in range(phases):
            start(counts_of_parts, phase, phase + 1)  # without a barrier, so any counter will do
    else:
        counter = x.new_empty(1, dtype=torch.int32) if is_recording() else counter_for(x.device)
        try:
            start(counter, 0, phases, launch_cooperative_grid=True)
        except BaseException:
            counter.zero_()  # it may have stopped between two barriers
            raise
    shape = B, T, D
    return y_end.view(shape), z_end.view(shape)


def _programs_at_once(t: Tensor) -> int:
    """Programs that the device of `t` is sure to run together: one on each multiprocessor."""
    if is_recording() or t.device.type != "cuda":
        return tuning.MULTIPROCESSORS[arch_of(t)]
    return torch.cuda.get_device_properties(t.device).multi_processor_count


def why_not(
    x: Tensor,
    weights: Sequence[LayerWeights],
    scales: Sequence[LayerWeights] | None,
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
    if as_autocast(x)[0].dtype != x.dtype:
        return "torch.autocast is on, which would cast the weights in every call"
    if scales is None and any(t.dtype != x.dtype for w in weights for part in w for t in part):
        return f"it expected weights of {x.dtype}, as x"
    if K % 2 or K > _WIDEST_HEAD or x.shape[2] > _WIDEST_ROW:
        return (
            f"it expected an even head width of at most {_WIDEST_HEAD} and a width of at most {_WIDEST_ROW}, "
            f"got {K} and {x.shape[2]}"
        )
    if mask is not None or attention not in ("auto", "triton"):
        return "it expected causal and key_mask to say what is visible, and our own attention"
    if query_offset:
        return f"it counts the keys before the first query itself, and got query_offset={query_offset}"
    if candidate is not None:
        return f"its products are its own, and the candidate {candidate!r} was asked for"
    if not all(are_in_step(kind) for kind in [*_by_kind(weights), *_by_kind(scales or [])]):
        return "it expected weights that start at addresses of one alignment"
    return None


def why_not_into(room: CacheRoom | None, x: Tensor) -> str | None:
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


def _by_kind(weights: Sequence[LayerWeights]) -> list[list[Tensor]]:
    """All layers' qkv_proj, o_proj, gate_up_proj and down_proj."""
    flat = [[t.contiguous() for part in w for t in part] for w in weights]
    return [[of_layer[kind] for of_layer in flat] for kind in range(4)]


def one_launch_recursion(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    angles: Angles | None,
    key_mask: Tensor | None,
    room: CacheRoom | None,
    *,
    scales: Sequence[LayerWeights] | None = None,
    num_heads: int,
    num_key_value_heads: int,
    causal: bool,
    eps: float,
    num_recursion_steps: int,
    num_cycles: int,
    regime: str,
    programs: int = 0,
) -> tuple[Tensor, Tensor]:
    """(y, z) of trm_recursion, which checked the arguments and asked `why_not`. key_mask [B, S] bool."""
    cos, sin = tables(angles)
    key_mask = mask_bytes(key_mask)
    flat, flat_scales = ([t for kind in _by_kind(some) for t in kind] for some in (weights, scales or []))
    keys, values, lengths, seen = room or CacheRoom([], [], [], 0)
    return _one_launch_recursion(
        x,
        y,
        z,
        flat,
        flat_scales,
        cos,
        sin,
        key_mask,
        keys,
        values,
        lengths,
        seen,
        num_heads,
        num_key_value_heads,
        causal,
        eps,
        num_recursion_steps,
        num_cycles,
        regime,
        programs,
    )
