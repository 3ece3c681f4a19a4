"""The GPU run: correctness, sanitizer, small questions and W1 to W6, within a time budget of minutes.

    python -m bench.gpu --out build/gpu [--quick] [--card rtx4090 | a100 | h100 | h200]

Stages run one after the other. Each is a process with its own time limit, and all share the budget. The most
useful figures come first: the main peers of every workload before the other peers. Two files are written,
results.json and log.txt, and each result is written as soon as it is known. A second call with the same
folder, or with a folder that holds a copy of results.json, resumes where the first call stopped. The last
output is a short table; `python -m bench report FOLDER` makes the long one.

    --quick      two minutes instead of nine: fewer tests, the main peers only
    --dry-run    the same on a CPU, at sizes without meaning: a check that the script works

Peers that are not installed are listed as absent. Liger-Kernel is pure Python. Without a network, bring its
wheel (`pip download --no-deps liger-kernel==0.8.5`) and install it with `pip install --no-index --no-deps`.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.measure import ceilings, micro
from bench.measure.run import BROKEN_DEVICE, Budget, measure, step_of
from bench.measure.store import Store
from bench.measure.timing import Timer, card_state
from bench.peers.solvers import PEERS, peers_of
from bench.peers.workloads import CARDS, WORKLOADS, card_of
from bench.report import figures as report

ROOT = Path(__file__).parents[1]
MINUTES, QUICK_MINUTES = 9.0, 2.0
RESULTS, LOG = "results.json", "log.txt"
RESTARTS = 3  # of a stage whose device broke
# what most hangs on first; then every other file of tests whose mark is `kernels`
FIRST_TESTS = (
    "tests/trm_kernels/ops/test_ops.py",
    "tests/trm_kernels/recursion/test_recursion.py",
    "tests/trm_kernels/recursion/test_injection.py",
    "tests/trm_kernels/test_on_device.py",
)
DRY_TESTS = ("tests/test_house_map.py",)  # quick ones
_DRY_PEERS = ("ours", "eager", "TRM paper's eager")


@dataclass(frozen=True)
class Stage:
    """One stage of the run."""

    name: str
    minutes: float  # at most
    quick_minutes: float  # 0: left out of a quick run


_REST, _FIRST_CALL = ", the rest", "first call, "
FIRST = ("ours", "torch.compile")  # peers whose first call compiles for long
QUICK = ("W1", "W3", "W4-1", "W6-1")
WHOLE_MODEL = ("W3", "W4-1", "W4-16")
STAGES = (
    Stage("environment", 0.5, 0.2),
    Stage("correctness", 2.0, 0.4),
    Stage("sanitizer", 0.6, 0.0),
    Stage("first calls", 1.0, 0.3),
    Stage("micro", 0.6, 0.0),
    *(Stage(workload.name, 0.65, 0.28 if workload.name in QUICK else 0.0) for workload in WORKLOADS),
    *(Stage(f"{name}, whole model", 1.0, 0.0) for name in WHOLE_MODEL),
    *(Stage(workload.name + _REST, 4.0, 0.0) for workload in WORKLOADS),
)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 when every stage finished and nothing was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder for the results")
    parser.add_argument(
        "--card", choices=CARDS, help="the card whose batch sizes are used; default: from the device's name"
    )
    parser.add_argument(
        "--minutes", type=float, help=f"the budget; default {MINUTES:.0f}, {QUICK_MINUTES:.0f} quick"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES], help="some stages")
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # one of them, in this process
    parser.add_argument("--command", help=argparse.SUPPRESS)  # the command line, for the record
    chosen = parser.parse_args(argv)
    if not chosen.dry_run and not torch.cuda.is_available():
        print("bench.gpu: expected a CUDA device, and PyTorch finds none; --dry-run needs none.")
        return 2
    if chosen.stage:
        return run_stage(chosen)
    return run_all(chosen)


def run_all(chosen: argparse.Namespace) -> int:
    minutes = chosen.minutes or (QUICK_MINUTES if chosen.quick else MINUTES)
    end = time.monotonic() + 60 * minutes
    states = {}
    for stage in STAGES:
        share = stage.quick_minutes if chosen.quick else stage.minutes
        if share and (not chosen.only or stage.name in chosen.only):
            began = time.monotonic()
            states[stage.name] = _run_in_process(stage.name, chosen, min(60 * share, end - began))
            print(f"--- {stage.name}: {states[stage.name]}, {time.monotonic() - began:.0f} s", flush=True)
    print(report.short_table(chosen.out / RESULTS))
    return 0 if all(state == "finished" for state in states.values()) else 1


def _run_in_process(name: str, chosen: argparse.Namespace, seconds: float) -> str:
    """How it ended."""
    command = _command(name, chosen) + ["--command", " ".join(["python -m bench.gpu", *sys.argv[1:]])]
    end = time.monotonic() + seconds
    for _ in range(RESTARTS):
        if (left := end - time.monotonic()) < 3:
            return "cut: no time left"
        code = _run(command, left, chosen.out / LOG)
        if code != BROKEN_DEVICE:
            break
    if code is None:
        return "cut by its time limit"
    return "finished" if code == 0 else f"exit code {code}"


def _command(stage: str, chosen: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "bench.gpu", "--stage", stage, "--out", str(chosen.out)]
    command += ["--quick"] * chosen.quick + ["--dry-run"] * chosen.dry_run
    return command + (["--card", chosen.card] if chosen.card else [])


def _run(command: list[str], seconds: float, log: Path) -> int | None:
    """Run a command, its output in the log. Returns the exit code; None when it ran into the time limit."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("a") as file:
        file.write(f"\n===== {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """The process we started, and what it started (compilers): they share its group."""
    import signal

    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass


# One stage


def run_stage(chosen: argparse.Namespace) -> int:
    device = "cpu" if chosen.dry_run else "cuda"
    name = chosen.stage.removesuffix(_REST)
    store = Store(chosen.out.resolve() / RESULTS, name)  # writes nothing before it is told something
    match name:
        case "environment":
            store.set_facts(command=chosen.command)
            return _environment(store, device, chosen.dry_run)
        case "correctness":
            return _correctness(store, chosen.quick, chosen.dry_run)
        case "sanitizer":
            return _sanitizer(store)
        case "small-cases":
            return _small_cases(device)
        case "first calls":
            return _first_calls(store, chosen)
        case "micro":
            micro.run(store, device, chosen.dry_run)
            return 0
    card = chosen.card or (CARDS[0] if chosen.dry_run else card_of(torch.cuda.get_device_name()))
    if name.startswith(_FIRST_CALL):
        return _first_call(name.removeprefix(_FIRST_CALL), device, card, chosen.dry_run)
    (workload,) = (w for w in WORKLOADS if w.name == name.removesuffix(", whole model"))
    names = peers_of(workload, all_of_them=chosen.stage.endswith(_REST))
    store.set_facts(card=card, device=_device_name(device))
    if name.endswith(", whole model"):
        from bench.peers import whole_model  # imports transformers

        batch = 2 if chosen.dry_run else workload.batch[card]
        whole_model.measure(store, device, name[:2], batch, Budget(), chosen.dry_run)
    elif chosen.dry_run:
        names = tuple(name for name in names if name in _DRY_PEERS)
        measure(workload, store, device, 2, names, Budget(0.02, 60.0, 5), is_tiny=True)
    else:
        budget = Budget(1.5, 20.0, 40) if chosen.quick else Budget()
        measure(workload, store, device, workload.batch[card], names, budget)
    return 0


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU, dry run"


def _environment(store: Store, device: str, is_tiny: bool) -> int:
    """Record the machine and its measured ceilings."""
    import triton

    store.set_facts(
        device=_device_name(device),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        triton=triton.__version__,
        python=platform.python_version(),
        when=time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC",
        card_state=card_state(),
        commit=_commit(),
    )
    if not store.is_done("ceilings"):
        store.start("ceilings")
        store.finish("ceilings", state="ok", **ceilings.as_facts(ceilings.calibrate(device, is_tiny)))
    return 0


def _commit() -> str:
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def _correctness(store: Store, quick: bool, dry_run: bool) -> int:
    """The tests of the kernels, on the device."""
    for tests in DRY_TESTS if dry_run else FIRST_TESTS[:1] if quick else _tests_of_kernels():
        if store.is_done(tests):
            continue
        store.start(tests)
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", tests]
        if not dry_run and _has("xdist"):  # most of the time goes into compiling kernels
            # tests of a group, which need most of the memory, follow each other
            command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "loadgroup"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        print(done.stdout + done.stderr, flush=True)
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        state = "ok" if done.returncode == 0 else "failed"
        store.finish(tests, state=state, summary=lines[-1] if lines else "no output", failed=failed[:50])
    return 0 if all(record["state"] == "ok" for record in store.records.values()) else 1


def _tests_of_kernels() -> list[str]:
    """Files whose tests start kernels: marked ones, and those that compute on a device where one is."""
    signs = re.compile(r'mark\.kernels|DEVICE = "cuda"')
    files = (path for path in sorted((ROOT / "tests").rglob("test_*.py")) if signs.search(path.read_text()))
    return list(dict.fromkeys([*FIRST_TESTS, *(str(path.relative_to(ROOT)) for path in files)]))


def _has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def _sanitizer(store: Store) -> int:
    """Every case at its first, smallest shape, under compute-sanitizer's memory check and race check."""
    tool = shutil.which("compute-sanitizer")
    worst = 0
    for kind in ("memcheck", "racecheck"):
        if store.is_done(kind):
            continue
        if tool is None:
            store.finish(kind, state="absent", why="compute-sanitizer is not on the PATH")
            continue
        store.start(kind)
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-m", "bench.gpu"]
        command += ["--stage", "small-cases"]
        # every tensor an allocation of its own: else what lies beyond one belongs to PyTorch's pool
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        print(done.stdout + done.stderr, flush=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("=========")]
        state = "ok" if done.returncode == 0 else "failed"
        store.finish(kind, state=state, summary=lines[-1] if lines else done.stderr[-300:])
        worst = max(worst, done.returncode)
    return worst


def _small_cases(device: str) -> int:
    """Run each op once, forward and, where it has one, backward, under another tool (the sanitizer)."""
    from trm_kernels.testing.cases import CASES

    for case in CASES:
        dtype = torch.bfloat16
        inputs = [
            t.detach().to(device).requires_grad_(t.requires_grad)
            for t in case.inputs(case.shapes[0], dtype, 0)
        ]
        out = case.op(*inputs)
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        if wanted := [t for t in inputs if t.requires_grad]:
            torch.autograd.grad(outs, wanted, [torch.ones_like(t) for t in outs], allow_unused=True)
        if device == "cuda":
            torch.cuda.synchronize()
        print(case.name, flush=True)
    return 0


def _first_calls(store: Store, chosen: argparse.Namespace) -> int:
    """Time each compiling peer's first call, in parallel. Later timings then find a warm cache."""
    names = [
        f"{workload.name}: {peer}"
        for workload in WORKLOADS
        for peer in (_DRY_PEERS[1:2] if chosen.dry_run else FIRST)
        if not (chosen.quick and workload.name not in QUICK)
    ]
    missing = [name for name in names if not store.is_done(name)]
    for name in missing:
        store.start(name)
    run = partial(subprocess.run, stdout=subprocess.PIPE, text=True)
    with ThreadPoolExecutor(max_workers=len(names)) as pool:
        running = {pool.submit(run, _command(_FIRST_CALL + name, chosen)): name for name in missing}
        for done in as_completed(running):
            name, process = running[done], done.result()
            if process.returncode == 0:
                seconds = float(process.stdout.split()[-1])
                store.finish(name, state="ok", summary=f"{seconds:.1f} s beside the others")
            else:
                store.finish(name, state="failed", why=f"exit code {process.returncode}; the log says more")
    return 0


def _first_call(name: str, device: str, card: str, is_tiny: bool) -> int:
    """name: "W1: ours"; its last word printed is the seconds."""
    workload_name, peer = name.split(": ")
    (workload,) = (w for w in WORKLOADS if w.name == workload_name)
    problem = (workload.make_tiny if is_tiny else workload.make)(
        2 if is_tiny else workload.batch[card], device
    )
    print(Timer(device).once(step_of(PEERS[peer](), problem)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
