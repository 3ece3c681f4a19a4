"""Reads machine code of sm_90: what orders the tensor cores' reads of shared memory, and writes to it.

A warpgroup is four warps. It multiplies tiles of shared memory that other warpgroups read as well, and it
waits for its own products alone. So a barrier of the whole block has to stand between that wait and the next
write to those tiles. Triton 3.7.1 can leave it out: https://github.com/triton-lang/triton/issues/11047. Which
tile a write goes to cannot be read here; a write to another one needs no barrier.
"""

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_WRITES = ("STS", "STSM", "LDGSTS", "UTMALDG", "ATOMS")
_ENDS = ("EXIT", "RET")
_LISTING = "listing.sass"


@dataclass(frozen=True)
class Instruction:
    """One line of the listing."""

    address: int
    is_conditional: bool
    name: str  # without its suffixes: "LDGSTS" of LDGSTS.E.BYPASS.128
    text: str


class _Tiles(NamedTuple):
    """What this warpgroup knows of the tiles that tensor cores read."""

    are_being_read: bool  # by products of its own that it has not waited for
    may_be_read: bool  # by those of other warpgroups: its own are done, and no barrier stood since


def cuobjdump(cubin: bytes, option: str) -> str:
    """What cuobjdump prints of a compiled kernel: "-sass" its listing, "-res-usage" what it takes."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@lru_cache(maxsize=4)  # what compiles a kernel asks for it, and then what counts its cycles
def instructions(cubin: bytes) -> list[Instruction]:
    """The listing of a compiled kernel, in the order of its addresses."""
    return parsed(_listing(cubin))


def _listing(cubin: bytes) -> str:
    """What cuobjdump lists, kept in Triton's cache: a kernel of wgmma takes it half a second."""
    import triton
    from triton.runtime.cache import get_cache_manager

    kept = get_cache_manager(hashlib.sha256(cubin + triton.__version__.encode()).hexdigest())
    if path := kept.get_file(_LISTING):
        return Path(path).read_text()
    listing = cuobjdump(cubin, "-sass")
    kept.put(listing, _LISTING, binary=False)
    return listing


def parsed(listing: str) -> list[Instruction]:
    """The instructions of a listing as cuobjdump prints it."""
    return [
        Instruction(int(address, 16), bool(predicate), name.partition(".")[0], f"{name} {rest}".strip())
        for address, predicate, name, rest in _INSTRUCTION.findall(listing)
    ]


def loops(code: list[Instruction]) -> list[range]:
    """Places of the instructions of each loop: from where a jump leads back to, to the jump."""
    places = {instruction.address: i for i, instruction in enumerate(code)}
    found = []
    for i, now in enumerate(code):
        target = _TARGET.search(now.text) if now.name == "BRA" else None
        if target and (first := places.get(int(target[1], 16), len(code))) < i:
            found.append(range(first, i + 1))
    return found


def unguarded_writes(code: list[Instruction]) -> list[int]:
    """Addresses of writes to shared memory that may come before another warpgroup has read what is there."""
    places = {instruction.address: i for i, instruction in enumerate(code)}
    seen: set[tuple[int, _Tiles]] = set()
    todo = [(0, _Tiles(False, False))]
    found = set()
    while todo:
        place, tiles = todo.pop()
        if place >= len(code) or (place, tiles) in seen:
            continue
        seen.add((place, tiles))
        now = code[place]
        if now.name in _WRITES and tiles.may_be_read:
            found.add(now.address)
        tiles = _after(now, tiles)
        is_jump = now.name == "BRA"
        if is_jump and (target := _TARGET.search(now.text)):
            todo.append((places[int(target[1], 16)], tiles))
        if now.is_conditional or "P" in now.text.partition(",")[0][4:] or not (is_jump or now.name in _ENDS):
            todo.append((place + 1, tiles))
    return sorted(found)


def copies_without_fence(code: list[Instruction]) -> bool:
    """Whether wgmma reads tiles that were copied asynchronously, and no fence orders the copies before it.

    The copies and wgmma reach shared memory in two ways (PTX: the generic and the async proxy), which only
    `fence.proxy.async` orders. Triton 3.6 puts none, 3.7 does.
    """
    names = {now.name for now in code}
    return {"HGMMA", "LDGSTS"} <= names and not any("FENCE.VIEW.ASYNC" in now.text for now in code)


def _after(now: Instruction, tiles: _Tiles) -> _Tiles:
    """What is known behind an instruction."""
    if now.name == "HGMMA":
        return tiles._replace(are_being_read=True)
    if now.text.startswith("WARPGROUP.DEPBAR") and tiles.are_being_read:
        return _Tiles(are_being_read=not now.text.endswith("0x0"), may_be_read=True)
    if now.name == "BAR":
        return tiles._replace(may_be_read=False)
    return tiles
