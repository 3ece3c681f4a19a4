"""trm_recursion and trm_injection without gradient in one launch: their launchers, as custom ops

What is computed, shapes and dtypes: recursion/recursion.py and recursion/injection.py. Weights of layers
may also be int8 or float8_e4m3fn with one float32 scale an output channel: w = scale[:, None] * values.

Keys and values are written where they stay. With a cache that is the cache's own tensors, [B, G, capacity,
K] for each evaluation of a layer; how full they are is a number, or a number on the device for each
evaluation, to which the kernel adds its own tokens. Without a cache it is one tensor that all evaluations
share.

One token a sequence (decoding) splits long keys into parts of a fixed length; more than one does not.

    one_launch   all phases in one cooperative launch, a program on each multiprocessor
    per_phase    the same kernel, launched once a phase: the fallback, and what one_launch is held against

choice.py decides what runs this way.

Errors   RuntimeError where a cooperative launch is impossible, see cooperative.py, or the grid too large.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trm_kernels.ops.attention.rope import rope_frequencies, tables
from trm_kernels.recursion.inputs import AttentionInputs, CacheRoom
from trm_kernels.recursion.one_launch.addresses import distances
from trm_kernels.recursion.one_launch.cooperative import Impossible, asked_for, cooperatively, warn
from trm_kernels.recursion.one_launch.grid_barrier import counter_for
from trm_kernels.recursion.one_launch.kernel import count_phases, one_launch_kernel
from trm_kernels.recursion.one_launch.phases import STATES
from trm_kernels.recursion.spec import RecursionSpec
from trm_kernels.recursion.weights import InjectionPoint, InjectionWeights, LayerWeights
from trm_kernels.runtime import tuning
from trm_kernels.runtime.backend import interpreting
from trm_kernels.runtime.gemm_common import input_precision, mask_bytes, rows_of
from trm_kernels.runtime.launch import arch_of, is_recording, launch, launcher
from trm_kernels.runtime.optional_triton import triton


class LaunchOptions(NamedTuple):
    """Where and how a recursion in one launch runs, besides its spec.

    Attributes:
        room: Where keys and values are written; None for a call without a cache.
        may_fall_back: Whether per_phase runs where a cooperative launch is impossible; else that is an error.
        programs: Of the grid; 0 for one on each multiprocessor.
    """

    room: CacheRoom | None = None
    may_fall_back: bool = False
    programs: int = 0


class _Tensors(NamedTuple):
    """What both ops are given. Weights and scales lie kind by kind: all layers' qkv_proj, then o_proj, ..."""

    y: Tensor
    z: Tensor
    weights: list[Tensor]
    scales: list[Tensor]
    key_mask: Tensor | None  # [B, S] uint8
    room: CacheRoom


class _Around(NamedTuple):
    """What an injection point has besides: see recursion/injection.py."""

    h: Tensor  # [B, T, N]
    weights: InjectionWeights
    strength: float
    norms_x: bool
    positions: Tensor | None  # [B or 1, T]


@launcher(mutates_args=("keys", "values", "lengths"))
def _one_launch_recursion(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    tensors: _Tensors,
    spec: RecursionSpec,
    may_fall_back: bool,
    programs: int,
) -> tuple[Tensor, Tensor]:
    """(y, z); see LaunchOptions."""
    y_end, z_end = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    _run(_prepare(x, (cos, sin), tensors, spec, None, (y_end, z_end)), spec, may_fall_back, programs)
    return y_end, z_end


