"""Compile recorded launches for a chosen GPU, with or without one, and say what each kernel uses.

    python -m trm_kernels.aot --arch 80 89 90 [--out DIR] [--write FILE]

prints one line for every kernel of every case under every row of the settings table, and ends with exit code
1 when one spills, takes more registers than its case allows or more shared memory than a block of that GPU
has, or when its main loop misses the GPU's tensor cores or its 16-byte asynchronous copies. Under "main loop"
the table says what multiplies, and the fewest bytes that come at a time from global memory: copied ahead into
shared memory, or loaded through registers while the multiplication waits.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trm_kernels.runtime.launch import Launch, record
from trm_kernels.testing.cases import CASES, Case, Shape

# Shared memory one block may use, in bytes: CUDA programming guide, "Technical Specifications per
# Compute Capability" (163, 99 and 227 KB on A100, RTX 4090 and H100).
SHARED_LIMIT = {"sm80": 163 << 10, "sm86": 99 << 10, "sm89": 99 << 10, "sm90": 227 << 10}


@dataclass(frozen=True)
class MainLoop:
    """How a kernel multiplies matrices: what multiplies, and how its factors come from global memory.

    A tile is copied into shared memory while the one before it is multiplied; one that RoPE turns as well,
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

    def complaints(self, max_registers: int) -> list[str]:
        """What keeps it from running, or from running well, on its GPU."""
        limit = SHARED_LIMIT[self.arch]
        found = []
        if self.stack:
            found.append(f"keeps {self.stack} bytes a thread on the stack")
        if self.registers > max_registers:
            found.append(f"takes {self.registers} registers of {max_registers}")
        if self.shared > limit:
            found.append(f"takes {self.shared} bytes of shared memory of {limit}")
        return found + (self.main_loop.complaints() if self.main_loop else [])


def launches_of(case: Case, shape: Shape, dtype: torch.dtype, arch: str) -> list[Launch]:
    """The kernels one forward and one backward of `case` would start with the settings of `arch`."""
    with FakeTensorMode():  # only shapes are wanted: allocate nothing
        like = case.inputs(shape, dtype, 0)
    inputs = [
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta", requires_grad=t.requires_grad)
        for t in like
    ]
    with record(arch) as launches:
        out = case.op(*inputs)
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        if wanted := [t for t in inputs if t.requires_grad]:
            torch.autograd.grad(outs, wanted, [torch.empty_like(t) for t in outs], allow_unused=True)
    return launches


def compile_for(call: Launch, arch: str) -> Compiled:
    """Compile a recorded launch as Triton would just before running it on `arch`, such as "sm90".

    The same kernel for the same types, constants and options is compiled once a process.
    """
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
    return _compile(
        call.kernel,
        arch,
        tuple(signature.items()),
        tuple(constexprs.items()),
        tuple(aligned),
        tuple(options.items()),
    )


