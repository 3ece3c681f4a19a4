"""Compile recorded launches for a chosen GPU, with or without one, and say what each kernel uses.

    python -m trm_kernels.aot --arch 80 89 90 [--out DIR] [--write FILE]

prints one line for every kernel of every case under every row of the settings table, and ends with exit code
1 when one spills, takes more registers than its case allows or more shared memory than a block of that GPU
has, or when the main loop of a product misses the GPU's tensor cores or its 16-byte asynchronous copies.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trm_kernels.cases import CASES, Case, Shape
from trm_kernels.launch import Launch, record

# Shared memory one block may use, in bytes: CUDA programming guide, "Technical Specifications per
# Compute Capability" (163, 99 and 227 KB on A100, RTX 4090 and H100).
SHARED_LIMIT = {"sm80": 163 << 10, "sm86": 99 << 10, "sm89": 99 << 10, "sm90": 227 << 10}


@dataclass(frozen=True)
class MainLoop:
    """How a product is computed: what multiplies, and how its factors come into shared memory."""

    instruction: str  # "wgmma", "mma", or "fma" without tensor cores
    narrowest_copy: int  # bytes; 0 without asynchronous copies
    wants_wgmma: bool
    wants_wide_copies: bool

    def __str__(self) -> str:
        return f"{self.instruction}, {self.narrowest_copy} B"


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
        if self.main_loop and self.main_loop.wants_wgmma and self.main_loop.instruction != "wgmma":
            found.append(f"multiplies by {self.main_loop.instruction}, not wgmma")
        if self.main_loop and self.main_loop.wants_wide_copies and self.main_loop.narrowest_copy != 16:
            found.append(f"copies {self.main_loop.narrowest_copy} bytes at a time in its main loop, not 16")
        return found


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
        wanted = [t for t in inputs if t.requires_grad]
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
    constants = {signature[i][0]: value for (i,), value in constexprs}
    strides_are_aligned = all(
        i in aligned
        for i, (name, _) in enumerate(signature)
        if name.startswith("stride_") and name not in constants
    )
    types = [kind for _, kind in signature]
    return Compiled(
        name=built.metadata.name,
        arch=arch,
        registers=registers,
        stack=stack,
        shared=built.metadata.shared,
        num_warps=built.metadata.num_warps,
        signature=tuple(types),
        cubin=cubin,
        main_loop=_main_loop(built.asm["ptx"], arch, types[0], constants["BLOCK_M"], strides_are_aligned)
        if "BLOCK_K" in constants
        else None,
    )


def _main_loop(ptx: str, arch: str, factor: str, BLOCK_M: int, strides_are_aligned: bool) -> MainLoop:
    """What the assembler text says of a product whose first factor is a tensor of type `factor`."""
    instruction = "wgmma" if "wgmma.mma_async" in ptx else "mma" if re.search(r"\bmma\.sync", ptx) else "fma"
    copies = [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], (\w+)", ptx)]
    is_narrow = factor in ("*fp16", "*bf16")
    return MainLoop(
        instruction,
        min(copies, default=0),
        wants_wgmma=arch == "sm90" and is_narrow and BLOCK_M >= 64,
        wants_wide_copies=is_narrow and strides_are_aligned,
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

    @property
    def label(self) -> str:
        """Its name within the case and the arch."""
        size, kind = "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        any_arch = "" if self.settings == self.kernel.arch else f"-{self.settings}"
        return f"{self.kernel.name.strip('_')}-{size}-{kind}{any_arch}"

    @property
    def complaints(self) -> list[str]:
        return self.kernel.complaints(self.case.max_registers)


def calls_of(case: Case, settings: str) -> Iterator[tuple[Shape, torch.dtype, Launch]]:
    """What `case` launches: sizes people run in every dtype, and, in bfloat16, rows that are not aligned."""
    wanted = [(shape, dtype) for shape in case.bench for dtype in case.dtypes]
    wanted += [(shape, torch.bfloat16) for shape in case.shapes[2:3] if torch.bfloat16 in case.dtypes]
    for shape, dtype in wanted:
        for call in launches_of(case, shape, dtype, settings):
            yield shape, dtype, call


def jobs(arch: str, cases: Iterable[Case]) -> Iterator[Job]:
    """Every kernel of the cases, compiled for `arch`: under its own settings, and under those named "any"."""
    for case in cases:
        seen = set()
        for settings in (arch, "any"):
            for shape, dtype, call in calls_of(case, settings):
                kernel = compile_for(call, arch)
                if id(kernel) not in seen:
                    seen.add(id(kernel))
                    yield Job(case, shape, dtype, settings, kernel)


def _write(out: Path, job: Job) -> None:
    out.mkdir(parents=True, exist_ok=True)
    name = f"{job.case.name}.{job.label}"
    (out / f"{name}.cubin").write_bytes(job.kernel.cubin)
    facts = {k: v for k, v in asdict(job.kernel).items() if k not in ("cubin", "main_loop")}
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
                f"{kernel.registers:>9}{kernel.stack:>7}{kernel.shared:>8}  {str(kernel.main_loop or ''):<12}"
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
