"""W1 to W6, each peer: `pytest bench`. With a GPU at the card's sizes; without one small, and on the CPU.

On a CPU the peers that need no GPU are timed, TRM's eager code and torch.compile among them. That checks the
benchmark and predicts nothing for a GPU. A wrong answer is not timed.
"""

from typing import Any

import pytest
import torch

from bench.measure.run import Judge, step_of
from bench.measure.timing import Run, peak_bytes
from bench.peers.solvers import PEERS, peers_of
from bench.peers.workloads import WORKLOADS, Problem, card_of

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ROUNDS = 50 if ON_GPU else 5
ON_CPU = ("eager", "TRM paper's eager", "torch.compile")
# what torch.compile takes half a minute for on a CPU; the others show the same there
COMPILED_ON_CPU = ("W1", "W5")

_judges: dict[str, tuple[Problem, Judge]] = {}  # of the workload in progress


def _judge(name: str, card: str | None) -> tuple[Problem, Judge]:
    if name not in _judges:
        _judges.clear()
        (workload,) = (w for w in WORKLOADS if w.name == name)
        if ON_GPU:
            card = card or card_of(torch.cuda.get_device_name())
            problem = workload.make(workload.batch[card], DEVICE)
        else:
            problem = workload.make_tiny(2, DEVICE)
        _judges[name] = problem, Judge(problem)
    return _judges[name]


def _jobs() -> list[Any]:
    jobs = [(w, peer) for w in WORKLOADS for peer in peers_of(w, all_of_them=True)]
    if not ON_GPU:
        jobs = [(w, peer) for w, peer in jobs if peer in ON_CPU]
        jobs = [(w, peer) for w, peer in jobs if peer != "torch.compile" or w.name in COMPILED_ON_CPU]
    return [pytest.param(w.name, peer, id=f"{w.name}-{peer}") for w, peer in jobs]


@pytest.mark.skipif(ON_GPU, reason="all of it ran")
def bench_the_rest() -> None:
    peers = ", ".join(name for name in PEERS if name not in ON_CPU)
    pytest.skip(f"{peers} need a CUDA device, and PyTorch finds none")


@pytest.mark.parametrize(("name", "peer"), _jobs())
def bench_workload(benchmark: Any, pytestconfig: pytest.Config, name: str, peer: str) -> None:
    problem, judge = _judge(name, pytestconfig.getoption("card"))
    try:
        solver = PEERS[peer]()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64
    run: Run = step_of(solver, problem)
    if wrong := judge.complaints(run())[1]:
        pytest.fail(f"wrong, so not timed: {'; '.join(wrong)}")

    def timed() -> None:
        run()
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.group = name
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name() if ON_GPU else "CPU, tiny",
        torch=torch.__version__,
        peak_bytes=peak_bytes(run, DEVICE),
        batch=problem.h.shape[0],
    )
    benchmark.pedantic(timed, rounds=ROUNDS, warmup_rounds=3)
