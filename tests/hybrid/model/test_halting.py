"""A hybrid whose tokens stop by themselves: the same with every cache, padded or alone, whole or in parts."""

import copy

import pytest
import torch
from transformers import DynamicCache

from hybrid import Halting, HybridModel, PresetConfigs, TokenHalting, record_steps
from hybrid.demo.base import make_base
from hybrid.demo.shell_game import ShellGame, accuracy_by_swaps, adaptive_by_swaps
from hybrid.model.cache_name import as_argument
from tests.support.tiny import VOCABULARY, awaken, tiny_hybrid, tokens

N = 6
SIZES = {"num_recursion_steps": N, "injection_layers": [0, 2], "trm_num_layers": 1}
RULES = [
    Halting(0.05),
    Halting(0.1, in_order=False),
    Halting(0.2, watch="latent"),
    Halting(0.2, watch="latent", in_order=False),
]
every_rule = pytest.mark.parametrize("rule", RULES, ids=str)
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


@pytest.fixture(scope="module")
def hybrid():
    return tiny_hybrid(**SIZES)


@torch.no_grad()
def run(hybrid, ids, rule, **kwargs):
    """(logits, steps, output)"""
    with record_steps() as record:
        output = hybrid(ids, halting=rule, **kwargs)
    return output.logits, record.forwards[0].steps, output


def in_parts(hybrid, ids, rule, parts, cache=None):
    """(logits, steps) of one part after the other, into one cache."""
    told, at = [], 0
    for part in parts:
        logits, steps, output = run(
            hybrid, ids[:, at : at + part], rule, **as_argument(cache), use_cache=True
        )
        cache, at = output.past_key_values, at + part
        told.append((logits, steps))
    return tuple(torch.cat(t, dim=1) for t in zip(*told, strict=True))


@every_rule
@pytest.mark.parametrize("parts", [(9,), (4, 1, 3, 1), (1,) * 9], ids=str)
def test_with_a_cache_as_without(hybrid, rule, parts):
    ids = tokens()
    want, want_steps, _ = run(hybrid, ids, rule, use_cache=False)
    assert len(set(want_steps.flatten().tolist())) > 2, "a test that could not fail"
    got, steps = in_parts(hybrid, ids, rule, parts)
    assert torch.equal(steps, want_steps)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@every_rule
