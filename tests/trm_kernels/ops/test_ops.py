"""Every op: is it right, forward and backward, in every dtype, and does it refuse what it cannot do?

Where kernels can run (on a CUDA device, or anywhere with TRITON_INTERPRET=1) they are held against the
reference in float64. The reference itself is held against finite differences everywhere.
"""

import sys
from collections import defaultdict

import pytest
import torch
from torch import Tensor
from torch.library import CustomOpDef

from trm_kernels.ops.add_rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm_ref
from trm_kernels.runtime.backend import backend, interpreting
from trm_kernels.testing.cases import CASES, Case

DEVICE = "cpu" if interpreting() else "cuda"
compiles = pytest.mark.skipif(interpreting(), reason="traced as users would, without the interpreter")
reference_alone = pytest.mark.skipif(
    interpreting(), reason="the reference is the same without the interpreter"
)
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
EACH_PRODUCT = pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name.startswith(("linear_", "swiglu_", "injection_"))],
    ids=lambda case: case.name,
)


def is_told_by_its_ops(case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """A recursion's second shape in a narrower dtype: its masks are float32's, its roundings the first's."""
    return case.name.startswith("trm_") and shape != case.shapes[0] and dtype != case.dtypes[0]


EACH_SHAPE = pytest.mark.parametrize(
    ("case", "shape", "dtype"),
    [
        pytest.param(case, shape, dtype, id=f"{case.name}-{'x'.join(map(str, shape))}-{str(dtype)[6:]}")
        for case in CASES
        for shape in case.shapes
        for dtype in case.dtypes
        if not is_told_by_its_ops(case, shape, dtype)
    ],
)


def inputs_of(case: Case, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    return [t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in case.inputs(shape, dtype, seed)]


def run(op, inputs: list[Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Outputs and the gradient of every input that takes one, under a random gradient of the outputs."""
    out = op(*inputs)
    outs = [out] if isinstance(out, Tensor) else list(out)
    g = torch.Generator().manual_seed(seed + 1000)
    # rounded to the dtype of the inputs, so that the float64 run is given the very same gradient
    grads = [torch.randn(t.shape, generator=g).bfloat16().to(t.device, t.dtype) for t in outs]
    taking = {i: t for i, t in enumerate(inputs) if t.requires_grad}
    got = torch.autograd.grad(outs, list(taking.values()), grads) if taking else ()
    named = {f"output {i}": t.detach() for i, t in enumerate(outs)}
    return named | {f"gradient of input {i}": t for i, t in zip(taking, got, strict=True)}


def rms(numbers: list[float]) -> float:
    return (sum(x * x for x in numbers) / len(numbers)) ** 0.5


def error(got: Tensor, true: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((got.double() - true).norm() / true.norm()).item()


def check_closeness(case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Over several seeds: of a few numbers, such as the gate's bias, eager may once come nearer by chance."""
    mine, theirs = defaultdict(list), defaultdict(list)
    seeds = case.seeds if dtype != torch.float32 else min(case.seeds, 3)  # errors differ much in 16 bits
    for seed in range(seeds):
        inputs = inputs_of(case, shape, dtype, seed)
        true = run(case.ref, [t.detach().double().requires_grad_(t.requires_grad) for t in inputs], seed)
        eager = run(case.ref, inputs, seed)
        with backend("triton"):
            ours = run(case.op, inputs, seed)
        for name, want in true.items():
            assert ours[name].dtype == eager[name].dtype
            assert ours[name].shape == eager[name].shape
            mine[name].append(error(ours[name], want))
            theirs[name].append(error(eager[name], want))
            if dtype == torch.float32:
                assert error(ours[name], eager[name].double()) <= (1e-5 if "output" in name else 5e-5)
    for name in true:
        numbers = seeds * true[name].numel()
        few = 2 * torch.finfo(dtype).eps * numbers**-0.5 if numbers < 100 else 0.0
        limit = 1.1 * rms(theirs[name]) + case.floor[dtype] + few
        assert rms(mine[name]) <= limit, f"{name}: errors {mine[name]}, of eager {theirs[name]}"


@pytest.mark.kernels
@EACH_SHAPE
def test_as_close_to_the_truth_as_eager(case, shape, dtype):
    check_closeness(case, shape, dtype)


# in the interpreter programs follow each other: what is left over between two calls is the same in any dtype
RERUN = (torch.float32,) if interpreting() else (torch.float32, torch.bfloat16)


@pytest.mark.kernels
@EACH
@pytest.mark.parametrize("dtype", RERUN, ids=str)
def test_reruns_are_equal_bit_for_bit(case, dtype):
    inputs = inputs_of(case, case.shapes[-1], dtype)
    with backend("triton"):
        first, second = run(case.op, inputs), run(case.op, inputs)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def apart(t: Tensor) -> Tensor:
    """The same values, the rows of the last axis cut out of wider ones."""
    beside = torch.nan if t.is_floating_point() else 127
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 13), beside, dtype=t.dtype, device=t.device)
    wide[..., 5:-8] = t
    return wide[..., 5:-8]


def turned(t: Tensor) -> Tensor:
    """The same values, the last two axes stored the other way round; of one axis, every second element."""
    if t.ndim < 2:
        return t.repeat_interleave(2)[::2]
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.kernels
@EACH
def test_views_give_what_their_copies_give(case):
    inputs = inputs_of(case, case.shapes[1], torch.float32)
    with backend("triton"):
        of_copies = run(case.op, inputs)
        for view in (apart, turned):
            of_views = run(case.op, [view(t.detach()).requires_grad_(t.requires_grad) for t in inputs])
            for name in of_copies:
                assert torch.equal(of_copies[name], of_views[name]), f"{name}, {view.__name__}"


@pytest.mark.kernels
def test_a_gradient_that_is_an_expanded_view():
    (case, *_) = CASES
    x, r = inputs_of(case, (5, 40), torch.float32)
    with backend("triton"):
        (dx,) = torch.autograd.grad(add_rms_norm(x, r).sum(), x)
    (want,) = torch.autograd.grad(add_rms_norm_ref(x, r).sum(), x)
    assert error(dx, want.double()) < 1e-5


@pytest.mark.kernels
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,), (1, 1)], ids=str)
def test_no_rows_and_single_rows(shape):
    x = torch.randn(shape, device=DEVICE)
    with backend("triton"):
        y = add_rms_norm(x, x)
    torch.testing.assert_close(y, add_rms_norm_ref(x, x), rtol=1e-5, atol=1e-6)


