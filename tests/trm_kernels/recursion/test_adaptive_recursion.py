"""adaptive_recursion: against one token after another in float64, the fixed loop, and what it may compute."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from trm_kernels import TRM, Halting
from trm_kernels.ops.attention.rope import rope_angles, rope_ref
from trm_kernels.recursion import adaptive as module
from trm_kernels.recursion.adaptive import Order, adaptive_evaluations
from trm_kernels.runtime.backend import backend, interpreting

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
WIDTH, HEADS, GROUPS, N, CYCLES = 24, 4, 2, 7, 2
# under these, tokens of the random TRM stop at many different steps
RULES = [
    Halting(0.1),
    Halting(0.1, in_order=False),
    Halting(0.1, watch="latent"),
    Halting(0.2, watch="latent", in_order=False),
    Halting(0.3, patience=2, in_order=False),
    Halting(0.05, min_steps=4, in_order=False),
]
every_rule = pytest.mark.parametrize("rule", RULES, ids=str)


def make(causal=True, dtype=torch.float64, size=0.7, **changes):
    torch.manual_seed(0)
    sizes = {"num_key_value_heads": GROUPS, "intermediate_size": 32, "num_recursion_steps": N}
    sizes |= {"num_cycles": CYCLES, "causal": causal, "dtype": dtype}
    trm = TRM(WIDTH, HEADS, 2, **(sizes | changes)).requires_grad_(False)
    for layer in trm.layers:  # with weights of 0.7 their size the states settle
        for weight in layer.parameters():
            weight *= size
    return trm


def inputs(B=3, T=6, dtype=torch.float64):
    return torch.randn(B, T, WIDTH, generator=torch.Generator().manual_seed(1), dtype=dtype)


def run(trm, x, rule, **kwargs):
    """(y, z, steps, evaluations)"""
    told = []
    y, z = trm(x, halting=rule, report_steps=lambda *taken: told.extend(taken), **kwargs)
    return y, z, *told


class OneAfterAnother:
    """The definition, for one sequence: a token runs until it stops, then the next one does.

    keys[cycle, kind, step, layer] holds a (key, value) for each token so far, the last ones repeated.
    """

    def __init__(self, trm, rule):
        self.trm, self.rule, self.keys = trm, rule, {}
        self.stopped = [[] for _ in range(trm.num_cycles)]  # at which step each token did

    def token(self, x):
        """(y, z, steps of each cycle, evaluations)"""
        trm, rule, spent, taken = self.trm, self.rule, 0, []
        y, z = trm.y_init, trm.z_init
        for cycle in range(trm.num_cycles):
            quiet, answer, earliest = 0, None, max([rule.min_steps, *self.stopped[cycle] * rule.in_order])
            for step in range(N):
                before = z if rule.watch == "latent" else answer
                z = self.f(z + y + x, (cycle, "z", step))
                spent += 1
                if rule.watch == "answer":
                    answer = self.f(y + z, (cycle, "answer", step))
                    spent += 1
                after = z if rule.watch == "latent" else answer
                if step > 0:
                    quiet = quiet + 1 if (after - before).norm() <= rule.threshold * after.norm() else 0
                if quiet >= rule.patience and step + 1 >= earliest:
                    break
            for missing in range(step + 1, N):
                for kind in ("z", "answer") if rule.watch == "answer" else ("z",):
                    for i in range(len(trm.layers)):
                        last = self.keys[cycle, kind, step, i][-1]
                        self.keys.setdefault((cycle, kind, missing, i), []).append(last)
            taken.append(step + 1)
            self.stopped[cycle].append(step + 1)
            if answer is None:
                answer = self.f(y + z, (cycle, "answer", 0))
                spent += 1
            y = answer
        return y, z, taken, spent

    def f(self, v, evaluation):
        K = WIDTH // HEADS
        for i, layer in enumerate(self.trm.layers):
            w = layer(v.dtype)
            q, k, value = (w.mixer.qkv_proj @ v).split((WIDTH, GROUPS * K, GROUPS * K))
            kept = self.keys.setdefault((*evaluation, i), [])
            angles = rope_angles(torch.tensor([[len(kept)]]), K, 10000.0)
            q, k = (rope_ref(t.view(1, 1, -1, K), angles)[0, 0] for t in (q, k))
            kept.append((k, value.view(GROUPS, K)))
            keys, values = (torch.stack(t, dim=1) for t in zip(*kept, strict=True))  # [G, tokens, K]
            o = []
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                o.append((keys[group] @ q[head] / K**0.5).softmax(0) @ values[group])
            v = self.rms(v + w.mixer.o_proj @ torch.cat(o))
            gate, up = (w.mlp.gate_up_proj @ v).chunk(2)
            v = self.rms(v + w.mlp.down_proj @ (F.silu(gate) * up))
        return v

    def rms(self, v):
        return v * (v.square().mean() + self.trm.eps).rsqrt()


@every_rule
def test_it_is_one_token_after_another(rule):
    check_one_after_another(make(), rule)


def test_a_change_starts_the_count_of_steps_without_one_again():
    trm, rule = make(size=1.2), Halting(0.8, patience=2, in_order=False)
    check_one_after_another(trm, rule)
    once = run(trm, inputs(), replace(rule, patience=1))[2]
    assert (run(trm, inputs(), rule)[2] > once + 1).any(), "a test that could not fail"


def check_one_after_another(trm, rule):
    x = inputs()
    y, z, steps, evaluations = run(trm, x, rule)
    assert len(set(steps.flatten().tolist())) > 2, "a test that could not fail"
    for b in range(len(x)):
        alone = OneAfterAnother(trm, rule)
        for t in range(x.shape[1]):
            want_y, want_z, want_steps, want_evaluations = alone.token(x[b, t])
            assert steps[:, b, t].tolist() == want_steps
            assert int(evaluations[b, t]) == want_evaluations
            torch.testing.assert_close(y[b, t], want_y, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(z[b, t], want_z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("watch", ["answer", "latent"])
@pytest.mark.parametrize("causal", [True, False])
def test_without_a_stop_it_is_the_fixed_loop(watch, causal):
    trm, x = make(causal), inputs()
    y, z, steps, evaluations = run(trm, x, Halting(0.0, watch=watch))
    for got, want in zip((y, z), trm(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert steps.eq(N).all()
    assert evaluations.eq(CYCLES * (2 * N if watch == "answer" else N + 1)).all()


def test_weights_in_8_bits_recurse_as_in_the_fixed_loop():
    trm, x = make(dtype=torch.float32, quantize="int8"), inputs(dtype=torch.float32)
    y, z, *_ = run(trm, x, Halting(0.0))
    for got, want in zip((y, z), trm(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y, make(dtype=torch.float32)(x)[0], rtol=1e-3), "a test that could not fail"


def test_new_tokens_wait_for_the_longest_of_their_own_sequence():
    order = Order(2, 1, True, None, torch.tensor([[1, 3, 1], [2, 1, 1]]))
    nobody = torch.zeros(2, dtype=torch.bool)
    waiting = [order.keep_waiting(nobody, step).tolist() for step in (1, 2, 3)]
    assert waiting == [[True, True], [True, False], [False, False]]


@every_rule
def test_f_is_computed_for_those_that_go_on_only(rule, monkeypatch):
    trm, x, computed = make(), inputs(), []
    original = module.apply_layer

    def watched(v, *args):
        computed.append(v.shape[:-1].numel())
        return original(v, *args)

    monkeypatch.setattr(module, "apply_layer", watched)
    _, _, steps, evaluations = run(trm, x, rule)
    assert sum(computed) == len(trm.layers) * int(evaluations.sum())
    most = int(steps.amax(dim=(1, 2)).sum())  # the loop of a cycle ends with its last token
    assert len(computed) == len(trm.layers) * (2 * most if rule.watch == "answer" else most + CYCLES)


@every_rule
def test_every_slab_of_a_cache_is_filled_once(rule):
    trm, filled = make(), []

    def update(evaluation, k, v):
        filled.append(evaluation)
        return k, v

    run(trm, inputs(), rule, update_cache=update)
    assert filled == list(range(trm.evaluations(halting=rule)))
    assert len(filled) == adaptive_evaluations(2, N, CYCLES, rule)


@pytest.mark.parametrize("rule", [Halting(0.1), Halting(0.1, in_order=False)], ids=str)
def test_a_general_mask_that_says_the_same(rule):
    """Two sequences packed into a row, by a mask; in order each waits for its own tokens only."""
    trm, x = make(causal=False), inputs(2, 5)
    causal = make()
    want = [run(causal, row[None], rule) for row in x]
    row = torch.cat((x[0], x[1]))[None]
    visible = torch.block_diag(*[torch.ones(5, 5).tril()] * 2).bool()[None, None]
    positions = torch.arange(5).repeat(2)[None]
    for mask in (visible, torch.where(visible, 0.0, float("-inf")).double()):
        y, _, steps, _ = run(trm, row, rule, mask=mask, positions=positions)
        torch.testing.assert_close(y, torch.cat([w[0] for w in want], dim=1), rtol=1e-9, atol=1e-9)
        assert torch.equal(steps, torch.cat([w[2] for w in want], dim=2))
    before = torch.full((CYCLES, 1, 3), 2)
    if rule.in_order:
        with pytest.raises(ValueError, match="general mask without a cache"):
            run(trm, row, rule, mask=visible, positions=positions, steps_before=before)


def test_where_all_see_all_a_sequence_stops_as_a_whole():
    trm, x = make(causal=False), inputs()
    _, _, steps, _ = run(trm, x, Halting(0.1))
    _, _, free, _ = run(trm, x, Halting(0.1, in_order=False))
    assert steps.eq(steps[:, :, :1]).all() and not free.eq(free[:, :, :1]).all()


@pytest.mark.parametrize("rule", RULES[:2], ids=str)
def test_padding_is_not_waited_for(rule):
    trm, x = make(), inputs(2, 5)
    want = run(trm, x, rule)
    padded = torch.cat((torch.randn(2, 3, WIDTH, dtype=x.dtype), x), dim=1)
    is_token = torch.tensor([[False] * 3 + [True] * 5] * 2)
    positions = torch.tensor([[0] * 3 + list(range(5))])
    y, z, steps, evaluations = run(
        trm, padded, rule, key_mask=is_token, is_token=is_token, positions=positions
    )
    for got, whole in zip((y[:, 3:], z[:, 3:]), want[:2], strict=True):
        torch.testing.assert_close(got, whole, rtol=1e-9, atol=1e-9)
    assert torch.equal(steps[:, :, 3:], want[2]) and torch.equal(evaluations[:, 3:], want[3])
    assert steps[:, :, :3].eq(1).all()


@pytest.mark.kernels
@pytest.mark.parametrize("rule", [RULES[0], RULES[3]], ids=str)
def test_on_the_kernels_as_on_the_reference(rule):
    trm = make(dtype=torch.float32).to(DEVICE)
    x = inputs(2, 5, torch.float32).to(DEVICE)
    mask = torch.tensor([[False, True, True, True, True], [True] * 5], device=DEVICE)
    given = {"key_mask": mask, "is_token": mask}
    with backend("reference"):
        want = run(trm, x, rule, **given)
    with backend("triton"):
        got = run(trm, x, rule, **given)
    assert torch.equal(got[2], want[2])
    for ours, theirs in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_under_torch_compile_it_runs_uncompiled():
    torch._dynamo.reset()
    halting = partial(make(), halting=Halting(0.1))
    for got, want in zip(torch.compile(halting, backend="eager")(inputs()), halting(inputs()), strict=True):
        assert torch.equal(got, want)
    torch._dynamo.reset()  # it keeps what cannot be compiled


def test_what_cannot_run_says_why():
    rule, x = Halting(0.1), inputs()
    with pytest.raises(ValueError, match="halting expected regime auto or per_op, got 'one_launch'"):
        make(regime="one_launch")(x, halting=rule)
    with pytest.raises(ValueError, match="expected layers with attention, got none or mlp_t"):
        make(False, mlp_t=True, seq_len=6, rope_theta=None)(x, halting=rule)
    with pytest.raises(RuntimeError, match="expected a call without gradient"):
        make().requires_grad_(True)(x, halting=rule)
    with pytest.raises(Exception, match=r"expected no torch\.compile"):
        torch.compile(partial(make(), halting=rule), backend="eager", fullgraph=True)(x)
    with pytest.raises(ValueError, match=r"expected is_token \(3, 6\) of bool, got \(3, 5\)"):
        make()(x, halting=rule, is_token=torch.ones(3, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"threshold": -0.1}, "threshold of at least 0, got -0.1"),
        ({"threshold": float("nan")}, "threshold of at least 0, got nan"),
        ({"threshold": "x"}, "threshold to be a number, got 'x'"),
        ({"patience": 0}, "patience to be a count of at least 1, got 0"),
        ({"min_steps": 1.5}, "min_steps to be a count of at least 1, got 1.5"),
        ({"watch": "z"}, "watch to be one of answer, latent, got 'z'"),
    ],
)
def test_a_rule_that_makes_no_sense(wrong, told):
    with pytest.raises(ValueError, match=told):
        Halting(**({"threshold": 0.1} | wrong))
