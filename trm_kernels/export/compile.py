"""Recorded launches compiled for a chosen GPU, with or without one, and what the machine code uses of it.

A kernel is compiled as Triton would just before it runs: for the types of its arguments, the numbers that are
compiled in, and what it may rely on of addresses and sizes. Source of the limits: the CUDA programming guide.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from trm_kernels.export.machine_code import (
    Instruction,
    copies_without_fence,
    cuobjdump,
    instructions,
    unguarded_writes,
)
from trm_kernels.runtime.launch import Launch

# Kernels whose unguarded writes were read by hand, sm_90, Triton 3.6.0 and 3.7.1: they write beside what the
# tensor cores read. Attention copies K's next halves, which RoPE rotates first, or stores v, do and p while
# the tiles that were multiplied are needed once more; a barrier stands before those are written again.
_WRITES_ELSEWHERE = tuple(
    f"rope_attention_{part}_kernel" for part in ("fwd", "bwd_tile", "bwd_dq", "bwd_dkv")
)

# Shared memory one block may use, in bytes: CUDA programming guide, "Technical Specifications per
# Compute Capability" (163, 99 and 227 KB on A100, RTX 4090 and H100).
SHARED_LIMIT = {"sm80": 163 << 10, "sm86": 99 << 10, "sm89": 99 << 10, "sm90": 227 << 10}


@dataclass(frozen=True)
class MainLoop:
    """How a kernel multiplies matrices: what multiplies, and how its factors come from global memory.

    A tile is copied into shared memory while the one before it is multiplied; one that RoPE rotates as well,
    and read back into registers for that. It is loaded through registers, and waited for, where there is no
    loop to copy it ahead in, and where its rows are not aligned: an asynchronous copy has 4 bytes at least.
    """

    instruction: str  # "wgmma", "mma", or "fma" without tensor cores; of the first two, the slower if both
    narrowest_copy: int  # bytes, of the tiles that are copied ahead; 0 where none is
    narrowest_load: int  # bytes, where tiles are loaded through registers; else 0
    wants_wgmma: bool
    wants_copies: bool
    wanted_width: int  # bytes: 16, or a thread's share of the smallest tile; 0 where rows are not aligned

    def __str__(self) -> str:
        copied = f", {self.narrowest_copy} B copied" if self.narrowest_copy else ""
        loaded = f", {self.narrowest_load} B loaded" if self.narrowest_load else ""
        return self.instruction + copied + loaded

    def complaints(self) -> list[str]:
        """What is slower than this GPU allows."""
        found = []
        if self.wants_wgmma and self.instruction != "wgmma":
            found.append(f"multiplies by {self.instruction}, not wgmma")
        if self.wants_copies and (self.narrowest_load or not self.narrowest_copy):
            found.append("waits for a tile in its main loop instead of copying it ahead")
        for does, width in (("copies", self.narrowest_copy), ("loads", self.narrowest_load)):
            if 0 < width < self.wanted_width:
                found.append(f"{does} {width} bytes at a time in its main loop, not {self.wanted_width}")
        return found


@dataclass(frozen=True)
class Compiled:
    """A kernel, compiled for one GPU."""

    name: str
    arch: str
    registers: int  # per thread
    stack: int  # bytes per thread: registers spilled to memory, and local arrays
    shared: int  # bytes per block
    num_warps: int
    signature: tuple[str, ...]  # type of each argument; "constexpr" for those compiled in
    cubin: bytes
    main_loop: MainLoop | None = None  # of a kernel that multiplies matrices
    parameters: tuple[str, ...] = ()  # as the assembler text declares them: "u64", "u32", "f32"
    multiplies_by_wgmma: bool = False  # which takes a listing to judge: export/machine_code.py

    @property
    def unguarded_writes(self) -> int:
        """Writes to shared memory that wgmma of another warpgroup (four warps) may still read."""
        return len(unguarded_writes(self._code())) if self.num_warps > 4 else 0

    @property
    def lacks_fence(self) -> bool:
        """Whether wgmma reads copies that no fence orders before it."""
        return copies_without_fence(self._code())

    def _code(self) -> list[Instruction]:
        return instructions(self.cubin) if self.multiplies_by_wgmma else []

    def complaints(self, max_registers: int) -> list[str]:
        """What keeps it from running, or from running well, on its GPU."""
        return self.excesses(max_registers) + (self.main_loop.complaints() if self.main_loop else [])

    def excesses(self, max_registers: int) -> list[str]:
        """What keeps it from running, or makes it spill."""
        limit = SHARED_LIMIT[self.arch]
        found = []
        if self.stack:
            found.append(f"keeps {self.stack} bytes a thread on the stack")
        if self.registers > max_registers:
            found.append(f"takes {self.registers} registers of {max_registers}")
        if self.shared > limit:
            found.append(f"takes {self.shared} bytes of shared memory of {limit}")
        if self.name not in _WRITES_ELSEWHERE and (writes := self.unguarded_writes):
            found.append(f"writes {writes} times to shared memory that wgmma may still read")
        return found


@dataclass(frozen=True)
class Source:
    """A kernel with all that decides its machine code on `arch`, besides the version of Triton."""

    kernel: Any
    arch: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[tuple[int], Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """Of the kernel."""
        return str(self.kernel.__name__)

    @cached_property
    def fingerprint(self) -> str:
        """12 hexadecimal digits of a hash of Triton's first text of the kernel, and of what else makes it.

        The text is what Python's lines are translated into, without their numbers. It takes a twelfth of
        the time of compiling. The rest is what Triton's own cache goes by: the assembler, the options as the
        environment completes them, and variables that change machine code. Of the arguments' names, which
        are no part of the text, it depends which of them are strides.
        """
        from triton._C.libtriton import get_cache_invalidating_env_vars, ir
        from triton.compiler import make_backend

        backend, context = make_backend(self.target), ir.context()
        options = backend.parse_options(dict(self.options))
        ir.load_dialects(context)
        backend.load_dialects(context)
        made_of = (backend.get_codegen_implementation(options), backend.get_module_map())
        text = self.ast.make_ir(self.target, options, *made_of, context).str_nodebug()
        names = [name for name, _ in self.signature]
        made_with = (backend.hash(), options.hash(), sorted(get_cache_invalidating_env_vars().items()))
        return _hash(repr((text, names, made_with)).encode())

    @property
    def target(self) -> Any:
        """The GPU, as Triton names it."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", int(self.arch[2:]), 32)

    @property
    def ast(self) -> Any:
        """What Triton compiles."""
        from triton.compiler import ASTSource

        attrs = {(i,): [["tt.divisibility", 16]] for i in self.aligned}
        return ASTSource(self.kernel, dict(self.signature), dict(self.constexprs), attrs)


