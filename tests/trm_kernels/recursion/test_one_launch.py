"""The recursion in one launch: equal to the path per op, in every form and in whatever order programs run.

Per phase, the kernel runs with several programs, one after the other: is every tile somebody's? In one
launch it runs with one program, and with several at once (tests/support/concurrent.py): does everybody
wait for everybody?
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.trm_kernels.ops.test_ops import error
from tests.trm_kernels.recursion.test_recursion import DEVICE, make
from trm_kernels import TRM, rope_angles, trm_recursion
from trm_kernels.recursion.inputs import AttentionInputs, CacheRoom
from trm_kernels.recursion.one_launch import addresses, grid_barrier, kernel, launchers, phases
from trm_kernels.recursion.one_launch.kernel import count_phases
from trm_kernels.recursion.one_launch.launchers import LaunchOptions, one_launch_recursion
from trm_kernels.recursion.quantize import quantize
from trm_kernels.runtime import tuning
from trm_kernels.runtime.backend import backend, interpreting
from trm_kernels.runtime.launch import record
from trm_kernels.runtime.optional_triton import tl, triton

interpreted = pytest.mark.skipif(not interpreting(), reason="programs as processes: needs TRITON_INTERPRET=1")

# forms of a call: (batch, tokens, tokens in the cache before, what the model is)
FORMS = {
    "puzzle": (1, 21, None, {"num_layers": 1}),
    "puzzles": (2, 9, None, {"num_cycles": 2, "num_recursion_steps": 1}),
    "causal": (2, 7, None, {"causal": True, "num_key_value_heads": 1, "num_layers": 1}),
    "prefill": (2, 5, 0, {"causal": True, "num_key_value_heads": 2}),
    "chunk": (1, 3, 4, {"causal": True, "num_layers": 1}),
    "decode": (3, 1, 6, {"causal": True, "num_key_value_heads": 2}),
    "decode, 17 sequences": (17, 1, 3, {"causal": True, "num_key_value_heads": 1, "num_layers": 1}),
    "decode, no multiples": (
        2,
        1,
        2,
        {"causal": True, "hidden_size": 36, "num_heads": 2, "intermediate_size": 25},
    ),
}
each_form = pytest.mark.parametrize("form", FORMS)


class Given:
    """A call of some form: its tensors, and the keys and values of tokens before it."""

    def __init__(
        self, form: str, dtype: torch.dtype = torch.float32, seen: int | None = None, **changes
    ) -> None:
        B, self.T, before, of_model = FORMS[form]
        self.seen = before if seen is None else seen
        fields = {"num_cycles": 1, "num_recursion_steps": 1} | of_model | changes
        self.trm = make(dtype, **fields)
        g = torch.Generator().manual_seed(1)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=g).to(DEVICE, dtype)

        D, G, K = (
            self.trm.hidden_size,
            self.trm.num_key_value_heads,
            self.trm.hidden_size // self.trm.num_heads,
        )
        self.x, self.y, self.z = (randn(B, self.T, D) for _ in range(3))
        self.keys, self.values = [], []
        if self.seen is not None:
            sizes = B, G, self.seen + self.T + 2, K  # with two slots that nobody fills
            self.keys, self.values = (
                [randn(*sizes) for _ in range(self.trm.evaluations())] for _ in range(2)
            )
        start, keys = self.seen or 0, (self.seen or 0) + self.T
        self.angles = rope_angles(torch.arange(start, keys, device=DEVICE)[None], K, 10000.0)
        # padding on the left, of another length in each sequence, and a key hidden in between
        self.key_mask = torch.arange(keys, device=DEVICE) >= torch.arange(B, device=DEVICE)[:, None] % keys
        self.key_mask[:, keys // 2] &= keys < 3

    def room(self, on_device: bool = False) -> CacheRoom | None:
        """Copies of the cache's tensors, and how full they are as a number or as numbers on the device."""
        if self.seen is None:
            return None
        lengths = [torch.tensor(self.seen, device=DEVICE) for _ in self.keys] if on_device else []
        keys, values = ([t.clone() for t in kind] for kind in (self.keys, self.values))
        return CacheRoom(keys, values, lengths, 0 if on_device else self.seen)

    @property
    def weights(self):
        return [layer(self.x.dtype) for layer in self.trm.layers]

    @torch.no_grad()
    def one_launch(
        self, regime: str, programs: int = 0, room: CacheRoom | None = None
    ) -> tuple[Tensor, Tensor]:
        with backend("triton"):
            return one_launch_recursion(
                self.x,
                (self.y, self.z),
                (self.weights, None),
                replace(self.trm.spec, regime=regime),
                AttentionInputs(angles=self.angles, key_mask=self.key_mask),
                LaunchOptions(room, programs=programs),
            )

    @torch.no_grad()
    def per_op(self, name: str) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """y, z, and all keys and values."""
        room, filled = self.room(), (self.seen or 0) + self.T

        def update(evaluation: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            kinds = room.keys[evaluation], room.values[evaluation]
            for t, new in zip(kinds, (k, v), strict=True):
                t[:, :, self.seen : filled] = new
            return kinds[0][:, :, :filled], kinds[1][:, :, :filled]

        with backend(name):
            y, z = trm_recursion(
                self.x,
                self.y,
                self.z,
                self.weights,
                num_heads=self.trm.num_heads,
                num_key_value_heads=self.trm.num_key_value_heads,
                num_recursion_steps=self.trm.num_recursion_steps,
                num_cycles=self.trm.num_cycles,
                causal=self.trm.causal,
                angles=self.angles,
                key_mask=self.key_mask,
                update_cache=None if room is None else update,
                regime="per_op",
            )
        return y, z, *((room.keys, room.values) if room else ([], []))


def check(given: Given, got: tuple[Tensor, Tensor], room: CacheRoom | None, name: str = "triton") -> None:
    """y, z and the cache are those of the path per op; what the cache had no business with is as it was."""
    y, z, keys, values = given.per_op(name)
    for ours, theirs in ((got[0], y), (got[1], z)):
        assert error(ours, theirs.double()) <= 1e-5
    for ours, theirs in zip(
        [] if room is None else [*room.keys, *room.values], [*keys, *values], strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.kernels
@each_form
def test_one_program_and_a_launch_per_phase_equal_the_path_per_op(form):
    """Three programs, some without a tile; and how full a cache is, said by the host and by the device."""
    given = Given(form)
    of_one, of_many = given.room(), given.room(on_device=True)
    one = given.one_launch("one_launch", room=of_one)
    check(given, one, of_one)
    many = given.one_launch("per_phase", programs=3, room=of_many)
    assert torch.equal(one[0], many[0]) and torch.equal(one[1], many[1]), "the programs do not change a sum"
    if of_many is not None:
        assert all(length == given.seen + given.T for length in of_many.lengths)
        assert all(torch.equal(*pair) for pair in zip(of_one.keys, of_many.keys, strict=True))


@pytest.mark.kernels
@pytest.mark.parametrize("form", ["prefill", "decode, no multiples"])
def test_warps_that_divide_the_summed_axis_equal_the_path_per_op(form):
    """Both branches of the first phase, and an axis that no part divides; asking ahead changes no number."""
    given, row = Given(form), tuning.one_launch("any", 4, 10)
    with tuning.using("one_launch", replace(row, BLOCK_K=64, K_PARTS=4, asks_ahead=True)):
        room = given.room()
        check(given, given.one_launch("one_launch", room=room), room)


@pytest.mark.kernels
@pytest.mark.parametrize("seen", [15, 16, 40])
def test_many_keys_are_split_into_parts(seen, monkeypatch):
    """The last program to finish a part merges them, and leaves the count of parts at zero for the next."""
    row = tuning.one_launch("any", 4, 2)
    small = type(row)(**{**vars(row), "keys": 16})
    monkeypatch.setattr(tuning, "one_launch", lambda *args: small)
    given = Given("decode", seen=seen, num_layers=1)
    room = given.room()
    check(given, given.one_launch("per_phase", programs=2, room=room), room)


@pytest.mark.kernels
def test_bfloat16_is_as_close_to_the_truth_as_the_path_per_op():
    given, true = Given("decode", torch.bfloat16), Given("decode", torch.float64)
    for name in ("x", "y", "z"):
        setattr(true, name, getattr(given, name).double())
    true.keys, true.values = ([t.double() for t in kind] for kind in (given.keys, given.values))
    true.trm.load_state_dict(given.trm.state_dict())
    y, z, *_ = true.per_op("reference")
    ours, theirs = given.one_launch("one_launch", room=given.room()), given.per_op("reference")
    for i, want in enumerate((y, z)):
        assert error(ours[i], want) <= 1.1 * error(theirs[i], want)


@pytest.mark.kernels
def test_a_token_that_a_cache_has_no_room_for_is_not_written_elsewhere():
    given = Given("decode", num_layers=1)
    room = given.room(on_device=True)
    for length in room.lengths:
        length.fill_(room.keys[0].shape[2])
    before = [t.clone() for t in (*room.keys, *room.values)]
    given.one_launch("one_launch", room=room)
    assert all(torch.equal(*pair) for pair in zip(before, (*room.keys, *room.values), strict=True))


# Programs at once


@pytest.mark.kernels
@interpreted
@pytest.mark.parametrize("form", ["decode", "puzzles"])
def test_programs_that_run_at_once_wait_for_each_other(form):
    """And the counter stands where as many barriers leave it, from either sign."""
    from tests.support.concurrent import launches_at_once

    given = Given(form, num_layers=1)
    counter = grid_barrier.counter_for(given.x.device)
    for before in (0, -(2**31)):
        counter.fill_(before)
        room = given.room()
        with launches_at_once(pause=0.003):
            got = given.one_launch("one_launch", programs=4, room=room)
        check(given, got, room)
        barriers = count_phases(given.trm.evaluations()) - 1
        assert barriers % 2 == 1, "the sign has flipped"
        assert counter.item() == (-(2**31) if before == 0 else 0)
    counter.zero_()


@pytest.mark.kernels
@interpreted
def test_without_the_barrier_they_go_wrong(monkeypatch):
    """The control: what the test above asks would otherwise be no question."""
    from tests.support.concurrent import launches_at_once

    monkeypatch.setattr(kernel, "grid_barrier", lambda counter_ptr: None)
    given = Given("puzzles", num_layers=1)
    with launches_at_once(pause=0.003):
        got = given.one_launch("one_launch", programs=4)
    want, *_ = given.per_op("triton")
    assert not error(got[0], want.double()) <= 1e-2  # NaN is wrong as well


@pytest.mark.kernels
@interpreted
def test_a_hang_is_ended_and_reported(monkeypatch):
    """A program that never arrives; and the counter, which it leaves between two barriers, is set to zero."""
    from tests.support.concurrent import Hang, launches_at_once

    def without_the_last(counter_ptr):
        tl = kernel.tl
        if tl.program_id(0) != 1:
            grid_barrier.grid_barrier(counter_ptr)

    monkeypatch.setattr(kernel, "grid_barrier", without_the_last)
    given = Given("causal")
    with launches_at_once(limit=3.0), pytest.raises(Hang, match="of 2 were still running after 3"):
        given.one_launch("one_launch", programs=2)
    assert grid_barrier.counter_for(given.x.device).item() == 0


# The regimes of trm_recursion


def call(trm: TRM, x: Tensor, regime: str, **more):
    weights = [layer(x.dtype) for layer in trm.layers]
    sizes = {"num_heads": trm.num_heads, "num_recursion_steps": 1}
    return trm_recursion(x, x, x, weights, regime=regime, **sizes, **more)


@pytest.mark.kernels
def test_a_regime_that_was_asked_for_is_taken_and_auto_takes_the_table(monkeypatch):
    trm, x = make(num_layers=1, intermediate_size=48), torch.randn(1, 2, 64, device=DEVICE)
    ran = []
    monkeypatch.setattr(
        launchers,
        "launch",
        lambda kernel, grid, *args, **meta: ran.append(meta.get("launch_cooperative_grid")),
    )
    with torch.no_grad(), backend("triton"):
        call(trm, x, "one_launch")
        assert ran == [True]
        call(trm, x, "per_phase")
        assert ran[1:] == [None] * count_phases(2)
        ran.clear()
        call(trm, x, "auto")
        call(trm, x, "per_op")
        assert not ran, "the table takes one launch nowhere before it was measured"
        table = {"any": (tuning.Regime("one_launch", max_rows=2, max_width=64), tuning.Regime("per_op"))}
        monkeypatch.setattr(tuning, "_REGIME_CHOICES", table)
        call(trm, x, "auto")
        call(trm, x.repeat(2, 1, 1), "auto")
        call(trm, x, "auto", candidate="mm")  # cannot run in one launch
        assert ran == [True]


ROWS = torch.zeros(2, 3, 64)


@pytest.mark.parametrize(
    ("of_model", "more", "says"),
    [
        ({"hidden_size": 130, "num_heads": 1}, {}, "an even head width of at most 128 .* got 130"),
        ({"hidden_size": 36, "num_heads": 2}, {}, "multiples of 16, got 36"),
        ({"intermediate_size": 40}, {}, "multiples of 16, got 64 and 40"),
        (
            {},
            {"mask": torch.ones(1, 1, 3, 3, dtype=torch.bool)},
            "causal and key_mask to say what is visible",
        ),
        ({}, {"attention": "sdpa"}, "our own attention"),
        ({}, {"candidate": "mm"}, "the candidate 'mm' was asked for"),
        ({}, {"update_cache": lambda evaluation, k, v: (k, v)}, "a cache whose tensors it can write to"),
    ],
)
@pytest.mark.kernels
@torch.no_grad()
def test_a_regime_that_cannot_run_is_an_error_that_says_why(of_model, more, says):
    trm = make(**({"intermediate_size": 48} | of_model))
    x = torch.zeros(2, 3, trm.hidden_size, device=DEVICE)
    with backend("triton"), pytest.raises(RuntimeError, match=f"'one_launch' was asked for, .*{says}"):
        call(trm, x, "one_launch", **more)


def test_without_kernels_or_with_a_gradient_it_cannot_run():
    trm = make().cpu()
    with pytest.raises(
        ValueError, match="expected regime to be auto, per_op, one_launch, per_phase, got 'one'"
    ):
        call(trm, ROWS, "one")
    with backend("reference"):
        with pytest.raises(RuntimeError, match="it has no gradient"):
            call(trm, ROWS, "one_launch")
        with (
            torch.no_grad(),
            pytest.raises(RuntimeError, match="the reference computes torch.float32 tensors"),
        ):
            call(trm, ROWS, "per_phase")


@pytest.mark.kernels
@torch.no_grad()
def test_a_grid_larger_than_what_runs_at_once_is_an_error_and_no_hang():
    programs = 2 if DEVICE == "cpu" else 100_000
    with pytest.raises(RuntimeError, match=f"what {DEVICE}.* runs at once, got {programs}"):
        Given("causal").one_launch("one_launch", programs=programs)


@pytest.mark.kernels
@torch.no_grad()
def test_a_module_keeps_its_regime_to_calls_without_gradient(monkeypatch):
    """Training goes per op, whatever the module's regime."""
    small = {"num_layers": 1, "num_cycles": 1, "num_recursion_steps": 1, "intermediate_size": 48}
    trm, x = make(regime="one_launch", **small), ROWS[:1].to(DEVICE)
    ran = []
    monkeypatch.setattr(launchers, "launch", lambda *args, **meta: ran.append(args))
    with backend("triton"):
        trm(x)
        with torch.enable_grad():
            trm(x)
    assert len(ran) == 1


# Weights in 8 bits


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.035), ("fp8", 0.1)])
@torch.no_grad()
def test_the_error_of_weights_in_8_bits(kind, most):
    """Of a decoding step at d 512 and n 4, next to bfloat16's own: outputs, relative to float64."""
    torch.manual_seed(0)
    trm = TRM(512, 8, num_recursion_steps=4, causal=True)
    x = torch.randn(4, 1, 512)
    with backend("reference"):
        true = trm.double()(x.double())[0]
        in_bfloat16 = error(trm.bfloat16()(x.bfloat16())[0], true)
        trm.quantize = kind
        rounded = error(trm(x.bfloat16())[0], true)
    assert in_bfloat16 < rounded < most, (in_bfloat16, rounded)


