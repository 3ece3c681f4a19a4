"""Compile recorded launches for a chosen GPU, with or without one, and say what each kernel uses.

    python -m trm_kernels.aot --arch 80 89 90 [--out DIR]

prints one line for every kernel of every case, and ends with exit code 1 when one spills, takes more
registers than its case allows, or more shared memory than a block of that GPU has.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
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
        return found


def launches_of(case: Case, shape: Shape, dtype: torch.dtype, arch: str) -> list[Launch]:
    """The kernels one forward and one backward of `case` would start on `arch`."""
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
    """Compile a recorded launch as Triton would just before running it on `arch`, such as "sm90"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = call.kernel.arg_names
    options = {k: v for k, v in call.meta.items() if k not in names}
    values = dict(zip(names, call.args, strict=False)) | {k: call.meta[k] for k in names if k in call.meta}
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int], Any] = {}
    attrs: dict[tuple[int], list[list[Any]]] = {}
    for i, parameter in enumerate(call.kernel.params):
        value = values[parameter.name]
        signature[parameter.name] = kind = _type_of(parameter, value)
        if kind == "constexpr":
            constexprs[(i,)] = value
        elif not parameter.do_not_specialize and _is_multiple_of_16(value):
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(call.kernel, signature, constexprs, attrs)
    built = triton.compile(source, target=GPUTarget("cuda", int(arch[2:]), 32), options=options)
    cubin = built.asm["cubin"]
    registers, stack = _resources(cubin)
    return Compiled(
        name=built.metadata.name,
        arch=arch,
        registers=registers,
        stack=stack,
        shared=built.metadata.shared,
        num_warps=built.metadata.num_warps,
        signature=tuple(signature.values()),
        cubin=cubin,
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


def _compile_cases(arch: str) -> Iterator[tuple[Case, Shape, torch.dtype, Compiled]]:
    for case in CASES:
        for shape in case.bench:
            for dtype in case.dtypes:
                for call in launches_of(case, shape, dtype, arch):
                    yield case, shape, dtype, compile_for(call, arch)


def _write(out: Path, label: str, kernel: Compiled) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{label}.cubin").write_bytes(kernel.cubin)
    facts = {k: v for k, v in asdict(kernel).items() if k != "cubin"}
    (out / f"{label}.json").write_text(json.dumps(facts, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Print the table; the exit code says whether every kernel keeps within its limits."""
    parser = argparse.ArgumentParser(prog="python -m trm_kernels.aot", description=__doc__.split("\n\n")[0])
    known = sorted(int(arch[2:]) for arch in SHARED_LIMIT)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 89, 90], choices=known, metavar="N")
    parser.add_argument("--out", type=Path, help="folder for NAME.cubin and NAME.json, one folder per arch")
    chosen = parser.parse_args(argv)

    failed = 0
    print(f"{'kernel':<34}{'shape':<14}{'dtype':<10}{'arch':<6}{'registers':>9}{'stack':>7}{'shared':>8}")
    for arch in (f"sm{number}" for number in chosen.arch):
        for case, shape, dtype, kernel in _compile_cases(arch):
            size, kind = "x".join(map(str, shape)), str(dtype).removeprefix("torch.")
            complaints = kernel.complaints(case.max_registers)
            failed += bool(complaints)
            print(
                f"{kernel.name:<34}{size:<14}{kind:<10}{arch:<6}"
                f"{kernel.registers:>9}{kernel.stack:>7}{kernel.shared:>8}  {'; '.join(complaints)}".rstrip()
            )
            if chosen.out:
                _write(chosen.out / arch, f"{kernel.name.strip('_')}-{size}-{kind}", kernel)
    print(f"{failed} kernels outside their limits" if failed else "every kernel keeps within its limits")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
