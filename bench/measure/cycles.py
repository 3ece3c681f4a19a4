"""Cycles of a kernel on one multiprocessor, predicted from its machine code. No GPU needed, none was asked.

A multiprocessor has four units that a kernel can be waiting for:

    tensor    the tensor cores
    shared    shared memory: 128 bytes a cycle, what tensor cores read there included
    issue     four instructions a cycle
    special   exponentials, roots and the like: 16 a cycle

Each instruction of the main loop (the loop that multiplies, once around) and of the rest of the kernel
counts for its units, for all warps of a block. A block alone needs the busiest unit's cycles of each time
around, not less than its loads take, and before and after the loop what it issues, and the way to memory and
back. Where the loop takes exponentials, its products wait for them and they for the products: both count.
Blocks that share a multiprocessor fill each other's waits. Of the busiest unit REACHED is reached.

Rates are those of NVIDIA's white papers and of "Benchmarking and Dissecting the Nvidia Hopper GPU
Architecture via Microbenchmarking", Luo et al., 2024. REACHED is what makes of cuBLAS's tile, 128 x 256 x 64,
the 730 TFLOPS that are commonly reported for it on an H100.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from trm_kernels.export.compile import Compiled
from trm_kernels.export.machine_code import Instruction, instructions, loops

REACHED = 0.82  # of the busiest unit of a loop
LATENCY = 700  # cycles from a load of device memory to its data


@dataclass(frozen=True)
class Multiprocessor:
    """What one holds and does."""

    count: int  # on a card
    products: int  # multiply-adds a cycle by mma; wgmma's are read from its name
    shared: int  # bytes, for all blocks
    warps: int
    registers: int = 65536


# mma on sm90 reaches 62% of what wgmma does (Luo et al.)
MULTIPROCESSORS = {
    "sm80": Multiprocessor(108, 1024, 164 << 10, 64),
    "sm89": Multiprocessor(128, 256, 100 << 10, 48),
    "sm90": Multiprocessor(132, 1270, 228 << 10, 64),
}


class Cycles(NamedTuple):
    """Of each unit, for one block."""

    tensor: float
    shared: float
    issue: float
    special: float

    def plus(self, other: "Cycles", times: float) -> "Cycles":
        """This and `times` as much of the other."""
        return Cycles(*(a + times * b for a, b in zip(self, other, strict=True)))

    def alone(self, waits: bool) -> float:
        """Until one block is done: the busiest unit's or, where products and the rest wait, both in turn."""
        if waits:
            return max(self.tensor, self.shared) + max(self.issue, self.special)
        return max(self)