def source_of(call: Launch, arch: str) -> Source:
    """What Triton would compile just before it runs a recorded launch on `arch`, such as "sm90"."""
    names = call.kernel.arg_names
    options = {k: v for k, v in call.meta.items() if k not in names}
    values = dict(zip(names, call.args, strict=False)) | {k: call.meta[k] for k in names if k in call.meta}
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int], Any] = {}
    aligned: list[int] = []
    for i, parameter in enumerate(call.kernel.params):
        value = values[parameter.name]
        signature[parameter.name] = kind = _type_of(parameter, value)
        if kind == "constexpr":
            constexprs[(i,)] = value
        elif not parameter.do_not_specialize and _is_multiple_of_16(value):
            aligned.append(i)
    return Source(
        call.kernel,
        arch,
        tuple(signature.items()),
        tuple(constexprs.items()),
        tuple(aligned),
        tuple(options.items()),
    )


def compile_for(call: Launch, arch: str) -> Compiled:
    """Compile a recorded launch as Triton would just before running it on `arch`, such as "sm90".

    The same kernel for the same types, constants and options is compiled once a process.
    """
    return compiled(source_of(call, arch))


@cache
def compiled(source: Source) -> Compiled:
    """Compile it, or find it in Triton's cache."""
    import triton

    built = triton.compile(source.ast, target=source.target, options=dict(source.options))
    cubin = built.asm["cubin"]
    registers, stack = _resources(cubin)
    constants = {source.signature[i][0] for (i,), _ in source.constexprs}
    strides_are_aligned = all(
        i in source.aligned
        for i, (name, _) in enumerate(source.signature)
        if name.startswith("stride_") and name not in constants
    )
    return Compiled(
        name=built.metadata.name,
        arch=source.arch,
        registers=registers,
        stack=stack,
        shared=built.metadata.shared,
        num_warps=built.metadata.num_warps,
        signature=tuple(kind for _, kind in source.signature),
        cubin=cubin,
        main_loop=_main_loop(built.asm, source.arch, built.metadata, strides_are_aligned),
        parameters=tuple(re.findall(r"\.param \.(\w+)", built.asm["ptx"].partition(".entry")[2])),
        multiplies_by_wgmma="wgmma" in built.asm["ptx"],
    )