@pytest.mark.kernels
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@torch.no_grad()
def test_weights_in_8_bits_in_one_launch_equal_the_same_weights_widened(kind):
    given = Given("puzzles", num_layers=1, intermediate_size=48)
    given.trm.quantize = kind
    told = []
    for regime in ("one_launch", "per_op"):
        given.trm.regime = regime
        with backend("triton"):
            told.append(given.trm(given.x, given.y, given.z))
    assert all(error(a, b.double()) <= 1e-5 for a, b in zip(*told, strict=True))
    assert error(told[0][0], given.per_op("triton")[0].double()) > 1e-4, "a test that could not fail"


def test_copies_in_8_bits_follow_the_weights_and_cannot_be_trained():
    trm, x = make(quantize="int8").cpu(), ROWS + 1
    with pytest.raises(RuntimeError, match="expected a call without gradient"):
        trm(x)
    with torch.no_grad():
        before = trm(x)[0]
        assert torch.equal(before, trm(x)[0])
        trm.layers[0].mlp.down_proj.weight.mul_(2)
        assert not torch.equal(before, trm(x)[0])
    with pytest.raises(ValueError, match="expected quantize to be None, int8, fp8, got 'int4'"):
        make(quantize="int4")


def test_fp8_is_refused_where_there_is_no_such_type():
    w = torch.empty(4, 4, device="meta")
    with record("sm80"), pytest.raises(RuntimeError, match="expected a GPU of sm_89 or newer, got sm80"):
        quantize(w, "fp8")
    with record("sm90"):
        assert quantize(w, "fp8")[0].dtype == torch.float8_e4m3fn


