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

What can run this way says choice.py.

Errors   RuntimeError where a cooperative launch is impossible, see cooperative.py, or the grid too large.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from trm_kernels.ops.attention.rope import Angles, rope_frequencies, tables
from trm_kernels.recursion.one_launch.addresses import distances
from trm_kernels.recursion.one_launch.cooperative import Impossible, asked_for, cooperatively, warn
from trm_kernels.recursion.one_launch.grid_barrier import counter_for
from trm_kernels.recursion.one_launch.kernel import _one_launch_kernel, count_phases
from trm_kernels.recursion.one_launch.phases import STATES
from trm_kernels.recursion.weights import InjectionWeights, LayerWeights
from trm_kernels.runtime import tuning
from trm_kernels.runtime.gemm_common import input_precision, mask_bytes, rows_of
from trm_kernels.runtime.launch import arch_of, is_recording, launch, launcher
from trm_kernels.runtime.optional_triton import triton


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


class _Injected(NamedTuple):
    """What a call from inside of a language model has besides: see recursion/injection.py. h is [M, N]."""

    h: Tensor
    weights: InjectionWeights
    strength: float
    positions: Tensor | None  # [B or 1, T]
    rope_theta: float
    norms_x: bool


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
    may_fall_back: bool,
    programs: int,
) -> tuple[Tensor, Tensor]:
    """(y, z). Weights and scales lie kind by kind: all layers' qkv_proj, then o_proj, gate_up and down.

    may_fall_back   per_phase runs where a cooperative launch is impossible; else that is an error
    programs        of the grid; 0: one on each multiprocessor
    """
    y_end, z_end = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    _start(
        x,
        y,
        z,
        weights,
        scales,
        cos,
        sin,
        key_mask,
        CacheRoom(keys, values, lengths, seen),
        H,
        G,
        causal,
        eps,
        num_recursion_steps,
        num_cycles,
        regime,
        may_fall_back,
        programs,
        outputs=(y_end, z_end),
    )
    return y_end, z_end