@dataclass(frozen=True)
class KernelCost:
    """A kernel that multiplies: cycles of a block, and how many blocks share a multiprocessor."""

    loop: Cycles  # once around the main loop; zeros where there is none
    rest: Cycles  # once
    waits: bool  # products and exponentials wait for each other
    blocks: int
    stages: int  # of the loop's loads

    def of_blocks(self, together: int, rounds: float) -> float:
        """Cycles until as many blocks are done that started together, each `rounds` times around."""
        once_around = max(self.loop.alone(self.waits) / REACHED, LATENCY / max(1, self.stages - 1))
        alone = 2 * LATENCY + rounds * once_around + self.rest.alone(self.waits and not rounds)
        return max(alone, together * max(self.rest.plus(self.loop, rounds)) / REACHED)

    def of_grid(self, programs: int, rounds: float, multiprocessors: int) -> float:
        """Cycles until all programs are done: full waves, and what is left."""
        full, left = divmod(programs, multiprocessors * self.blocks)
        last = self.of_blocks(-(-left // multiprocessors), rounds) if left else 0.0
        return full * self.of_blocks(self.blocks, rounds) + last


@cache
def kernel_cost(kernel: Compiled, stages: int) -> KernelCost | None:
    """The cost of a compiled kernel; None of one that does not multiply."""
    code = instructions(kernel.cubin)
    if not any(is_product(now) for now in code):
        return None
    bodies = [body for body in loops(code) if any(is_product(code[i]) for i in body)]
    # the shortest of what multiplies most, for waits for a descriptor's copy jump back from the end
    inside = max(
        bodies, key=lambda body: (sum(is_product(code[i]) for i in body), -len(body)), default=range(0)
    )
    loop = [code[i] for i in inside]
    rest = [now for i, now in enumerate(code) if i not in inside and now.name != "NOP"]
    waits = any(now.text.startswith("MUFU.EX2") for now in loop or rest)
    units = cycles_of(loop, kernel), cycles_of(rest, kernel)
    return KernelCost(*units, waits, blocks_together(kernel), stages)


def blocks_together(kernel: Compiled) -> int:
    """Blocks that fit on one multiprocessor at a time: by registers, shared memory and warps."""
    sm = MULTIPROCESSORS[kernel.arch]
    of_a_warp = -(-kernel.registers // 8) * 8 * 32  # registers are given to warps, 256 at a time
    by_registers = sm.registers // of_a_warp // kernel.num_warps
    by_shared = sm.shared // (kernel.shared + 1024)  # the system takes a kilobyte of each block
    return max(1, min(by_registers, by_shared, sm.warps // kernel.num_warps))


def is_product(now: Instruction) -> bool:
    return now.name in ("HGMMA", "HMMA")


def cycles_of(code: Iterable[Instruction], kernel: Compiled) -> Cycles:
    """Of a block that runs these instructions once, in all its warps."""
    total = Cycles(0.0, 0.0, 0.0, 0.0)
    for now in code:
        if now.name in ("UTMALDG", "UTMASTG"):  # one thread copies for all warps
            total = total.plus(Cycles(0.0, _bytes_of_a_factor(kernel) / 128, 0.25, 0.0), 1)
        else:
            total = total.plus(_of_a_warp(now, MULTIPROCESSORS[kernel.arch]), kernel.num_warps)
    return total


_DESCRIPTOR = re.compile(r"tensordesc<\D+(\d+)\[(\d+), *(\d+)\]")


def _bytes_of_a_factor(kernel: Compiled) -> float:
    """Of a tile that is copied by its descriptor: the mean of both factors', as the listing does not say."""
    found = [_DESCRIPTOR.match(kind) for kind in kernel.signature]
    tiles = [int(m[1]) * int(m[2]) * int(m[3]) / 8 for m in found if m]
    return sum(tiles[:2]) / 2


_WGMMA = re.compile(r"HGMMA\.64x(\d+)x(\d+)\S* R\d+, (R\d+)?")


def _of_a_warp(now: Instruction, sm: Multiprocessor) -> Cycles:
    """Of one warp, or of a quarter of a warpgroup, that runs an instruction."""
    tensor = shared = special = 0.0
    if now.name == "HGMMA":
        found = _WGMMA.match(now.text)
        assert found, f"not known: {now.text}"
        columns, depth = int(found[1]), int(found[2])
        tensor = 64 * columns * depth / 2048 / 4
        from_shared = columns * depth * 2 + (0 if found[3] else 64 * depth * 2)  # or rows are in registers
        shared = from_shared / 128 / 4
    elif now.name == "HMMA":
        depth = 8 if ".1688" in now.text else 16
        tensor = 16 * 8 * depth / sm.products
    elif now.name in ("LDSM", "STSM"):
        shared = float(now.text.split()[0].rpartition(".")[2]) if now.text.split()[0][-1] in "24" else 1.0
    elif now.name in ("LDS", "STS", "LDGSTS"):
        name = now.text.split()[0]
        shared = 4.0 if ".128" in name else 2.0 if ".64" in name else 1.0
    elif now.name == "SHFL":
        shared = 1.0
    elif now.name == "MUFU":
        special = 2.0
    return Cycles(tensor, shared, 0.25, special)