@launcher(mutates_args=("keys", "values", "lengths"))
def _one_launch_injection(
    around: _Around, tensors: _Tensors, spec: RecursionSpec, may_fall_back: bool, programs: int
) -> Tensor:
    """h', of an injection point around the recursion; see LaunchOptions."""
    h, y = around.h, tensors.y
    blended = torch.empty_like(h, memory_format=torch.contiguous_format)
    cos, sin = None, None
    if around.positions is not None:
        size = (*around.positions.shape, y.shape[2] // spec.num_heads // 2)
        cos, sin = (h.new_empty(size, dtype=torch.float32) for _ in range(2))
    x = h.new_empty(y.shape)  # the kernel fills it, and the angles
    _run(_prepare(x, (cos, sin), tensors, spec, around, (blended,)), spec, may_fall_back, programs)
    return blended


class _LaunchSizes(NamedTuple):
    """What follows from shapes and settings. Letters as in CONTRIBUTING.md."""

    B: int
    T: int
    D: int
    K: int
    F: int
    L: int  # layers
    E: int  # evaluations of a layer
    capacity: int  # of the cache, in tokens
    keys_per_part: int  # of attention
    parts: int
    counts: int  # of tiles that queries make
    tiles: int  # of a row

    @property
    def M(self) -> int:
        return self.B * self.T


class _Prepared(NamedTuple):
    """A kernel's arguments, but for what changes from launch to launch of one call."""

    device: torch.device
    pointers: tuple[Any, ...]
    counts_of_parts: Tensor
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    scalars: tuple[float, ...]
    meta: dict[str, Any]
    phases: int


def _sizes(t: _Tensors, spec: RecursionSpec, keys: Sequence[Tensor], row: tuning.OneLaunch) -> _LaunchSizes:
    (B, T), D = t.y.shape[:2], int(t.y.shape[2])
    L, H, G = len(t.weights) // 4, spec.num_heads, spec.num_key_value_heads
    capacity = keys[0].shape[2]
    keys_per_part = row.keys if T == 1 else capacity
    return _LaunchSizes(
        B,
        T,
        D,
        K=D // H,
        F=int(t.weights[3 * L].shape[1]),
        L=L,
        E=spec.evaluations(L),
        capacity=capacity,
        keys_per_part=keys_per_part,
        parts=triton.cdiv(capacity, keys_per_part),
        counts=B * G * triton.cdiv(H // G * T, row.BLOCK_Q),
        tiles=triton.cdiv(D, row.BLOCK_N),
    )


def _prepare(
    x: Tensor,
    angles: tuple[Tensor | None, Tensor | None],
    t: _Tensors,
    spec: RecursionSpec,
    around: _Around | None,
    outputs: tuple[Tensor, ...],
) -> _Prepared:
    """x [B, T, D] and the angles [B or 1, T, K/2] float32 are filled by the kernel where there is `around`.

    outputs   y and z, or h'
    """
    x, M = rows_of(x).contiguous(), t.y.shape[0] * t.y.shape[1]
    row = tuning.one_launch(arch_of(x), t.weights[0].element_size(), M)
    room = t.room if t.room.keys else _own_room(x, t, spec)
    s = _sizes(t, spec, room.keys, row)
    y, z = rows_of(t.y), rows_of(t.z)
    counts_of_parts = x.new_empty(s.counts, dtype=torch.int32)
    pointers = (
        *_of_around(x, spec, around, s),
        x,
        y,
        z,
        *_of_lists(x, angles, t, room),
        *(outputs if around is None else (None, None)),
        None if around is None else outputs[0],
        *_work(x, spec, s),
        counts_of_parts,
    )
    positions = None if around is None else around.positions
    tokens = 0 if positions is None else positions.numel()
    masked = 0 if t.key_mask is None else t.key_mask.shape[1]
    of_angles = 0 if angles[0] is None or angles[0].shape[0] == 1 else angles[0].stride(0)
    return _Prepared(
        x.device,
        pointers,
        counts_of_parts,
        (M, s.B, s.T, s.E, s.capacity, s.counts, tokens, room.seen, masked, s.keys_per_part),
        (y.stride(0), z.stride(0), of_angles, *room.keys[0].stride()[:3]),
        (math.log2(math.e) * s.K**-0.5, spec.eps, 1.0 if around is None else around.strength),
        _meta(spec, s, around, row),
        count_phases(s.E),
    )


def _own_room(x: Tensor, t: _Tensors, spec: RecursionSpec) -> CacheRoom:
    """Without a cache: one tensor of keys and one of values, which all evaluations share."""
    (B, T, D), G = t.y.shape, spec.num_key_value_heads
    keys, values = (x.new_empty(B, G, T, D // spec.num_heads) for _ in range(2))
    count = spec.evaluations(len(t.weights) // 4)
    return CacheRoom([keys] * count, [values] * count, t.room.lengths, t.room.seen)


def _of_around(
    x: Tensor, spec: RecursionSpec, around: _Around | None, s: _LaunchSizes
) -> tuple[Tensor | None, ...]:
    """The hidden state, the projections and the gate, the positions and RoPE's frequencies."""
    if around is None:
        return (None,) * 7
    positions, frequencies = None, None
    if around.positions is not None:
        assert spec.rope_theta is not None
        positions = around.positions.contiguous()
        frequencies = _frequencies(x.device, s.K, spec.rope_theta)
    return rows_of(around.h).contiguous(), *around.weights, positions, frequencies


def _of_lists(
    x: Tensor, angles: tuple[Tensor | None, Tensor | None], t: _Tensors, room: CacheRoom
) -> tuple[Tensor | None, ...]:
    """The first tensor of each list, and what the kernel's signature has between the lists."""
    L = len(t.weights) // 4
    kinds = [t.weights[i * L : (i + 1) * L] for i in range(4)]
    scale_kinds = [t.scales[i * L : (i + 1) * L] for i in range(4)] if t.scales else [[x] * L] * 4
    return (
        *(kind[0] for kind in kinds),
        *(kind[0] if t.scales else None for kind in scale_kinds),
        *angles,
        t.key_mask,
        distances([*kinds, *scale_kinds, room.keys, room.values, room.lengths]),
        room.keys[0],
        room.values[0],
        room.lengths[0] if room.lengths else None,
    )


def _work(x: Tensor, spec: RecursionSpec, s: _LaunchSizes) -> tuple[Tensor, ...]:
    """Room to work in: h, squares, q, o, a, parts and lse."""
    M, H = s.M, spec.num_heads
    return (
        x.new_empty(STATES, M, s.D),
        x.new_empty(STATES + 1, M, s.tiles, dtype=torch.float32),
        x.new_empty(M, s.D),
        x.new_empty(M, s.D),
        x.new_empty(M, s.F),
        x.new_empty(M, H, s.parts, s.K, dtype=torch.float32),
        x.new_empty(M, H, s.parts, dtype=torch.float32),
    )


def _meta(
    spec: RecursionSpec, s: _LaunchSizes, around: _Around | None, row: tuning.OneLaunch
) -> dict[str, Any]:
    """What the kernel is compiled with."""
    return {
        "L": s.L,
        "D": s.D,
        "N": None if around is None else int(around.h.shape[-1]),
        "H": spec.num_heads,
        "G": spec.num_key_value_heads,
        "K": s.K,
        "F": s.F,
        "TILES": s.tiles,
        "IS_CAUSAL": spec.causal,
        "NORMS_X": around is not None and around.norms_x,
        "PRECISION": input_precision(),
        "BLOCK_D": triton.next_power_of_2(s.D),
        "BLOCK_T": triton.next_power_of_2(s.tiles),
        "BLOCK_J": triton.next_power_of_2(max(1, s.K // 2)),
        "WIDTH": max(16, triton.next_power_of_2(s.K)),
        "ASKS_AHEAD": row.asks_ahead and not interpreting(),  # the interpreter has no assembler
        **row.meta,
    }


def _run(call: _Prepared, spec: RecursionSpec, may_fall_back: bool, programs: int) -> None:
    """The launch, or the launches; spec.regime says which."""
    regime, resident = spec.regime, _programs_at_once(call.counts_of_parts)
    programs = programs or resident
    if regime == "one_launch" and programs > resident:
        raise RuntimeError(
            f"trm_recursion: the regime 'one_launch' expected a grid of at most {resident} programs, which "
            f"is what {call.device} runs at once, got {programs}: they would wait for each other forever."
        )

    def start(counter: Tensor, from_phase: int, to_phase: int, **how: bool) -> None:
        numbers = (*call.sizes, spec.num_recursion_steps, from_phase, to_phase, *call.strides, *call.scalars)
        launch(one_launch_kernel, (programs,), *call.pointers, counter, *numbers, **call.meta, **how)

    def in_one_launch() -> None:
        device = call.device
        counter = call.counts_of_parts.new_empty(1) if is_recording() else counter_for(device)
        try:
            cooperatively(device, lambda: start(counter, 0, call.phases, launch_cooperative_grid=True))
        except Impossible:
            raise
        except BaseException:
            counter.zero_()  # it may have stopped between two barriers
            raise

    if regime == "one_launch":
        try:
            in_one_launch()
        except Impossible as why:
            if not may_fall_back:
                raise asked_for(why) from why
            warn(why)
            regime = "per_phase"
    if regime == "per_phase":
        for phase in range(call.phases):
            start(call.counts_of_parts, phase, phase + 1)  # without a barrier, so any counter will do


def _frequencies(device: torch.device, head_width: int, theta: float) -> Tensor:
    """rope_frequencies, made once: in a call that no CUDA graph captures."""
    if is_recording():
        return torch.empty(head_width // 2, dtype=torch.float32, device=device)
    return _known_frequencies(device, head_width, theta)


@cache
def _known_frequencies(device: torch.device, head_width: int, theta: float) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "trm_injection: the regime 'one_launch' expected a call before a CUDA graph is captured, in "
            "which RoPE's frequencies are made."
        )
    return rope_frequencies(head_width, theta, device)


def _programs_at_once(t: Tensor) -> int:
    """Programs that the device of `t` is sure to run together: one on each multiprocessor."""
    if is_recording() or t.device.type != "cuda":
        return tuning.MULTIPROCESSORS[arch_of(t)]
    return torch.cuda.get_device_properties(t.device).multi_processor_count


def by_kind(weights: Sequence[LayerWeights]) -> list[list[Tensor]]:
    """All layers' qkv_proj, o_proj, gate_up_proj and down_proj."""
    flat = [[t.contiguous() for part in w for t in part] for w in weights]
    return [[of_layer[kind] for of_layer in flat] for kind in range(4)]


def one_launch_recursion(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weights: tuple[Sequence[LayerWeights], Sequence[LayerWeights] | None],
    spec: RecursionSpec,
    inputs: AttentionInputs,
    options: LaunchOptions,
) -> tuple[Tensor, Tensor]:
    """(y, z) of trm_recursion, which checked the arguments and asked choice.py.

    Args:
        x: [B, T, D].
        state: y and z, [B, T, D], to start from.
        weights: The layers' matrices, and their scales where they are in 8 bits.
        spec: Its regime is "one_launch" or "per_phase".
        inputs: Of these, angles and key_mask.
        options: Where keys and values go, and the grid.
    """
    of_attention = tables(inputs.angles)
    tensors = _tensors(state, weights, inputs, options)
    y, z = _one_launch_recursion(
        x, *of_attention, *tensors, *spec.fields, options.may_fall_back, options.programs
    )
    return y, z


def one_launch_injection(
    h: Tensor,
    point: InjectionPoint,
    state: tuple[Tensor, Tensor],
    weights: tuple[Sequence[LayerWeights], Sequence[LayerWeights] | None],
    spec: RecursionSpec,
    inputs: AttentionInputs,
    options: LaunchOptions,
) -> Tensor:
    """h' of trm_injection, which checked the arguments and asked choice.py.

    Args:
        h: [B, T, N].
        point: The projections and the gate, the strength, and whether x is normed.
        state: y and z, [B, T, D], to start from.
        weights: The layers' matrices, and their scales where they are in 8 bits.
        spec: Its regime is "one_launch" or "per_phase".
        inputs: Of these, positions and key_mask.
        options: Where keys and values go, and the grid.
    """
    in_proj, out_proj, *gate = point.weights
    positions = None if spec.rope_theta is None else inputs.positions
    around = in_proj.contiguous(), out_proj.contiguous(), *gate, point.strength, point.norms_x, positions
    tensors = _tensors(state, weights, inputs, options)
    blended: Tensor = _one_launch_injection(
        h, *around, *tensors, *spec.fields, options.may_fall_back, options.programs
    )
    return blended


def _tensors(
    state: tuple[Tensor, Tensor],
    weights: tuple[Sequence[LayerWeights], Sequence[LayerWeights] | None],
    inputs: AttentionInputs,
    options: LaunchOptions,
) -> tuple[Any, ...]:
    """The leaves of _Tensors."""
    lists = ([t for kind in by_kind(some or []) for t in kind] for some in weights)
    room = options.room or CacheRoom([], [], [], 0)
    return *state, *lists, mask_bytes(inputs.key_mask), *room
