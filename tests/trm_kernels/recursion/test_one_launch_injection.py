"""A whole injection point in one launch: projections, RoPE's table and blend, equal to the three ops."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.trm_kernels.ops.test_ops import error
from tests.trm_kernels.recursion.test_recursion import DEVICE, make
from trm_kernels import rope_angles
from trm_kernels.ops.attention.rope import cos_and_sin
from trm_kernels.recursion.injection import trm_injection
from trm_kernels.recursion.inputs import AttentionInputs, CacheRoom
from trm_kernels.recursion.one_launch import grid_barrier, kernel, launchers
from trm_kernels.recursion.one_launch.kernel import count_phases
from trm_kernels.recursion.one_launch.launchers import LaunchOptions, one_launch_injection
from trm_kernels.recursion.weights import InjectionPoint, InjectionWeights
from trm_kernels.runtime.backend import backend, interpreting
from trm_kernels.runtime.optional_triton import tl, triton

interpreted = pytest.mark.skipif(not interpreting(), reason="programs as processes: needs TRITON_INTERPRET=1")
FORMS = {"decode": (3, 1, 6), "prefill": (2, 5, 0), "no cache": (2, 4, None), "two tiles of rows": (33, 1, 6)}
each_form = pytest.mark.parametrize("form", ["decode", "prefill", "no cache"])
each_norm = pytest.mark.parametrize("norms_x", [False, True], ids=["x", "normed x"])
each_blend = pytest.mark.parametrize("is_gated", [False, True], ids=["linear", "gated"])


class Given:
    """An injection of some form: its tensors, and the keys and values of tokens before it."""

    def __init__(self, form: str, is_gated: bool, width: int = 48, norms_x: bool = False, **changes) -> None:
        self.norms_x = norms_x
        self.B, self.T, self.seen = FORMS[form]
        small = {"num_layers": 1, "num_cycles": 1, "num_recursion_steps": 1, "intermediate_size": 48}
        self.trm = make(causal=True, num_key_value_heads=2, **(small | changes))
        d, G = self.trm.hidden_size, self.trm.num_key_value_heads
        g = torch.Generator().manual_seed(2)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=g).to(DEVICE)

        # rows of sizes that differ: a norm that is forgotten shows
        self.h = randn(self.B, self.T, width) * 10.0 ** (torch.arange(self.T, device=DEVICE) % 3 - 1)[:, None]
        gate = (randn(1, d), randn(1)) if is_gated else ()
        self.injection = InjectionWeights(randn(d, width) * width**-0.5, randn(width, d) * d**-0.5, *gate)
        self.strength = 0.7
        # as generate() gives them to a prompt that is padded on the left
        start = (self.seen or 0) - torch.arange(self.B, device=DEVICE)[:, None]
        self.positions = (start + torch.arange(self.T, device=DEVICE)).clamp(min=0)
        keys = (self.seen or 0) + self.T
        self.key_mask = (
            torch.arange(keys, device=DEVICE) >= torch.arange(self.B, device=DEVICE)[:, None] % keys
        )
        sizes = self.B, G, keys + 2, d // self.trm.num_heads
        count = 0 if self.seen is None else self.trm.evaluations()
        self.keys, self.values = ([randn(*sizes) for _ in range(count)] for _ in range(2))

    def room(self, *_) -> CacheRoom | None:
        """Copies of the cache's tensors."""
        if self.seen is None:
            return None
        self.filled = CacheRoom(
            [t.clone() for t in self.keys], [t.clone() for t in self.values], [], self.seen
        )
        return self.filled

    def called(self, strength: float, **arguments) -> Tensor:
        """h' of the module, by its own regime."""
        return self.trm(
            self.h, injection=self.injection, strength=strength, positions=self.positions, **arguments
        )

    @property
    def weights(self):
        return [layer(self.h.dtype) for layer in self.trm.layers]

    @property
    def state(self) -> list[Tensor]:
        return [t.expand(self.B, self.T, -1) for t in (self.trm.y_init, self.trm.z_init)]

    @property
    def settings(self) -> dict:
        names = "num_heads", "num_key_value_heads", "num_recursion_steps", "num_cycles", "causal", "eps"
        return {name: getattr(self.trm, name) for name in names}

    @torch.no_grad()
    def one_launch(self, regime: str, programs: int = 0) -> Tensor:
        with backend("triton"):
            return one_launch_injection(
                self.h,
                InjectionPoint(self.injection, self.strength, self.norms_x),
                self.state,
                (self.weights, None),
                replace(self.trm.spec, regime=regime),
                AttentionInputs(positions=self.positions, key_mask=self.key_mask),
                LaunchOptions(self.room(), programs=programs),
            )

    @torch.no_grad()
    def three_ops(self, name: str = "reference") -> Tensor:
        room = self.room()

        def update(evaluation: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            end = self.seen + self.T
            kinds = room.keys[evaluation], room.values[evaluation]
            for t, new in zip(kinds, (k, v), strict=True):
                t[:, :, self.seen : end] = new
            return kinds[0][:, :, :end], kinds[1][:, :, :end]

        with backend(name):
            return trm_injection(
                self.h,
                self.injection,
                self.strength,
                *self.state,
                self.weights,
                positions=self.positions,
                key_mask=self.key_mask,
                update_cache=None if room is None else update,
                regime="per_op",
                norms_x=self.norms_x,
                **self.settings,
            )


def check(given: Given, got: Tensor) -> None:
    """What was added to h is that of the three ops, and so are the keys and values."""
    ours = given.filled if given.seen is not None else None
    want = given.three_ops()
    added, wanted = (t.double() - given.h for t in (got, want))
    assert error(added, wanted) <= 1e-5
    if ours is not None:
        for mine, theirs in zip(
            (*ours.keys, *ours.values), (*given.filled[0], *given.filled[1]), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.kernels
@each_norm
@each_blend
@each_form
def test_one_launch_equals_the_three_ops(form, is_gated, norms_x):
    """One program, and a launch per phase with several."""
    given = Given(form, is_gated, norms_x=norms_x)
    given.injection.in_proj.mul_(3.0)  # an x of another size than its norm
    one = given.one_launch("one_launch")
    check(given, one)
    assert torch.equal(one, given.one_launch("per_phase", programs=3)), "the programs do not change a sum"


@pytest.mark.kernels
def test_rows_of_a_second_tile_are_computed_as_well():
    given = Given("two tiles of rows", is_gated=False)
    check(given, given.one_launch("one_launch"))


@pytest.mark.kernels
@interpreted
@each_blend
def test_programs_that_run_at_once_wait_for_each_other(is_gated):
    from tests.support.concurrent import launches_at_once

    given = Given("decode", is_gated)
    counter = grid_barrier.counter_for(given.h.device).zero_()
    with launches_at_once(pause=0.003):
        got = given.one_launch("one_launch", programs=4)
    check(given, got)
    assert (count_phases(given.trm.evaluations()) - 1) % 2 == 1 and counter.item() == -(2**31)
    counter.zero_()


@pytest.mark.kernels
@interpreted
def test_without_the_barrier_they_go_wrong(monkeypatch):
    from tests.support.concurrent import launches_at_once

    monkeypatch.setattr(kernel, "grid_barrier", lambda counter_ptr: None)
    given = Given("decode", True)
    with launches_at_once(pause=0.003):
        got = given.one_launch("one_launch", programs=4)
    assert not error(got, given.three_ops().double()) <= 1e-2  # NaN is wrong as well


@pytest.mark.kernels
@torch.no_grad()
def test_with_w_out_at_zero_the_hidden_state_is_what_it_was_bit_for_bit():
    given = Given("decode", True)
    given.injection.out_proj.zero_()
    assert torch.equal(given.one_launch("one_launch"), given.h)


@pytest.mark.kernels
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@torch.no_grad()
def test_layers_in_8_bits_between_projections_that_are_not(kind):
    given = Given("no cache", True)
    given.trm.quantize = kind
    told = {}
    for regime in ("one_launch", "per_op"):
        given.trm.regime = regime
        with backend("triton"):
            told[regime] = given.called(given.strength, key_mask=given.key_mask)
    assert error(told["one_launch"], told["per_op"].double()) <= 1e-5


@pytest.mark.kernels
@torch.no_grad()
def test_one_launch_makes_nothing_but_a_launch(monkeypatch):
    """Positions go in as they come: no table of angles, no product, nothing of PyTorch's but memory."""
    from bench.measure.counting import Counting

    ran = []
    monkeypatch.setattr(
        launchers, "launch", lambda *args, **meta: ran.append(meta["launch_cooperative_grid"])
    )
    given = Given("no cache", True)
    given.trm.regime = "one_launch"
    with backend("triton"):
        for _ in range(2):  # the frequencies, and where the weights lie, are found out in the first
            with Counting(inside_ours=True) as counted:
                given.called(1.0)
    assert ran == [True, True] and not counted.computing()


@pytest.mark.kernels
@torch.no_grad()
def test_what_cannot_run_is_an_error_of_the_regime_that_was_asked_for():
    given = Given("no cache", False, width=40)
    given.trm.regime = "one_launch"
    with backend("triton"), pytest.raises(RuntimeError, match="multiples of 16, got 40 and 64 and 48"):
        given.called(1.0)
    given.trm.regime = "auto"
    with backend("triton"):
        given.called(1.0)


@pytest.mark.kernels
def test_angles_of_any_size_are_as_exact_as_float32():
    """A kernel's cosines and sines, without a stack: of angles up to a million, and below zero."""

    @triton.jit
    def angles_kernel(angle_ptr, cos_ptr, sin_ptr, N: tl.constexpr):
        offs = tl.arange(0, N)
        cos, sin = cos_and_sin(tl.load(angle_ptr + offs))
        tl.store(cos_ptr + offs, cos)
        tl.store(sin_ptr + offs, sin)

    positions = torch.cat((torch.arange(-8, 120), torch.arange(1000, 1_000_000, 7805)))
    positions = positions.to(DEVICE)
    angle = positions.float()
    cos, sin = torch.empty_like(angle), torch.empty_like(angle)
    angles_kernel[(1,)](angle, cos, sin, N=256)
    exact = angle.double()
    assert (cos - exact.cos()).abs().max() <= 1e-7 and (sin - exact.sin()).abs().max() <= 1e-7
    table = rope_angles(positions[None], 2, 10000.0)  # the frequency of a head's first pair is 1
    assert (cos - table.cos[0, :, 0]).abs().max() <= 2e-7
