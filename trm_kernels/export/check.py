"""Compile recorded launches for a chosen GPU, with or without one, and say what each kernel uses.

    python -m trm_kernels.aot --arch 80 89 90 [--out DIR] [--write FILE]

prints one line for every kernel of every case under every row of the settings table, and once more for those
that multiply float32, in TF32. It ends with exit code 1 when one spills, takes more registers than its case
allows or more shared memory than a block of that GPU has, or when its main loop misses the GPU's tensor cores
or its 16-byte asynchronous copies; the latter not in TF32. Under "main loop" the table says what multiplies,
and the fewest bytes that come at a time from global memory: copied ahead into shared memory, or loaded
through registers while the multiplication waits.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trm_kernels.export.compile import SHARED_LIMIT, Compiled, Source, compiled, judges, source_of
from trm_kernels.runtime import tuning
from trm_kernels.runtime.launch import Launch, record
from trm_kernels.testing.cases import CASES, Case, Shape


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


@dataclass(frozen=True)
class Job:
    """One kernel of one case, under the settings of its arch or those that serve where there are none."""

    case: Case
    shape: Shape
    dtype: torch.dtype
    settings: str
    source: Source
    number: int = 1  # among those of one name that the case starts there: rope rotates, and rotates back
    tf32: bool = False  # multiplies float32 in TF32

    @property
    def kernel(self) -> Compiled:
        """Compiled when it is first asked for."""
        return compiled(self.source)

    @property
    def kind(self) -> str:
        """Of the numbers that are multiplied."""
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        """Its name within the case and the arch."""
        size = "x".join(map(str, self.shape))
        any_arch = "" if self.settings == self.source.arch else f"-{self.settings}"
        number = "" if self.number == 1 else f"-{self.number}"
        return f"{self.source.name.strip('_')}{number}-{size}-{self.kind}{any_arch}"

    @property
    def complaints(self) -> list[str]:
        """What keeps it from running, or from running well: in TF32 the former alone."""
        find = self.kernel.excesses if self.tf32 else self.kernel.complaints
        return find(self.case.max_registers)


def calls_of(case: Case, settings: str) -> Iterator[tuple[Shape, torch.dtype, Launch]]:
    """What `case` launches: sizes people run in every dtype, and, in bfloat16, rows that are not aligned."""
    wanted = [(shape, dtype) for shape in (*case.bench, *case.edges) for dtype in case.dtypes]
    wanted += [(shape, torch.bfloat16) for shape in case.shapes[2:3] if torch.bfloat16 in case.dtypes]
    for shape, dtype in wanted:
        for call in launches_of(case, shape, dtype, settings):
            yield shape, dtype, call
    if case.name.startswith("trm_recursion-decode"):
        for behind in tuning.one_launch_candidates(settings):
            with tuning.using("one_launch", behind):
                again = [launches_of(case, shape, dtype, settings) for shape, dtype in wanted]
            for (shape, dtype), calls in zip(wanted, again, strict=True):
                yield from ((shape, dtype, call) for call in calls)
    for op, row in _candidates(case, settings):  # beside what the table takes
        for shape, dtype in wanted[: len(case.bench) * len(case.dtypes)]:
            if dtype.itemsize == row.element_size:
                with tuning.using(op, row):
                    found = launches_of(case, shape, dtype, settings)
                for call in found:
                    yield shape, dtype, call


def _candidates(case: Case, settings: str) -> Iterator[tuple[str, Any]]:
    """(op, row) of the table that this case compiles, whether or not it is the first that serves."""
    if case.name in ("rope_attention", "rope_attention_causal"):  # heads of 64, and of 128
        yield from tuning.attention_candidates(settings)
    yield from ((op, row) for op, row in tuning.gemm_candidates(settings) if op == case.name)


def jobs(arch: str, cases: Iterable[Case], tf32: bool = False) -> Iterator[Job]:
    """Every kernel of the cases, for `arch`: under its own settings, and under those named "any".

    tf32: Those that multiply float32 instead, in TF32 and under its own settings.
    """
    for case in cases:
        seen = set()
        named: Counter[tuple[Any, ...]] = Counter()
        for settings, shape, dtype, call in (_in_tf32 if tf32 else _as_they_are)(case, arch):
            source = source_of(call, arch)
            if source not in seen:
                seen.add(source)
                named[name := (source.name, shape, dtype, settings)] += 1
                yield Job(case, shape, dtype, settings, source, named[name], tf32)


def _as_they_are(case: Case, arch: str) -> Iterator[tuple[str, Shape, torch.dtype, Launch]]:
    for settings in (arch, "any"):
        for shape, dtype, call in calls_of(case, settings):
            yield settings, shape, dtype, call


def _in_tf32(case: Case, arch: str) -> Iterator[tuple[str, Shape, torch.dtype, Launch]]:
    of_float32 = replace(case, dtypes=tuple(dtype for dtype in case.dtypes if dtype == torch.float32))
    for shape, dtype, call in calls_of(of_float32, arch):
        if "PRECISION" in call.meta:
            yield arch, shape, dtype, replace(call, meta=call.meta | {"PRECISION": "tf32"})


def _write(out: Path, job: Job) -> None:
    out.mkdir(parents=True, exist_ok=True)
    name = f"{job.case.name}.{job.label}"
    (out / f"{name}.cubin").write_bytes(job.kernel.cubin)
    facts = {k: v for k, v in asdict(job.kernel).items() if k not in ("cubin", "main_loop", "parameters")}
    (out / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")


def resources(found: Iterable[Job]) -> dict[str, Any]:
    """Registers and stack bytes a thread, shared bytes a block, fingerprint, by arch, case and kernel.

    With them the version of Triton, and what judged them.
    """
    import triton

    kernels: dict[str, dict[str, dict[str, list[int | str]]]] = {}
    for job in found:
        of_case = kernels.setdefault(job.source.arch, {}).setdefault(job.case.name, {})
        assert job.label not in of_case, f"two kernels of {job.case.name} are called {job.label}"
        used = job.kernel
        of_case[job.label] = [used.registers, used.stack, used.shared, job.source.fingerprint]
    columns = ["registers", "stack", "shared", "fingerprint"]
    return {"triton": triton.__version__, "judges": judges(), "columns": columns, "kernels": kernels}


def as_json(found: dict[str, Any]) -> str:
    """`resources` with one kernel a line, so that a change of one shows as one line."""
    row = r'\[\s+(\d+),\s+(\d+),\s+(\d+),\s+("\w+")\s+\]'
    return re.sub(row, r"[\1, \2, \3, \4]", json.dumps(found, indent=1)) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Print the table; the exit code says whether every kernel keeps within its limits."""
    parser = argparse.ArgumentParser(prog="python -m trm_kernels.aot", description=__doc__.split("\n\n")[0])
    known = sorted(int(arch[2:]) for arch in SHARED_LIMIT)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 89, 90], choices=known, metavar="N")
    parser.add_argument("--out", type=Path, help="folder for NAME.cubin and NAME.json, one folder per arch")
    parser.add_argument(
        "--write",
        type=Path,
        help="file for registers, stack and shared memory, as JSON; not if the exit code is 1",
    )
    chosen = parser.parse_args(argv)

    found: list[Job] = []
    print(
        f"{'kernel':<34}{'case':<24}{'shape':<17}{'dtype':<10}{'arch':<6}{'settings':<9}"
        f"{'registers':>9}{'stack':>7}{'shared':>8}  {'main loop'}"
    )
    for arch in (f"sm{number}" for number in chosen.arch):
        for job in chain(jobs(arch, CASES), jobs(arch, CASES, tf32=True)):
            found.append(job)
            size, kernel = "x".join(map(str, job.shape)), job.kernel
            print(
                f"{kernel.name:<34}{job.case.name:<24}{size:<17}{job.kind:<10}{arch:<6}{job.settings:<9}"
                f"{kernel.registers:>9}{kernel.stack:>7}{kernel.shared:>8}  {str(kernel.main_loop or ''):<32}"
                f"{'; '.join(job.complaints)}".rstrip(),
                flush=True,
            )
            if chosen.out:
                _write(chosen.out / arch, job)
    if unfenced := sum(job.kernel.lacks_fence for job in found):
        print(f"{unfenced} kernels multiply copies that no fence orders before wgmma: Triton 3.6, not 3.7")
    failed = sum(bool(job.complaints) for job in found)
    if chosen.write and not failed:  # what is on record has passed: by day it is not judged again
        chosen.write.parent.mkdir(parents=True, exist_ok=True)
        chosen.write.write_text(as_json(resources(found)))
    print(f"{failed} kernels outside their limits" if failed else "every kernel keeps within its limits")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