# On a GPU


needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")


@pytest.mark.kernels
@needs_cuda
def test_ten_thousand_reruns_are_equal_bit_for_bit():
    """As many programs as the device runs at once: a barrier that lets one through shows sooner or later."""
    given = Given("decode", torch.bfloat16)
    room = given.room()
    y, z = given.one_launch("one_launch", room=room)
    per_phase = given.one_launch("per_phase", room=given.room())
    assert torch.equal(y, per_phase[0]) and torch.equal(z, per_phase[1])
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(10_000):
        again = given.one_launch("one_launch", room=room)
        wrong += (again[0] != y).sum() + (again[1] != z).sum()
    assert wrong == 0


@pytest.mark.kernels
@needs_cuda
def test_decoding_can_be_captured_in_a_cuda_graph():
    """Two tokens by one graph: the kernel itself counts them, and its counter outlives the replay."""
    given, same = Given("decode", torch.bfloat16), Given("decode", torch.bfloat16)
    want = same.room(on_device=True)
    for _ in range(2):
        y, z = same.one_launch("one_launch", room=want)
    room = given.room(on_device=True)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        given.one_launch("one_launch", room=room)
    torch.cuda.current_stream().wait_stream(side)
    for length in room.lengths:
        length.fill_(given.seen)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = given.one_launch("one_launch", room=room)
    for _ in range(2):
        graph.replay()
    assert torch.equal(captured[0], y) and torch.equal(captured[1], z)
    assert all(torch.equal(*pair) for pair in zip(room.keys, want.keys, strict=True))
    assert all(length == given.seen + 2 for length in room.lengths)


