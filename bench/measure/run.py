"""One workload and its peers: each is checked, timed next to ours, and stored.

Checked: the outputs and the input gradients of the first row of the batch, against float64. An answer is
wrong when its error exceeds 1.5 times that of the TRM paper's own code in the same precision. Gradients of
matrices are sums over the whole batch; they are compared with those of that code. A wrong answer is not
timed.

Timed: in rounds that alternate between the peer and ours. A CUDA graph is timed against ours as a CUDA graph.
"""

import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from bench.measure.store import Store
from bench.measure.timing import Run, Timer, captured, card_state, peak_bytes, ratios, spread
from bench.peers.solvers import PEERS, paper
from bench.peers.workloads import Problem, Solver, Workload

BROKEN_DEVICE = 3  # exit code: start again, the rest is still to be measured

LIMIT, FLOOR = 1.5, 1e-4
# two that are both as far from the truth as is allowed are further from each other
LIMIT_BETWEEN, FLOOR_BETWEEN = 2.5, 1e-3


@dataclass(frozen=True)
class Budget:
    """How long a peer may take."""

    seconds: float = 4.0  # of timing, and again of timing with cold caches
    limit: float = 120.0  # of all of it, compilation included; then it is given up
    rounds: int = 60  # at most


def difference(got: Tensor, want: Tensor) -> float:
    """The relative difference in the Frobenius norm; infinite when a value is not finite."""
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    want = want.detach().double()
    return float((got.detach().double() - want).norm() / want.norm())


class Judge:
    """Says whether an answer to a problem is right."""

    def __init__(self, problem: Problem) -> None:
        theirs = paper()
        self.problem = problem
        try:
            self.truth = problem.cast(torch.float64, rows=1).step(theirs)()
            self.precision = "float64"
        except torch.OutOfMemoryError:
            self.truth = problem.cast(torch.float32, rows=1).step(theirs)()
            self.precision = "float32"
        bfloat16 = problem.cast(problem.h.dtype, rows=1, keep_weights=True).step(theirs)()
        self.errors = [difference(got, true) for got, true in zip(bfloat16, self.truth, strict=True)]
        self.truth = self.truth[:2]
        try:
            self.matrices: list[Tensor] | None = problem.step(theirs)()[2:]
        except torch.OutOfMemoryError:
            self.matrices = None  # the paper's code does not fit: gradients of matrices are not compared

    def complaints(self, answer: list[Tensor]) -> tuple[float, list[str]]:
        """The largest error against float64, and a list of what is wrong."""
        found, worst = [], 0.0
        for i, (name, true) in enumerate(zip(("result", "gradient of the input"), self.truth, strict=False)):
            error = difference(answer[i][:1], true)
            worst = max(worst, error)
            if not error <= (limit := LIMIT * self.errors[i] + FLOOR):
                found.append(f"error of the {name} {error:.1e}, allowed {limit:.1e}")
        for i, theirs in enumerate(self.matrices or [], start=2):
            apart = difference(answer[i], theirs)
            if not apart <= (limit := LIMIT_BETWEEN * self.errors[i] + FLOOR_BETWEEN):
                found.append(
                    f"gradient of matrix {i - 2} {apart:.1e} from the paper's code, allowed {limit:.1e}"
                )
        return worst, found


def step_of(solver: Solver, problem: Problem) -> Run:
    """The function that is timed."""
    step = problem.step(solver)
    if solver.is_graphed:
        return captured(step)
    if not solver.marks_steps:
        return step

    def marked() -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return step()

    return marked


def measure(
    workload: Workload,
    store: Store,
    device: str,
    batch: int,
    names: tuple[str, ...],
    budget: Budget,
    is_tiny: bool = False,
) -> None:
    """Every peer that `store` does not have yet."""
    missing = [name for name in names if not store.is_done(name)]
    if not missing:
        return
    torch._dynamo.config.recompile_limit = 64  # f, with and without gradients, of several kinds of tensors
    problem = (workload.make_tiny if is_tiny else workload.make)(batch, device)
    timer = Timer(device)
    judge = Judge(problem)
    store.set_facts(
        workload=workload.name,
        title=workload.title,
        batch=batch,
        tokens=workload.tokens,
        truth=judge.precision,
    )
    beside: dict[str, Run] = {}
    for name in missing:
        print(f"{workload.name}, {name}", flush=True)
        store.start(name)
        try:
            with within(budget.limit):
                store.finish(name, **_measure_one(name, workload, problem, judge, timer, budget, beside))
        except ModuleNotFoundError as error:
            store.finish(name, state="absent", why=str(error))
        except Exception as error:  # a peer that cannot run is a result too
            store.finish(name, state="failed", why=in_short(error))
            if "CUDA error" in str(error):  # the process can do nothing more on this device
                raise SystemExit(BROKEN_DEVICE) from error
        gc.collect()
        torch.compiler.reset()
        if timer.on_gpu:
            torch.cuda.empty_cache()


def _measure_one(
    name: str,
    workload: Workload,
    problem: Problem,
    judge: Judge,
    timer: Timer,
    budget: Budget,
    beside: dict[str, Run],
) -> dict[str, Any]:
    solver = PEERS[name]()
    run = step_of(solver, problem)
    first = timer.once(run)
    error, wrong = judge.complaints(run())
    facts: dict[str, Any] = {"error": error, "first_call_s": first}
    if wrong:
        return {"state": "wrong", "why": "; ".join(wrong), **facts}
    device = "cuda" if timer.on_gpu else "cpu"
    facts["peak_bytes"] = None if solver.is_graphed else peak_bytes(run, device)
    ours = _ours_beside(name, solver.is_graphed, run, problem, beside)
    runs = {"it": run} | ({"ours": ours} if ours else {})
    for kind in ("warm", "flushed") if workload.flushed else ("warm",):
        times = timer.interleaved(runs, budget.seconds, budget.rounds, kind == "flushed")
        facts[kind] = spread(times["it"])
        if ours:
            facts[kind] |= {"ours": spread(times["ours"]), "ours_faster": ratios(times["it"], times["ours"])}
    return {"state": "ok", **facts, "card": card_state() if timer.on_gpu else {}}


def _ours_beside(
    name: str, is_graphed: bool, run: Run, problem: Problem, beside: dict[str, Run]
) -> Run | None:
    """Ours, run in the same way, as the other half of a pair. Ours against itself shows the noise."""
    mine = "ours, CUDA graph" if is_graphed else "ours"
    if name == mine:
        beside[mine] = run
    if mine not in beside:
        try:
            beside[mine] = step_of(PEERS[mine](), problem)
            beside[mine]()
        except Exception:
            beside.pop(mine, None)  # its own record says why
            return None
    return beside[mine]


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block when it takes longer. Native library code is not interrupted."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
