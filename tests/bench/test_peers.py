"""Our own peers give right answers at the workloads, wherever kernels can run."""

import pytest
import torch

from bench.measure.run import Judge
from bench.peers.solvers import PEERS, peers_of
from bench.peers.workloads import WORKLOADS
from trm_kernels.runtime.backend import interpreting

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
ONE_EACH = [w for w in WORKLOADS if w.name not in ("W2", "W4-16", "W6-8")]  # the others differ in numbers


def ours(workload) -> list[str]:
    """All at the first workload; at the others the one that is compared, and what only runs there."""
    first, names = (
        [name for name in peers_of(w, True) if name.startswith("ours") and "graph" not in name]
        for w in (ONE_EACH[0], workload)
    )
    return [name for name in names if workload is ONE_EACH[0] or name == "ours" or name not in first]


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("workload", "name"),
    [(w, name) for w in ONE_EACH for name in ours(w)],
    ids=lambda it: getattr(it, "name", it),
)
def test_ours_is_right_at_every_workload(workload, name):
    problem = workload.make_tiny(2, DEVICE)
    assert Judge(problem).complaints(problem.step(PEERS[name]())())[1] == []


def test_one_launch_is_timed_where_nothing_is_learned():
    named = {w.name: [n for n in peers_of(w, False) if "one launch" in n] for w in WORKLOADS}
    assert all(bool(names) != w.has_backward for w, names in zip(WORKLOADS, named.values(), strict=True))