@pytest.mark.kernels
def test_eps_is_used():
    x = torch.full((2, 8), 1e-3, device=DEVICE)
    with backend("triton"):
        y = add_rms_norm(x, x, eps=12e-6)
    torch.testing.assert_close(y, torch.full_like(y, 0.5), rtol=1e-5, atol=0)


@pytest.mark.kernels
@pytest.mark.skipif(not interpreting(), reason="reads a sparse file, which a GPU cannot")
def test_row_offsets_beyond_31_bits(tmp_path):
    """Three rows 2^30 elements apart: the last one starts where a 32-bit offset would turn negative."""
    stride = 2**30
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride + 8, dtype=torch.float16)
    x = storage.as_strided((3, 8), (stride, 1))
    x.copy_(torch.arange(24.0).view(3, 8))
    with backend("triton"):
        y = add_rms_norm(x, x)
    torch.testing.assert_close(y, add_rms_norm_ref(x, x), rtol=2e-3, atol=0)


@pytest.mark.kernels
@EACH
def test_custom_ops_keep_their_promises(case, monkeypatch):
    """Schema and fake agree with what the launchers do: those a case calls, on what it calls them with."""
    called = []
    for name, op_file in sorted(sys.modules.items()):
        for key, op in list(vars(op_file).items()) if name.startswith("trm_kernels.") else ():
            if isinstance(op, CustomOpDef):

                def kept(*args, op=op):
                    called.append((op, args))
                    return op(*args)

                monkeypatch.setattr(op_file, key, kept)
    with backend("triton"):
        run(case.op, inputs_of(case, case.shapes[1], torch.float32))
    monkeypatch.undo()
    assert called
    checked = set()  # a recursion calls the same op on the same shapes again and again
    for op, args in called:
        args = [t.detach() if isinstance(t, Tensor) else t for t in args]
        of_args = str([(t.shape, t.stride(), t.dtype) if isinstance(t, Tensor) else t for t in args])
        if (op, of_args) not in checked:
            checked.add((op, of_args))
            torch.library.opcheck(op, tuple(args), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.kernels
@EACH
def test_kernels_pass_through_torch_compile(case):
    """With sizes that change, or, for most variants of an op, with sizes compiled in."""
    torch._dynamo.reset()  # several cases share the code of an op
    dynamic = "-" not in case.name or case.name == "rope_attention-padded"
    compiled = torch.compile(case.op, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with backend("triton"):
        for shape in case.shapes[1 : 3 if dynamic else 2]:
            inputs = inputs_of(case, shape, torch.float32)
            eager, traced = run(case.op, inputs), run(compiled, inputs)
            for name in eager:
                assert torch.equal(eager[name], traced[name]), name


@pytest.mark.kernels
def test_a_second_derivative_is_an_error_not_a_wrong_number():
    (case, *_) = CASES
    x, r = inputs_of(case, (2, 32), torch.float32)
    with backend("triton"):
        (dx,) = torch.autograd.grad(add_rms_norm(x, r).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            dx.sum().backward()


@reference_alone
@EACH
def test_reference_against_finite_differences(case):
    """First and second derivative, in float64."""
    given = case.inputs(case.shapes[1], torch.float32, 0)
    if not all(t.is_floating_point() for t in given):
        pytest.skip(f"{case.name} has weights in 8 bits, which have no gradient")
    inputs = [t.detach().double().requires_grad_() for t in given]
    assert torch.autograd.gradcheck(case.ref, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(case.ref, inputs, fast_mode=True)


def test_reference_against_the_formula():
    x, r = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    want = torch.tensor([[3.0, 4.0]]) / (12.5 + 0.5) ** 0.5
    torch.testing.assert_close(add_rms_norm_ref(x, r, eps=0.5), want)
    torch.testing.assert_close(rms_norm_ref(x + r, eps=0.5), want)


def test_reference_does_not_round_the_sum():
    """The sum of two bfloat16 numbers is seldom one: it stays float32 until the end."""
    g = torch.Generator().manual_seed(0)
    x, r = (torch.randn(1, 64, generator=g).bfloat16() for _ in range(2))
    h = x.float() + r.float()
    want = (h * torch.rsqrt(h.square().mean() + 1e-5)).bfloat16()
    assert torch.equal(add_rms_norm_ref(x, r), want)


@compiles
def test_reference_passes_through_torch_compile():
    compiled = torch.compile(add_rms_norm, backend="aot_eager", fullgraph=True)
    x, r = (torch.randn(3, 40, requires_grad=True) for _ in range(2))
    assert torch.equal(compiled(x, r), add_rms_norm(x, r))
    for got, want in zip(
        torch.autograd.grad(compiled(x, r).square().sum(), (x, r)),
        torch.autograd.grad(add_rms_norm(x, r).square().sum(), (x, r)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@compiles
def test_reference_passes_through_torch_export():
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return add_rms_norm(x, r)

    x, r = torch.randn(3, 40), torch.randn(3, 40)
    exported = torch.export.export(Module(), (x, r), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) * 2)
    more = torch.randn(7, 40)
    assert torch.equal(exported.module()(more, -2 * more), add_rms_norm(more, -2 * more))


ZEROS = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("x", "r", "says"),
    [
        (ZEROS, torch.zeros(2, 5), r"one shape \[..., D\] with D > 0, got \(2, 4\) and \(2, 5\)"),
        (torch.zeros(2, 0), torch.zeros(2, 0), r"D > 0, got \(2, 0\) and \(2, 0\)"),
        (torch.zeros(()), torch.zeros(()), r"D > 0, got \(\) and \(\)"),
        (ZEROS, ZEROS.half(), r"one dtype, .* got torch.float32 and torch.float16"),
        (ZEROS.int(), ZEROS.int(), r"one dtype, .* got torch.int32 and torch.int32"),
        (ZEROS, ZEROS.to("meta"), r"on one device, got cpu and meta"),
    ],
    ids=["shapes", "D of 0", "no axis", "dtypes", "integers", "devices"],
)
def test_add_rms_norm_refuses(x, r, says):
    with pytest.raises(ValueError, match=f"^add_rms_norm: expected .*{says}"):
        add_rms_norm(x, r)
