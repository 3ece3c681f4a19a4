"""Each op, each peer, forward, and forward with backward: `pytest bench`.

A wrong answer is not timed. Times are medians over rounds, read after the device is idle, with their spread.
Without a GPU, eager and torch.compile are timed on the CPU, for some ops, at small sizes. That checks the
benchmark and predicts nothing for a GPU.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.peers.solvers import OP_PEERS, Op
from trm_kernels.testing.cases import CASES, Case, Shape

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16
ROUNDS = 50 if ON_GPU else 5
ON_CPU = ("eager", "torch.compile")
OPS_ON_CPU = (
    "add_rms_norm",
    "swiglu_mlp-mm",
    "rope_attention_causal",
)  # each compiles for seconds


def _run(op: Op, inputs: list[Tensor], backward: bool) -> list[Tensor]:
    """The outputs or, with `backward`, the gradients of the inputs under outputs' gradients of one."""
    out = op(*inputs)
    outs = [out] if isinstance(out, Tensor) else list(out)
    if not backward:
        return outs
    taking = [t for t in inputs if t.requires_grad]
    return list(torch.autograd.grad(outs, taking, [torch.ones_like(t) for t in outs]))


def _check(case: Case, op: Op, inputs: list[Tensor], backward: bool) -> None:
    """Apply the rule of the tests: at most 1.1 times the error of eager, both against float64."""
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    truth = _run(case.ref, doubles, backward)
    eager = _run(case.ref, inputs, backward)
    for got, plain, true in zip(_run(op, inputs, backward), eager, truth, strict=True):
        mine, theirs = (((t.double() - true).norm() / true.norm()).item() for t in (got, plain))
        assert mine <= 1.1 * theirs + case.floor[DTYPE], (
            f"wrong, so not timed: {mine:.2e}, eager {theirs:.2e}"
        )


def _jobs() -> list[Any]:
    return [
        pytest.param(case, shape, id=f"{case.name}-{'x'.join(map(str, shape))}")
        for case in CASES
        if ON_GPU or case.name in OPS_ON_CPU
        for shape in (case.bench if ON_GPU else case.shapes[-1:])
    ]


@pytest.mark.parametrize("backward", (False, True), ids=("forward", "forward+backward"))
@pytest.mark.parametrize(("case", "shape"), _jobs())
@pytest.mark.parametrize("peer", OP_PEERS if ON_GPU else ON_CPU)
def bench_op(benchmark: Any, peer: str, case: Case, shape: Shape, backward: bool) -> None:
    op = OP_PEERS[peer](case.name)
    if op is None:
        pytest.skip(f"{peer} has no {case.name}")
    inputs = [t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in case.inputs(shape, DTYPE, 0)]
    if backward and not any(t.requires_grad for t in inputs):
        pytest.skip(f"{case.name} has no backward")
    _check(case, op, inputs, backward)

    def timed() -> None:
        _run(op, inputs, backward)
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{case.name} {shape} {'forward+backward' if backward else 'forward'}"
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name() if ON_GPU else "CPU",
        torch=torch.__version__,
        dtype=str(DTYPE),
        forward_bytes=case.moved(inputs),
    )
    benchmark.pedantic(timed, rounds=ROUNDS, warmup_rounds=3)


@pytest.mark.skipif(ON_GPU, reason="all of it ran above")
def bench_the_rest() -> None:
    peers = ", ".join(name for name in OP_PEERS if name not in ON_CPU)
    ops = f"{len(CASES) - len(OPS_ON_CPU)} other ops"
    pytest.skip(f"{peers}, and {ops}, need a CUDA device, and PyTorch finds none")
