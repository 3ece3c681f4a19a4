"""Plans say at every size what Python would launch, and a plan that is carried out computes the recursion."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trm_kernels.export.launch_plan import (
    _PROBES,
    CALLS,
    Address,
    CopyStep,
    KernelStep,
    Term,
    Variant,
    _Lowered,
    decode_keys,
    plan,
    record_call,
    row_limits,
    sizes_of,
    term,
)
from trm_kernels.export.native import read_variants
from trm_kernels.export.warmup import module_of
from trm_kernels.runtime import tuning
from trm_kernels.runtime.backend import backend, interpreting
from trm_kernels.runtime.launch import record
from trm_kernels.runtime.precision import wide

DECLARED = Path(__file__).parents[3] / "native" / "variants.toml"
TINY = Variant(
    "tiny",
    64,
    4,
    num_layers=2,
    num_key_value_heads=2,
    intermediate_size=144,
    num_recursion_steps=2,
    num_cycles=2,
)
ARCHS = ("any", "sm80", "sm90")

# of each call, sizes that no plan was made from: few rows, whole blocks, more than one block of everything
ELSEWHERE = {
    "forward": [(1, 2), (1, 128), (4, 256), (3, 511), (129, 2), (41, 100)],
    "extend": [(1, 2, 0, 2), (1, 128, 128, 256), (4, 64, 3, 1000), (33, 17, 511, 600)],
    "decode": [(2, 1, 0, 1), (64, 1, 255, 256), (300, 1, 17, 40)],
    "decode-long": [(2, 1, 256, 257), (64, 1, 511, 512), (300, 1, 5000, 6000)],
}
ELSEWHERE["resume"] = ELSEWHERE["forward"]


def at(value, sizes):
    """A value of a plan with numbers in place of terms."""
    if isinstance(value, Address):
        return value.buffer.role, value.offset.at(sizes)
    return value.at(sizes) if isinstance(value, Term) else value


def as_recorded(lowered):
    """(kernel, grid, arguments) of each launch, tensors as (role, offset); (target, source) of each copy."""
    for step, places, *more in lowered.steps:
        if more:
            yield [(buffer.role, offset) for buffer, offset in (places, *more)]
            continue
        values = list(step.args)
        for i, (buffer, offset) in places.items():
            values[i] = buffer.role, offset
        yield step.kernel, (*step.grid, 1, 1)[:3], values


def as_planned(steps, sizes):
    for step in steps:
        if isinstance(step, CopyStep):
            yield [at(step.target, sizes), at(step.source, sizes)]
        else:
            grid = tuple(axis.at(sizes) for axis in step.grid)
            yield step.launch.kernel, grid, [at(value, sizes) for value in step.values]


def plan_for(variant, call, arch, sizes):
    """The plan that serves these sizes, as native/src/plan.c finds it."""
    return plan(variant, call, arch, next(n for n in row_limits(variant, arch) if n >= sizes.B * sizes.T))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("call", CALLS)
def test_a_plan_says_at_every_size_what_is_launched(call, arch):
    for numbers in ELSEWHERE[call]:
        sizes = sizes_of(*numbers)
        made = plan_for(TINY, call, arch, sizes)
        lowered = _Lowered(record_call(TINY, call, arch, sizes))
        assert list(as_planned(made.steps, sizes)) == list(as_recorded(lowered))
        assert sum(size.at(sizes) for size in made.work) <= sum(lowered.work_bytes)


def test_a_plan_has_no_descriptors():
    """The library passes addresses and numbers."""
    row = replace(tuning.gemm("linear_residual", "sm90", 2, True), by_descriptors=True)
    with tuning.using("linear_residual", row), pytest.raises(ValueError, match="got sm90 and r None"):
        record_call(TINY, "forward", "sm90", sizes_of(1, 128))


@pytest.mark.parametrize("variant", read_variants(DECLARED), ids=lambda variant: variant.name)
def test_what_is_declared_has_plans_too(variant):
    for call in variant.calls:
        sizes = sizes_of(*ELSEWHERE[call][0])
        made = plan_for(variant, call, "sm90", sizes)
        lowered = _Lowered(record_call(variant, call, "sm90", sizes))
        assert list(as_planned(made.steps, sizes)) == list(as_recorded(lowered))


@pytest.mark.parametrize("arch", ("sm80", "sm90"))
@pytest.mark.parametrize("B, T", [(2, 24), (3, 129)])
def test_a_plan_is_what_the_module_launches(arch, B, T):
    """By its public door, but for the products that PyTorch has torch.mm do."""
    variant = replace(TINY, causal=False)
    module = module_of(variant)
    with torch.no_grad(), record(arch) as launches:
        module(torch.empty(B, T, 64, dtype=torch.bfloat16, device="meta"))
    sizes = sizes_of(B, T)
    planned = [
        (kernel, grid, values)
        for kernel, grid, values in as_planned(plan_for(variant, "forward", arch, sizes).steps, sizes)
        if not (kernel.fn.__name__ == "_linear_residual_fwd_kernel" and values[2] is None)
    ]
    assert len(planned) == len(launches) == 4 * variant.evaluations + variant.evaluations + 2 * 2 + 1
    for (kernel, grid, values), launch in zip(planned, launches, strict=True):
        assert (kernel, grid) == (launch.kernel, (*launch.grid, 1, 1)[:3])
        numbers = [v for v in values if not isinstance(v, tuple)]
        assert numbers == [v for v in launch.args if not isinstance(v, torch.Tensor)]


def test_terms():
    probes = _PROBES["extend"]
    for wanted in (
        Term(0),
        Term(7),
        Term(3, ("B", "T")),
        Term(128, ("B", "C")),
        Term(64, ("P",)),
        Term(6, (), ("B", "T"), 64),
        Term(4, ("B",), ("S",), 256),
        Term(1, (), ("B", "T"), 2, times=3),
    ):
        assert term([wanted.at(s) for s in probes], probes) == wanted
    with pytest.raises(AssertionError, match="no term"):
        term((1, 2, 4, 5, 7, 9), probes)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "float8"}, "expected dtype in"),
        ({"num_heads": 5}, "multiple of"),
        ({"intermediate_size": 100}, "multiples of 16"),
        ({"num_cycles": 0}, "at least 1"),
    ],
)
def test_a_variant_that_cannot_be_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changed)


class Machine:
    """Carries out plans in one process: memory is CPU tensors, kernels run in Triton's interpreter."""

    def __init__(self, variant, module, positions):
        self.variant, self.memory = variant, {}
        weights = dict(module.named_parameters())
        initial = [weights.pop("y_init"), weights.pop("z_init")]
        for i, weight in enumerate([*weights.values(), *initial]):
            self.memory["weight", i] = weight.detach().clone()
        frequencies = variant.rope_theta ** -(
            torch.arange(0, variant.head_width, 2).float() / variant.head_width
        )
        angles = torch.arange(positions)[:, None] * frequencies
        self.memory["cos", 0], self.memory["sin", 0] = angles.cos(), angles.sin()

    def run(self, call, sizes, x, **more):
        self.memory["x", 0] = x.clone()
        self.memory |= {(role, 0): t.clone() for role, t in more.items()}
        self.memory |= {(role, 0): torch.full_like(x, torch.nan) for role in ("y_out", "z_out")}
        made = plan(self.variant, call, "any")
        for i, size in enumerate(made.work):
            self.memory["work", i] = torch.full((size.at(sizes) // 4,), torch.nan)
        for step in made.steps:
            if isinstance(step, CopyStep):
                self._copy(step, sizes)
            else:
                self._launch(step, sizes)
        return self.memory["y_out", 0], self.memory["z_out", 0]

    def make_cache(self, B, C):
        v = self.variant
        shape = B, C, v.num_key_value_heads, v.head_width
        for i in range(v.evaluations):
            self.memory |= {(role, i): torch.full(shape, torch.nan) for role in ("keys", "values")}

    def _at(self, address, sizes):
        flat = self.memory[address.buffer.role, address.buffer.index].view(-1).view(torch.uint8)
        return flat[address.offset.at(sizes) :]

    def _launch(self, step, sizes):
        given = []
        for value, like in zip(step.values, step.launch.args, strict=True):
            if isinstance(value, Address):
                given.append(self._at(value, sizes).view(like.dtype))
            else:
                given.append(at(value, sizes))
        grid = tuple(axis.at(sizes) for axis in step.grid)
        step.launch.kernel[grid](*given, **step.launch.meta)

    def _copy(self, step, sizes):
        def rows(address, pitch, height):
            strides = pitch.at(sizes) * height.at(sizes), pitch.at(sizes), 1
            shape = (step.depth.at(sizes), step.height.at(sizes), step.width.at(sizes))
            return self._at(address, sizes).as_strided(
                shape, strides, self._at(address, sizes).storage_offset()
            )

        target = rows(step.target, step.target_pitch, step.target_height)
        target.copy_(rows(step.source, step.source_pitch, step.source_height))


needs_interpreter = pytest.mark.skipif(not interpreting(), reason="runs in Triton's interpreter")


@pytest.fixture
def machine():
    variant = replace(TINY, num_layers=1, num_recursion_steps=1, num_cycles=1, dtype="float32")
    module = module_of(variant, "cpu")
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return Machine(variant, module, 400), module


def expect_close(got, wanted):
    assert (wide(got) - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.kernels
@needs_interpreter
def test_a_plan_computes_the_recursion(machine):
    machine, module = machine
    x, y, z = torch.randn(3, 2, 19, 64)
    with torch.no_grad(), backend("reference"):
        from_start, from_state = module(x), module(x, y, z)
    for got, wanted in zip(machine.run("forward", sizes_of(2, 19), x), from_start, strict=True):
        expect_close(got, wanted)
    for got, wanted in zip(machine.run("resume", sizes_of(2, 19), x, y=y, z=z), from_state, strict=True):
        expect_close(got, wanted)


@pytest.mark.kernels
@needs_interpreter
@pytest.mark.parametrize(("first", "second"), [(5, 4), (257, 2)])
def test_a_plan_decodes(machine, first, second):
    """A prefill, more tokens, then one at a time: the same as all of them together."""
    machine, module = machine
    assert decode_keys(machine.variant, "any") == 256
    B, total = (2 if first < 100 else 1), first + second + 2
    capacity = total + 3
    x = torch.randn(B, total, 64)
    with torch.no_grad(), backend("reference"):
        wanted, _ = module(x)
    machine.make_cache(B, capacity)
    past = 0
    for tokens in (first, second, 1, 1):
        call = "extend" if tokens > 1 else "decode-long" if past + 1 > 256 else "decode"
        sizes = sizes_of(B, tokens, past, capacity)
        got, _ = machine.run(call, sizes, x[:, past : past + tokens])
        expect_close(got, wanted[:, past : past + tokens])
        past += tokens


def test_only_what_never_looks_ahead_decodes():
    assert TINY.calls == CALLS
    assert replace(TINY, causal=False).calls == ("forward", "resume")
    assert all(isinstance(step, KernelStep) for step in plan(TINY, "forward", "any").steps)
