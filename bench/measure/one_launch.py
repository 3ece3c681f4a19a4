"""Seconds of a recursion in one launch, predicted phase by phase from its machine code: see predicted.py

A phase of products shares its tiles out among the programs. It takes the longest of

    bytes     of its weights through device memory
    units     of the program with the most tiles: of each tile the busiest unit's cycles, as in cycles.py
    loads     of that program: rounds of a tile times the way to memory, by the loads that are on their way at
              a time; or what a multiprocessor can take from the second-level cache

and before it stands a BARRIER and, where the weights were not asked for ahead, the way to memory. What was
asked for comes while the barrier is waited for. None of it is a measurement.
"""

import re
from typing import Any, NamedTuple

from bench.measure.cycles import LATENCY, MULTIPROCESSORS, REACHED, cycles_of, is_product
from bench.measure.roofline import CARDS
from trm_kernels.export.compile import Compiled, compile_for
from trm_kernels.export.machine_code import Instruction, cuobjdump, instructions, loops
from trm_kernels.recursion.one_launch.products import LINE, LINES
from trm_kernels.runtime.launch import Launch

BARRIER = 1.3e-6  # seconds, assumed
NEAR = 270  # cycles from a load of what is in the second-level cache to its data (Luo et al., 2024)
PORT = 64  # bytes a cycle that a multiprocessor takes from there
# of a function: address, length, and a name that ends in module and phase
_SYMBOL = re.compile(
    r"0x([0-9a-f]+)\s+0x([0-9a-f]+)\s+0x\w+\s+0\s+0x\w+\s+\$\S*?_\$_phases_\$_(\w+?)_phase__"
)


class LaunchPhase(NamedTuple):
    """A phase of products."""

    name: str
    weights: int  # rows of the weight in a tile, in blocks of BLOCK_N: 2 where two products are taken at once
    columns: int  # of the result, all tiles together
    summed: int


def seconds(call: Launch, card: str, arch: str, clock: float) -> float:
    """Of one launch of one_launch_kernel."""
    a = dict(zip(call.kernel.arg_names, call.args, strict=False)) | call.meta
    kernel = compile_for(call, arch)
    bodies = functions(kernel)
    rate, sms = CARDS[card].bytes_per_s, MULTIPROCESSORS[arch].count
    D, HK, size = a["D"], a["H"] * a["K"], a["down_proj_ptr"].element_size()
    products = (
        LaunchPhase("project", 2, (a["H"] + 2 * a["G"]) * a["K"] // 2, D),
        LaunchPhase("mix", 1, D, HK),
        LaunchPhase("gate_up", 2, a["F"], D),
        LaunchPhase("down", 1, D, a["F"]),
    )
    total = 0.0
    for phase in products:
        tiles = -(-a["M"] // a["BLOCK_M"]) * -(-phase.columns // a["BLOCK_N"])
        of_program, rounds = -(-tiles // sms), -(-phase.summed // a["BLOCK_K"])
        row_bytes = phase.weights * a["BLOCK_N"] * size
        at_most = max(rounds * LATENCY / (a["num_stages"] - 1), row_bytes * phase.summed / PORT)
        busy = _of_tile(bodies, kernel, phase.name, rounds, a["L"]) / REACHED
        moved = phase.weights * phase.columns * phase.summed * size / rate
        first = LATENCY
        if a["ASKS_AHEAD"]:
            of_a_row = min(phase.summed * size, LINES.value * LINE.value)
            asked = min(tiles, sms) * phase.weights * a["BLOCK_N"] * of_a_row / rate
            moved, first = moved - min(asked, BARRIER), NEAR
        chain = of_program * (first + max(busy, at_most)) / clock
        total += BARRIER + max(chain, moved + first / clock)
    total += BARRIER + _attention(a, bodies, kernel, rate, sms, clock)
    of_evaluations = a["E"] * total
    if a["N"] is None:
        return of_evaluations
    return of_evaluations + 2 * (BARRIER + LATENCY / clock + D * a["N"] * a["w_in_ptr"].element_size() / rate)


def _attention(
    a: dict[str, Any],
    bodies: dict[str, list[Instruction]],
    kernel: Compiled,
    rate: float,
    sms: int,
    clock: float,
) -> float:
    """The keys and values through memory, or the program with the most tasks."""
    keys = a["S"] if a["T"] == 1 else a["seen"] + a["T"]
    parts = -(-keys // a["keys_per_part"])
    tasks = a["B"] * a["G"] * -(-(a["H"] // a["G"] * a["T"]) // a["BLOCK_Q"]) * parts
    rounds = -(-min(keys, a["keys_per_part"]) // a["BLOCK_S"])
    busy = _of_tile(bodies, kernel, "attention", rounds, 1) / REACHED
    chain = -(-tasks // sms) * (2 * LATENCY + max(busy, rounds * LATENCY / (a["num_stages"] - 1))) / clock
    moved = 2 * a["B"] * a["G"] * keys * a["K"] * a["k_ptr"].element_size() / rate
    return max(chain, moved + 2 * LATENCY / clock)


def functions(kernel: Compiled) -> dict[str, list[Instruction]]:
    """The instructions of each phase, which is a function of its own, by the symbols of the machine code."""
    code = instructions(kernel.cubin)
    found = {}
    for start, length, name in _SYMBOL.findall(cuobjdump(kernel.cubin, "-elf")):
        first = int(start, 16)
        found[name] = [now for now in code if first <= now.address < first + int(length, 16)]
    return found


def _of_tile(
    bodies: dict[str, list[Instruction]], kernel: Compiled, name: str, rounds: int, layers: int
) -> float:
    """Cycles of the busiest unit for a tile.

    Of `project` the listing has two branches: the first layer's, whose rows are formed as they are read, and
    the others', which is the product of `gate_up`.
    """
    inner, is_unrolled = _innermost(bodies[name])
    if name == "project":
        first = max(cycles_of(inner, kernel)) * rounds
        others = _of_tile(bodies, kernel, "gate_up", rounds, layers)
        return (first + (layers - 1) * others) / layers
    return max(cycles_of(inner, kernel)) * (1 if is_unrolled else rounds)


def _innermost(code: list[Instruction]) -> tuple[list[Instruction], bool]:
    """The smallest loop that multiplies, and whether it is the one over tiles, its rounds being unrolled."""
    found = [body for body in loops(code) if any(is_product(code[i]) for i in body)]
    assert found, "a phase without a loop that multiplies"
    smallest = min(found, key=len)
    inside = [body for body in found if body.start <= smallest.start and smallest.stop <= body.stop]
    return [code[i] for i in smallest], len(inside) == 1