@cache
def _compile(
    kernel: Any,
    arch: str,
    signature: tuple[tuple[str, str], ...],
    constexprs: tuple[tuple[tuple[int], Any], ...],
    aligned: tuple[int, ...],
    options: tuple[tuple[str, Any], ...],
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, dict(signature), dict(constexprs), attrs)
    built = triton.compile(source, target=GPUTarget("cuda", int(arch[2:]), 32), options=dict(options))
    cubin = built.asm["cubin"]
    registers, stack = _resources(cubin)
    constants = {signature[i][0] for (i,), _ in constexprs}
    strides_are_aligned = all(
        i in aligned
        for i, (name, _) in enumerate(signature)
        if name.startswith("stride_") and name not in constants
    )
    return Compiled(
        name=built.metadata.name,
        arch=arch,
        registers=registers,
        stack=stack,
        shared=built.metadata.shared,
        num_warps=built.metadata.num_warps,
        signature=tuple(kind for _, kind in signature),
        cubin=cubin,
        main_loop=_main_loop(built.asm, arch, built.metadata, strides_are_aligned),
        parameters=tuple(re.findall(r"\.param \.(\w+)", built.asm["ptx"].partition(".entry")[2])),
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
        wants_copies=strides_are_aligned and bool(loop),
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
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert used, f"cuobjdump -res-usage printed no resources: {text}"
    return int(used[1]), int(used[2])


@dataclass(frozen=True)
class Job:
    """One kernel of one case, under the settings of its arch or those that serve where there are none."""

    case: Case
    shape: Shape
    dtype: torch.dtype
    settings: str
    kernel: Compiled
    number: int = 1  # among those of one name that the case starts there: rope turns, and turns back

    @property
    def label(self) -> str:
        """Its name within the case and the arch."""
        size, kind = "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        any_arch = "" if self.settings == self.kernel.arch else f"-{self.settings}"
        number = "" if self.number == 1 else f"-{self.number}"
        return f"{self.kernel.name.strip('_')}{number}-{size}-{kind}{any_arch}"

    @property
    def complaints(self) -> list[str]:
        return self.kernel.complaints(self.case.max_registers)


def calls_of(case: Case, settings: str) -> Iterator[tuple[Shape, torch.dtype, Launch]]:
    """What `case` launches: sizes people run in every dtype, and, in bfloat16, rows that are not aligned."""
    wanted = [(shape, dtype) for shape in (*case.bench, *case.edges) for dtype in case.dtypes]
    wanted += [(shape, torch.bfloat16) for shape in case.shapes[2:3] if torch.bfloat16 in case.dtypes]
    for shape, dtype in wanted:
        for call in launches_of(case, shape, dtype, settings):
            yield shape, dtype, call


def jobs(arch: str, cases: Iterable[Case]) -> Iterator[Job]:
    """Every kernel of the cases, compiled for `arch`: under its own settings, and under those named "any"."""
    for case in cases:
        seen = set()
        named: Counter[tuple[Any, ...]] = Counter()
        for settings in (arch, "any"):
            for shape, dtype, call in calls_of(case, settings):
                kernel = compile_for(call, arch)
                if id(kernel) not in seen:
                    seen.add(id(kernel))
                    named[name := (kernel.name, shape, dtype, settings)] += 1
                    yield Job(case, shape, dtype, settings, kernel, named[name])


def _write(out: Path, job: Job) -> None:
    out.mkdir(parents=True, exist_ok=True)
    name = f"{job.case.name}.{job.label}"
    (out / f"{name}.cubin").write_bytes(job.kernel.cubin)
    facts = {k: v for k, v in asdict(job.kernel).items() if k not in ("cubin", "main_loop", "parameters")}
    (out / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")


def resources(found: Iterable[Job]) -> dict[str, Any]:
    """Registers and stack bytes a thread, shared bytes a block, by arch, case and kernel; the Triton."""
    import triton

    kernels: dict[str, dict[str, dict[str, list[int]]]] = {}
    for job in found:
        of_case = kernels.setdefault(job.kernel.arch, {}).setdefault(job.case.name, {})
        assert job.label not in of_case, f"two kernels of {job.case.name} are called {job.label}"
        of_case[job.label] = [job.kernel.registers, job.kernel.stack, job.kernel.shared]
    return {"triton": triton.__version__, "columns": ["registers", "stack", "shared"], "kernels": kernels}


def as_json(found: dict[str, Any]) -> str:
    """`resources` with one kernel a line, so that a change of one shows as one line."""
    return re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3]", json.dumps(found, indent=1)) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Print the table; the exit code says whether every kernel keeps within its limits."""
    parser = argparse.ArgumentParser(prog="python -m trm_kernels.aot", description=__doc__.split("\n\n")[0])
    known = sorted(int(arch[2:]) for arch in SHARED_LIMIT)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 89, 90], choices=known, metavar="N")
    parser.add_argument("--out", type=Path, help="folder for NAME.cubin and NAME.json, one folder per arch")
    parser.add_argument("--write", type=Path, help="file for registers, stack and shared memory, as JSON")
    chosen = parser.parse_args(argv)

    found: list[Job] = []
    print(
        f"{'kernel':<34}{'case':<24}{'shape':<17}{'dtype':<10}{'arch':<6}{'settings':<9}"
        f"{'registers':>9}{'stack':>7}{'shared':>8}  {'main loop'}"
    )
    for arch in (f"sm{number}" for number in chosen.arch):
        for job in jobs(arch, CASES):
            found.append(job)
            size, kind = "x".join(map(str, job.shape)), str(job.dtype).removeprefix("torch.")
            kernel = job.kernel
            print(
                f"{kernel.name:<34}{job.case.name:<24}{size:<17}{kind:<10}{arch:<6}{job.settings:<9}"
                f"{kernel.registers:>9}{kernel.stack:>7}{kernel.shared:>8}  {str(kernel.main_loop or ''):<32}"
                f"{'; '.join(job.complaints)}".rstrip(),
                flush=True,
            )
            if chosen.out:
                _write(chosen.out / arch, job)
    if chosen.write:
        chosen.write.parent.mkdir(parents=True, exist_ok=True)
        chosen.write.write_text(as_json(resources(found)))
    failed = sum(bool(job.complaints) for job in found)
    print(f"{failed} kernels outside their limits" if failed else "every kernel keeps within its limits")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
