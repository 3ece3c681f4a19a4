"""What only a CUDA device can answer: hybrids on the kernels, graphs, endless repetition, very long tensors.

The other tests run on a device too, wherever they compare kernels with their reference; these need one.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure.timing import captured
from tests.support.tiny import FAMILIES, tiny_hybrid, tokens
from trm_kernels import TRM
from trm_kernels.runtime.backend import backend, interpreting
from trm_kernels.testing.cases import CASES, Case

needs_cuda = pytest.mark.skipif(interpreting() or not torch.cuda.is_available(), reason="needs a CUDA device")
every_family = pytest.mark.parametrize("family", FAMILIES)
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def logits_and_gradients(hybrid, ids: Tensor, name: str) -> list[Tensor]:
    with backend(name):
        output = hybrid(ids, labels=ids, use_cache=False)
        trained = [p for p in hybrid.trm_parameters() if p.requires_grad]
        return [output.logits, *torch.autograd.grad(output.loss, trained)]


@pytest.mark.kernels
@needs_cuda
@every_family
def test_a_hybrid_on_the_kernels_is_as_close_to_the_truth_as_eager(family):
    hybrid, ids = tiny_hybrid(family, grad_cycles=None).freeze_base().cuda(), tokens().cuda()
    truth = logits_and_gradients(copy.deepcopy(hybrid).double(), ids, "reference")
    ours, eager = (logits_and_gradients(hybrid, ids, name) for name in ("triton", "reference"))
    for i, (mine, theirs, true) in enumerate(zip(ours, eager, truth, strict=True)):
        error, of_eager = ((t.double() - true).norm() / true.norm() for t in (mine, theirs))
        # three loops and what is between them carry one rounding on: what two float32 ways may differ by
        assert error <= 1.1 * of_eager + (5e-5 if i else 1e-5)


@pytest.mark.kernels
@needs_cuda
@every_family
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_kernels_tell_what_the_reference_tells(family, cache):
    """Greedy, left-padded too; a static cache is compiled by transformers, graphs included."""
    if family == "bloom" and cache == "static":
        pytest.skip("transformers 5.17: bloom's own static cache fails")
    hybrid = tiny_hybrid(family).cuda()
    ids = torch.cat((torch.zeros(2, 3, dtype=torch.long), tokens()), dim=1).cuda()
    ids[1, 3:5] = 0
    told = []
    for name in ("reference", "triton"):
        with backend(name):
            how = {"cache_implementation": cache} if cache == "static" else {}
            told.append(hybrid.generate(ids, attention_mask=(ids != 0).long(), **GREEDY, **how))
    assert torch.equal(*told)


@pytest.mark.kernels
@needs_cuda
def test_a_forward_compiles_in_one_graph_and_can_be_captured():
    torch._dynamo.reset()
    hybrid, ids = tiny_hybrid("llama").cuda(), tokens().cuda()
    with torch.no_grad(), backend("triton"):
        want = hybrid(ids, use_cache=False).logits
        compiled = torch.compile(hybrid, fullgraph=True)
        assert (compiled(ids, use_cache=False).logits - want).norm() <= 1e-5 * want.norm()
        replay = captured(lambda: hybrid(ids, use_cache=False).logits)
        other = tokens(seed=5).cuda()
        ids.copy_(other)
        assert torch.equal(replay(), hybrid(other, use_cache=False).logits)


@pytest.mark.kernels
@needs_cuda
@pytest.mark.parametrize("save", ["all", "layer", "step"])
def test_ten_thousand_backwards_are_equal_bit_for_bit(save):
    """A race, or an order of sums that is left to chance, shows sooner or later."""
    torch.manual_seed(0)
    options = {"num_recursion_steps": 2, "num_cycles": 2, "grad_cycles": None, "save": save}
    trm = TRM(64, 2, 2, device="cuda", dtype=torch.bfloat16, **options)
    x = torch.randn(4, 97, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    trained = [x, *trm.parameters()]

    def step() -> list[Tensor]:
        with backend("triton"):
            y, _ = trm(x)
            return list(torch.autograd.grad(y.float().square().sum(), trained, allow_unused=True))

    first = [g for g in step() if g is not None]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    def compare() -> None:
        for got, want in zip((g for g in step() if g is not None), first, strict=True):
            wrong.add_((got != want).sum())

    replay = captured(compare)
    for _ in range(10_000):
        replay()
    assert wrong == 0 and all(g.isfinite().all() for g in first)


# Long tensors: an offset that is 32 bits wide goes wrong beyond 2^31 elements

ROWS = 7  # of the first axis; no weight of the cases has as many
_LONG = [case for case in CASES if "one-launch" not in case.name and "-decode" not in case.name]


def long_and_short(
    case: Case, op: Callable[..., Any], device: str, elements: int
) -> tuple[list[Tensor], list[Tensor]]:
    """(the end of what comes out of repeated rows, what comes out of these rows): one tensor > `elements`.

    Results and, of all ops but the whole recursion, whose backward would not fit, gradients of the rows.
    """
    shape, dtype = (ROWS, *case.shapes[-1][1:]), case.dtypes[-1]
    small = [t.detach().to(device) for t in case.inputs(shape, dtype, 0)]
    taking = [t.requires_grad for t in case.inputs(shape, dtype, 0)]
    with_gradient = any(taking) and not case.name.startswith("trm_recursion")
    with torch.no_grad():
        out = op(*small)
    rows = [t for t in (*small, *([out] if isinstance(out, Tensor) else out)) if len(t) == ROWS]
    times = elements // max(t.numel() for t in rows) + 1

    def run(times: int) -> list[Tensor]:
        inputs = [
            (t.repeat(times, *[1] * (t.ndim - 1)) if len(t) == ROWS else t).requires_grad_(takes)
            for t, takes in zip(small, taking, strict=True)
        ]
        with torch.set_grad_enabled(with_gradient):
            out = op(*inputs)
        outs = [out] if isinstance(out, Tensor) else list(out)
        found = [t[-ROWS:].detach() for t in outs]
        if with_gradient:
            ones = [torch.ones_like(t) for t in outs]
            wanted = [t for t, s in zip(inputs, small, strict=True) if t.requires_grad and len(s) == ROWS]
            found += [g[-ROWS:] for g in torch.autograd.grad(outs, wanted, ones)]
        return [t.clone() for t in found]

    return run(times), run(1)


def check_the_end(case: Case, op: Callable[..., Any], device: str, elements: int) -> None:
    at_the_end, alone = long_and_short(case, op, device, elements)
    for got, want in zip(at_the_end, alone, strict=True):
        # a library may sum in another order when there are more rows
        assert (got.double() - want.double()).norm() <= 2 * torch.finfo(want.dtype).eps * want.double().norm()


@pytest.mark.kernels
@needs_cuda
@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("case", _LONG, ids=lambda case: case.name)
def test_rows_beyond_two_to_the_31_elements(case):
    free = torch.cuda.mem_get_info()[0]
    if free < 100e9:
        pytest.skip(f"needs 100 GB of device memory, and {free / 1e9:.0f} GB are free")
    with backend("triton"):
        check_the_end(case, case.op, "cuda", 2**31)
    torch.cuda.empty_cache()


@pytest.mark.skipif(interpreting(), reason="of the check itself, with the reference")
@pytest.mark.parametrize("case", _LONG, ids=lambda case: case.name)
def test_the_check_of_long_tensors_itself(case):
    check_the_end(case, case.ref, "cpu", 2**12)