@launcher(mutates_args=("keys", "values", "lengths"))
def _one_launch_injection(
    h: Tensor,
    in_proj: Tensor,
    out_proj: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    strength: float,
    y: Tensor,
    z: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    positions: Tensor | None,
    rope_theta: float,
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
    may_fall_back: bool,
    programs: int,
    norms_x: bool,
) -> Tensor:
    """h', of an injection point around the recursion; the rest as above."""
    blended = torch.empty_like(h, memory_format=torch.contiguous_format)
    cos, sin = None, None
    if positions is not None:
        size = (*positions.shape, y.shape[2] // H // 2)
        cos, sin = (h.new_empty(size, dtype=torch.float32) for _ in range(2))
    _start(
        h.new_empty(y.shape),
        y,
        z,
        weights,
        scales,
        cos,
        sin,
        key_mask,
        CacheRoom(keys, values, lengths, seen),
        H,
        G,
        causal,
        eps,
        num_recursion_steps,
        num_cycles,
        regime,
        may_fall_back,
        programs,
        injected=_Injected(
            h,
            InjectionWeights(in_proj, out_proj, gate_weight, gate_bias),
            strength,
            positions,
            rope_theta,
            norms_x,
        ),
        outputs=(blended,),
    )
    return blended


def _start(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    room: CacheRoom,
    H: int,
    G: int,
    causal: bool,
    eps: float,
    num_recursion_steps: int,
    num_cycles: int,
    regime: str,
    may_fall_back: bool,
    programs: int,
    *,
    injected: _Injected | None = None,
    outputs: tuple[Tensor, ...],
) -> None:
    """The launch, or the launches. outputs: y and z, or h'."""
    (B, T), D = x.shape[:2], int(x.shape[2])
    M, L = B * T, len(weights) // 4
    K, F = D // H, int(weights[3 * L].shape[1])
    E = num_cycles * (num_recursion_steps + 1) * L
    keys, values, lengths, seen = room
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

    hidden, positions, frequencies, strength = None, None, None, 1.0
    of_injection: InjectionWeights | tuple[None, ...] = (None,) * 4
    if injected is not None:
        hidden, of_injection, strength = rows_of(injected.h).contiguous(), injected.weights, injected.strength
        if injected.positions is not None:
            positions = injected.positions.contiguous()
            frequencies = _frequencies(x.device, K, injected.rope_theta)

    resident = _programs_at_once(x)
    programs = programs or resident
    if regime == "one_launch" and programs > resident:
        raise RuntimeError(
            f"trm_recursion: the regime 'one_launch' expected a grid of at most {resident} programs, which "
            f"is what {x.device} runs at once, got {programs}: they would wait for each other forever."
        )
    counts_of_parts = x.new_empty(counts, dtype=torch.int32)
    args = (
        hidden,
        *of_injection,
        positions,
        frequencies,
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
        *(outputs if injected is None else (None, None)),
        None if injected is None else outputs[0],
        x.new_empty(STATES, M, D),
        x.new_empty(STATES + 1, M, tiles, dtype=torch.float32),
        x.new_empty(M, D),
        x.new_empty(M, D),
        x.new_empty(M, F),
        x.new_empty(M, H, parts, K, dtype=torch.float32),
        x.new_empty(M, H, parts, dtype=torch.float32),
        counts_of_parts,
    )
    tokens = 0 if positions is None else positions.numel()
    masked = 0 if key_mask is None else key_mask.shape[1]
    sizes = (M, B, T, E, capacity, counts, tokens, seen, masked, keys_per_part)
    of_angles = 0 if cos is None or cos.shape[0] == 1 else cos.stride(0)
    strides = (y.stride(0), z.stride(0), of_angles, *keys[0].stride()[:3])
    meta = {
        "L": L,
        "D": D,
        "N": None if hidden is None else int(hidden.shape[1]),
        "H": H,
        "G": G,
        "K": K,
        "F": F,
        "TILES": tiles,
        "IS_CAUSAL": causal,
        "NORMS_X": injected is not None and injected.norms_x,
        "PRECISION": input_precision(),
        "BLOCK_D": triton.next_power_of_2(D),
        "BLOCK_T": triton.next_power_of_2(tiles),
        "BLOCK_J": triton.next_power_of_2(max(1, K // 2)),
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
            strength,
            **meta,
            **how,
        )

    phases = count_phases(E)

    def in_one_launch() -> None:
        counter = x.new_empty(1, dtype=torch.int32) if is_recording() else counter_for(x.device)
        try:
            cooperatively(x.device, lambda: start(counter, 0, phases, launch_cooperative_grid=True))
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
        for phase in range(phases):
            start(counts_of_parts, phase, phase + 1)  # without a barrier, so any counter will do


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
    may_fall_back: bool = False,
    programs: int = 0,
) -> tuple[Tensor, Tensor]:
    """(y, z) of trm_recursion, which checked the arguments and asked choice.py. key_mask [B, S] bool."""
    cos, sin = tables(angles)
    key_mask = mask_bytes(key_mask)
    flat, flat_scales = ([t for kind in by_kind(some) for t in kind] for some in (weights, scales or []))
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
        may_fall_back,
        programs,
    )


def one_launch_injection(
    h: Tensor,
    injection: InjectionWeights,
    strength: float,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    positions: Tensor | None,
    rope_theta: float,
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
    may_fall_back: bool = False,
    programs: int = 0,
    norms_x: bool = False,
) -> Tensor:
    """h' of trm_injection, which checked the arguments and asked choice.py. positions None: no RoPE."""
    flat, flat_scales = ([t for kind in by_kind(some) for t in kind] for some in (weights, scales or []))
    keys, values, lengths, seen = room or CacheRoom([], [], [], 0)
    return _one_launch_injection(
        h,
        injection.in_proj.contiguous(),
        injection.out_proj.contiguous(),
        injection.gate_weight,
        injection.gate_bias,
        strength,
        y,
        z,
        flat,
        flat_scales,
        positions,
        rope_theta,
        mask_bytes(key_mask),
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
        may_fall_back,
        programs,
        norms_x,
    )