def test_no_later_token_changes_when_an_earlier_one_stops(hybrid, rule):
    ids = tokens(1)
    want, want_steps, _ = run(hybrid, ids, rule)
    for at in range(1, ids.shape[1]):
        other = ids.clone()
        other[:, at:] = (other[:, at:] + 17) % VOCABULARY
        got, steps, _ = run(hybrid, other, rule)
        assert torch.equal(steps[:, :at], want_steps[:, :at])
        torch.testing.assert_close(got[:, :at], want[:, :at], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", [*RULES, TokenHalting(2), TokenHalting(1, in_order=False)], ids=str)
def test_a_left_padded_batch_is_each_sequence_alone(hybrid, rule):
    long, short = tokens(1, 9), tokens(1, 5, seed=1)
    batch = torch.cat((long, torch.cat((torch.zeros(1, 4, dtype=torch.long), short), dim=1)))
    mask = (batch != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    with record_steps() as record:
        got, steps, _ = run(hybrid, batch, rule, **given)
        told = hybrid.generate(batch, attention_mask=mask, halting=rule, **GREEDY | no_cache(rule))
    for row, ids in ((0, long), (1, short)):
        want, want_steps, _ = run(hybrid, ids, rule, use_cache=False)
        T = ids.shape[1]
        assert torch.equal(steps[row, -T:], want_steps[0])
        torch.testing.assert_close(got[row, -T:], want[0], rtol=1e-5, atol=1e-5)
        alone = hybrid.generate(ids, halting=rule, **GREEDY | no_cache(rule))
        assert torch.equal(told[row : row + 1, -T - 3 :], alone)
    if isinstance(rule, Halting):  # TokenHalting counts the tokens that were asked for: the last
        assert torch.equal(record.forwards[0].is_token, mask.bool())


def no_cache(rule):
    return {"use_cache": False} if isinstance(rule, TokenHalting) else {}


@pytest.mark.parametrize("rule", RULES[:3], ids=str)
def test_every_search_tells_the_same_with_and_without_a_cache(hybrid, rule):
    ids = tokens()
    for how in ({}, {"num_beams": 2}):
        want = hybrid.generate(ids, use_cache=False, halting=rule, **GREEDY, **how)
        assert torch.equal(hybrid.generate(ids, halting=rule, **GREEDY, **how), want), how
        static = hybrid.generate(ids, halting=rule, cache_implementation="static", **GREEDY, **how)
        assert torch.equal(static, want), how
    alone = hybrid.generate(ids[:1], halting=rule, **GREEDY)
    cropped = hybrid.generate(ids[:1], halting=rule, prompt_lookup_num_tokens=2, **GREEDY)
    assert torch.equal(cropped, alone)
    assert not torch.equal(hybrid.generate(ids, **GREEDY), want) or rule.threshold < 0.1


def test_in_order_no_token_stops_before_an_earlier_one():
    """Also where the earlier ones are in a cache."""
    ids, rule = tokens(4), Halting(0.05)
    alone = tiny_hybrid(num_recursion_steps=N, injection_layers=[2], num_cycles=1)
    _, free, _ = run(alone, ids, RULES[1])
    assert (free.diff(dim=1) < 0).any(), "a test that could not fail"
    for parts in ((9,), (5, 1, 1, 2)):
        _, steps = in_parts(alone, ids, rule, parts)
        assert (steps.diff(dim=1) >= 0).all() and (steps.diff(dim=1) > 0).any()


@torch.no_grad()
def test_packed_documents_are_each_alone(hybrid):
    ids = tokens(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    for rule in RULES:
        got, steps, _ = run(hybrid, ids, rule, position_ids=positions, use_cache=False)
        for part in (slice(0, 5), slice(5, 9)):
            want, want_steps, _ = run(hybrid, ids[:, part], rule, use_cache=False)
            assert torch.equal(steps[:, part], want_steps)
            torch.testing.assert_close(got[:, part], want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_most_steps_are_those_of_a_fixed_number(hybrid):
    ids = tokens()
    for n in (3, N):
        want = hybrid(ids, num_recursion_steps=n).logits
        for watch in ("answer", "latent"):
            got, steps, _ = run(hybrid, ids, Halting(0.0, watch=watch), num_recursion_steps=n)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            assert steps.eq(n).all()


@torch.no_grad()
def test_a_cache_filled_under_another_rule_is_refused(hybrid):
    ids = tokens()
    for filled, rule in (
        (RULES[0], None),
        (None, RULES[0]),
        (RULES[0], Halting(0.06)),
        (RULES[2], Halting(0.1, watch="latent", in_order=False)),
        # as many layers as a fixed n of 2 N - 1
        (Halting(0.1, in_order=False), None),
    ):
        n = 2 * N - 1 if filled == RULES[1] else N
        cache = hybrid(ids[:, :4], use_cache=True, halting=filled).past_key_values
        with pytest.raises(ValueError, match="one filled under"):
            hybrid(ids[:, 4:], **as_argument(cache), halting=rule, num_recursion_steps=n)
    cache = hybrid(ids[:, :4], use_cache=True, halting=RULES[0]).past_key_values
    with pytest.raises(ValueError, match="this num_recursion_steps"):
        hybrid(ids[:, 4:], **as_argument(cache), halting=RULES[0], num_recursion_steps=3)
    cache.crop(-4)  # empty again
    assert hybrid(ids, **as_argument(cache)).logits.shape[1] == 9


def test_what_cannot_be_combined_says_why(hybrid):
    ids = tokens()
    for rule in (RULES[0], TokenHalting()):
        training = tiny_hybrid().train()
        with pytest.raises(ValueError, match="expected a model in eval mode, got one in training"):
            training(ids, halting=rule)
        with pytest.raises(RuntimeError, match="expected a call without gradient"):
            hybrid(ids, halting=rule, use_cache=False)
    with torch.no_grad():
        with pytest.raises(ValueError, match="halting to be Halting or TokenHalting, got 0.1"):
            hybrid(ids, halting=0.1)
        with pytest.raises(ValueError, match="TokenHalting expected use_cache=False, got a cache"):
            hybrid(ids, halting=TokenHalting(), use_cache=True)
        with pytest.raises(ValueError, match="TokenHalting expected use_cache=False, got a cache"):
            hybrid.generate(ids, halting=TokenHalting(), **GREEDY)
        with pytest.raises(ValueError, match="gives logits and a loss, got output_hidden_states"):
            hybrid(ids, halting=TokenHalting(), output_hidden_states=True)
        with pytest.raises(ValueError, match="expected regime auto or per_op, got 'per_phase'"):
            tiny_hybrid(trm_regime="per_phase")(ids, halting=RULES[0])


@torch.no_grad()
def test_a_models_own_rule_holds_for_calls_that_say_nothing():
    ids, hybrid = tokens(), tiny_hybrid(**SIZES)
    fixed = hybrid(ids).logits
    want, told = run(hybrid, ids, RULES[0])[0], hybrid.generate(ids, halting=RULES[0], **GREEDY)
    hybrid.halting = RULES[0]
    assert torch.equal(hybrid(ids).logits, want) and torch.equal(hybrid.generate(ids, **GREEDY), told)
    assert torch.equal(hybrid(ids, halting=False).logits, fixed)
    with hybrid.disable_injection():
        assert torch.equal(hybrid(ids).logits, hybrid.llm_model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("in_order", [True, False])
def test_a_token_halts_when_its_top_token_stays(hybrid, in_order):
    """In order: at the first n, from those on at which the earlier ones did, at which it has stayed."""
    ids, patience = tokens(3, 4), 2
    logits = torch.stack([hybrid(ids, num_recursion_steps=n).logits for n in range(1, N + 1)])
    top, want = logits.argmax(-1), torch.full(ids.shape, N)
    for b in range(len(ids)):
        for t in range(ids.shape[1]):
            earliest = int(want[b, t - 1]) if in_order and t else 1
            for n in range(max(earliest, patience + 1), N + 1):
                if len(set(top[n - patience - 1 : n, b, t].tolist())) == 1:
                    want[b, t] = n
                    break
    assert len(want.unique()) > 1 and len(want.amax(dim=1).unique()) > 1, "a test that could not fail"
    rule = TokenHalting(patience, in_order=in_order)
    with record_steps() as record:
        output = hybrid(ids, halting=rule, labels=ids, use_cache=False)
        last = hybrid(ids, halting=rule, logits_to_keep=1, use_cache=False).logits
    assert torch.equal(record.forwards[0].steps, want.float())
    expected = logits[want - 1, torch.arange(3)[:, None], torch.arange(4)]
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, expected[:, -1:], rtol=1e-5, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=1e-5)
    # every forward that a sequence took part in: n + 1 in each of two cycles
    spent = [sum(2 * (n + 1) for n in range(1, int(row.max()) + 1)) for row in want]
    assert record.forwards[0].evaluations[:, 0].tolist() == spent


def test_the_record(hybrid):
    ids, rule = tokens(), RULES[0]
    with record_steps() as record:
        told = hybrid.generate(ids, halting=rule, **GREEDY)
        with torch.no_grad(), record_steps() as fixed:
            hybrid(ids, num_recursion_steps=3)
    assert told.shape == (2, 12) and [f.steps.shape for f in record.forwards] == [(2, 9), (2, 1), (2, 1)]
    whole = run(hybrid, told[:, :-1], rule, use_cache=False)[1]
    torch.testing.assert_close(record.steps_by_sequence(), whole.mean(dim=1))
    assert record.mean_steps == pytest.approx(float(whole.mean())) and 2 < record.mean_steps < N
    assert record.mean_evaluations == pytest.approx(2 * 2 * record.mean_steps)  # y and z, in two cycles
    assert (fixed.mean_steps, fixed.mean_evaluations) == (3, 2 * 4)


def test_a_filled_cache_copied_goes_on_under_its_rule(hybrid):
    """As prefix caching does it: one prompt, two continuations."""
    ids, rule = tokens(1), RULES[0]
    _, _, filled = run(hybrid, ids[:, :6], rule, **as_argument(DynamicCache()))
    for _ in range(2):
        got, _ = in_parts(hybrid, ids[:, 6:], rule, (2, 1), copy.deepcopy(filled.past_key_values))
        torch.testing.assert_close(got, run(hybrid, ids, rule)[0][:, 6:], rtol=1e-5, atol=1e-5)


def test_the_shell_game_tells_steps_beside_accuracy():
    torch.manual_seed(0)
    hybrid = awaken(HybridModel(llm_model=make_base(), config=PresetConfigs.tiny())).eval()
    games = ShellGame(20, 7, 0)
    fixed = adaptive_by_swaps(hybrid, games, None, 5)
    assert fixed.accuracy == accuracy_by_swaps(hybrid, games, 5)
    assert (fixed.steps, fixed.evaluations) == ([5.0] * 7, [6.0] * 7)
    told = adaptive_by_swaps(hybrid, games, Halting(0.2))
    assert told.accuracy == accuracy_by_swaps(hybrid, games, halting=Halting(0.2))
    assert len(told.steps) == 7 and all(2 <= n < 8 for n in told.steps)
    assert told.evaluations == pytest.approx([2 * n for n in told.steps])