# of a tile, and of a vector, such as one number a row, in Triton's intermediate text
_READ_OF_A_TILE = re.compile(r"(tt\.load|async_copy_global_to_local) .*tensor<(\d+)x(\d+)x!tt\.ptr<\D+(\d+)>")
_LOAD_OF_A_VECTOR = re.compile(r"tt\.load .*tensor<\d+x!tt\.ptr<\D+(\d+)>")
# in the assembler text: a copy's bytes; a load's numbers and the bits of each
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], (\w+)")
_LOAD = re.compile(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)")


def _main_loop(asm: dict[str, str], arch: str, settings: Any, strides_are_aligned: bool) -> MainLoop | None:
    """What the intermediate and the assembler text say of a kernel that multiplies matrices."""
    factors = re.findall(r"tt\.dot .* : tensor<(\d+)x\d+x(\w+)>", asm["ttir"])
    if not factors:
        return None
    ptx, text = asm["ptx"], asm["ttgir"]
    loops = [body for _, body in re.findall(r"^( *)[^\n]* = scf\.for ([^\n]*\n.*?)^\1}", text, re.M | re.S)]
    loop = "".join(body for body in loops if "dot " in body)
    by_descriptors = "async_tma_copy_global_to_local" in loop  # by one thread, whatever the tile
    tiles = _READ_OF_A_TILE.findall(loop or text)
    sizes = [int(rows) * int(columns) * int(bits) // 8 for _, rows, columns, bits in tiles]
    smallest = min((size // (32 * settings.num_warps) for size in sizes), default=0)
    # the assembler text says how wide, and not of what: of a vector, as of one number a row, a thread copies
    # or loads single numbers. The tiles' copies are the widest, as many as there would be of 16 bytes.
    each = 16 * 32 * settings.num_warps
    copied = [
        int(n) * int(k) * int(bits) // 8
        for how, n, k, bits in _READ_OF_A_TILE.findall(text)
        if how != "tt.load"
    ]
    copies = sorted((int(size, 0) for size in _COPY.findall(ptx)), reverse=True)
    copies = copies[: sum(max(1, size // each) for size in copied)]
    singles = {("", bits) for bits in _LOAD_OF_A_VECTOR.findall(text)}
    loads = [int(n or 1) * int(bits) // 8 for n, bits in _LOAD.findall(ptx) if (n, bits) not in singles]
    is_narrow = all(kind in ("f16", "bf16") for _, kind in factors)
    return MainLoop(
        "mma" if re.search(r"\bmma\.sync", ptx) else "wgmma" if "wgmma.mma_async" in ptx else "fma",
        min(copies, default=0),
        min(loads, default=0) if any(how == "tt.load" for how, *_ in tiles) else 0,
        wants_wgmma=arch == "sm90" and is_narrow and all(int(rows) >= 64 for rows, _ in factors),
        wants_copies=strides_are_aligned and bool(loop) and not by_descriptors,
        wanted_width=min(16, smallest) if strides_are_aligned else 0,
    )


def _type_of(parameter: Any, value: Any) -> str:
    """The type Triton gives an argument; None and the number 1 are compiled in, as it does."""
    from triton.runtime.jit import mangle_type

    if parameter.is_constexpr or value is None:
        return "constexpr"
    return mangle_type(value, specialize=not parameter.do_not_specialize)


def _is_multiple_of_16(value: Any) -> bool:
    """Whether Triton would compile for an address or a number it knows to be a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0  # fresh memory is aligned
    return isinstance(value, int) and not isinstance(value, bool) and value % 16 == 0


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, read back from the machine code."""
    text = cuobjdump(cubin, "-res-usage")
    used = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert used, f"cuobjdump -res-usage printed no resources: {text}"
    return int(used[1]), int(used[2])


def judges() -> str:
    """A hash of the code that says what is wrong with a kernel: what it let pass, it lets pass again."""
    parts = ("check.py", "compile.py", "machine_code.py")
    return _hash(b"".join(Path(__file__).with_name(name).read_bytes() for name in parts))


def _hash(what: bytes) -> str:
    return hashlib.sha256(what).hexdigest()[:12]