@pytest.mark.kernels
@needs_cuda
def test_streams_do_not_share_a_counter():
    device = torch.device("cuda", torch.cuda.current_device())
    found = {grid_barrier.counter_for(device).data_ptr()}
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream()):
            found.add(grid_barrier.counter_for(device).data_ptr())
            found.add(grid_barrier.counter_for(device).data_ptr())
    assert len(found) == 4


def test_where_tensors_lie_is_copied_to_the_device_once():
    tensors = torch.empty(3, 8).unbind()
    table = addresses.distances([tensors])
    assert table.tolist() == [0, 2, 4]
    assert addresses.distances([tensors]) is table
    assert addresses.distances([tensors[::-1]]).tolist() == [0, -2, -4]


@pytest.mark.parametrize(("is_captured", "other"), [(True, True), (False, True), (False, False)])
def test_a_table_is_there_for_every_stream_and_outlives_the_graphs_that_read_it(
    monkeypatch, is_captured, other
):
    waits, kept = [], []
    table = object.__new__(addresses._Table)
    table.copied, table.stream = "copied", "first"
    device = SimpleNamespace(type="cuda")
    table.distances = SimpleNamespace(device=device, record_stream=kept.append)
    stream = SimpleNamespace(wait_event=waits.append) if other else "first"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_captured)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(addresses, "_in_graphs", set())
    assert table.on_this_stream() is table.distances
    assert (table in addresses._in_graphs) == is_captured
    assert (waits, kept) == ((["copied"], [stream]) if other and not is_captured else ([], []))


@triton.jit
def _state_kernel(out_ptr, M, WIDTH: tl.constexpr):
    for state in tl.static_range(4):
        apart = phases.of_state(out_ptr, state, M, WIDTH).to(tl.int64) - out_ptr.to(tl.int64)
        tl.store(out_ptr + state, apart)


@pytest.mark.kernels
def test_states_lie_beyond_31_bits():
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    _state_kernel[(1,)](out, 2**29 + 1, WIDTH=8)
    assert out.tolist() == [8 * 8 * state * (2**29 + 1) for state in range(4)]


def test_counters_are_one_a_stream_and_one_a_captured_launch():
    counters = grid_barrier.Counters(torch.device("cpu"))
    first, second = counters.take(1, False), counters.take(2, False)
    assert first.data_ptr() == counters.take(1, False).data_ptr() != second.data_ptr()
    captured = {counters.take(1, True).data_ptr() for _ in range(3)}
    assert len(captured | {first.data_ptr(), second.data_ptr()}) == 5
