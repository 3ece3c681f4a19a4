"""The demonstration on a real base, with a tiny one: games, answers, cached hidden states, loss and loop."""

from dataclasses import replace

import pytest
import torch

from hybrid import HybridConfig, HybridModel
from hybrid.demo.real.game import WORDS
from hybrid.demo.real.questions import NOTHING, AskedText, encode
from hybrid.demo.real.states import hidden_states
from hybrid.demo.real.training import AnswerLoss, Known, Model, TrainingPlan, _Loss, train
from tests.support.tiny_words import word_base, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


# Games


def test_a_game_is_followed_move_by_move():
    assert WORDS.follow("A", [" left", " left", " outer", " right", " left"]) == ["B", "A", "C", "B", "A"]


def test_a_text_asks_after_each_move_and_at_the_end():
    text = WORDS.text(3, held_out=True, length=20, closing=" Where?")
    begin, *moves, closing = text.pieces
    assert begin.startswith("The ball is under cup ") and closing == " Where?" and len(moves) == 20
    cup = begin.removeprefix("The ball is under cup ")[0]
    assert text.answers == (None, *(f" {c}" for c in WORDS.follow(cup, moves)), text.answers[-2])
    assert WORDS.text(3, held_out=True, length=20, closing=" Where?") == text, "a function of its arguments"
    assert WORDS.text(4, held_out=True, length=20, closing=" Where?") != text


def test_no_beginning_is_both_trained_on_and_held_out():
    def beginnings(held_out):
        texts = [WORDS.text(i, held_out, length=16) for i in range(400)]
        return {text.pieces[:7] for text in texts}

    assert not beginnings(True) & beginnings(False)
    lengths = [len(WORDS.text(i, False).pieces) - 2 for i in range(400)]
    assert min(lengths) == 1 and max(lengths) == WORDS.most
    assert 0.4 < lengths.count(WORDS.most) / 400 < 0.6


# Tokens


def test_an_answer_stands_beside_the_token_that_it_follows(tokenizer):
    text = AskedText(
        ("The ball is under cup A. Swap these cups:", " left", ". Now it is under cup"), (None, " B", " C")
    )
    longer = replace(text, pieces=(text.pieces[0], " left outer", text.pieces[2]))
    some = encode(tokenizer, [text, longer])
    for row, one in enumerate([text, longer]):
        ids = some.ids[row, : some.lengths()[row]]
        assert tokenizer.decode(ids) == one.prompt
        places = (some.asked[row] != NOTHING).nonzero()[:, 0].tolist()
        assert tokenizer.decode(some.asked[row, places]) == " B C"
        assert tokenizer.decode(ids[: places[0] + 1]) == "".join(one.pieces[:2])
        assert some.closing()[row].nonzero()[:, 0].tolist() == [places[1]] == [len(ids) - 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (AskedText(("The ball",), (" right left",)), "an answer of one token, got ' right left', which is 2"),
        (
            AskedText(("The b", "all"), (None, " A")),
            "pieces whose tokens are those of the text, got 'The ball'",
        ),
    ],
)
def test_what_cannot_be_asked(text, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, [text])


# Hidden states


def a_hybrid(base, **changes) -> Model:
    torch.manual_seed(1)
    sizes = {"trm_hidden_size": 16, "trm_num_heads": 2, "trm_num_layers": 1, "trm_intermediate_size": 32}
    config = HybridConfig(
        injection_layers=[2], num_recursion_steps=2, trm_attention="sdpa", **sizes | changes
    )
    return Model(HybridModel(llm_model=base, config=config).freeze_base(), base, 2)


@torch.no_grad()
def test_above_cached_hidden_states_all_is_as_if_computed(tokenizer):
    base = word_base()
    some = encode(tokenizer, [WORDS.text(i, False) for i in range(5)])
    kept = hidden_states(base, some.ids, (1, 2), some.lengths())
    model = a_hybrid(base)
    torch.nn.init.normal_(base.model.layers[1].trm.out_proj.weight)
    before, after = model.last_states(some.ids, kept[2])
    is_token = torch.arange(some.ids.shape[1]) < some.lengths()[:, None]
    want = model.whole(input_ids=some.ids, use_cache=False).logits
    # what is kept is bfloat16
    torch.testing.assert_close((after @ model.head.T)[is_token], want[is_token], rtol=0.1, atol=0.1)
    assert not torch.equal(before, kept[2].float()) and not torch.equal(kept[1], kept[2])
    assert base.lm_head.weight is model.head, "its head is back"
    assert torch.equal(model.whole(input_ids=some.ids, use_cache=False).logits, want), "its layers are back"


# The loss


def test_the_loss_is_over_some_tokens():
    torch.manual_seed(0)
    head, states = torch.randn(2000, 8), torch.randn(6, 8)
    tokens, answers = torch.tensor([5, 17, 1999]), torch.tensor([17, 5, 1999, 17, 5, 5])
    chances = (states @ head[tokens].T).softmax(-1)
    want = -chances[torch.arange(6), torch.tensor([1, 0, 2, 1, 0, 0])].log()
    torch.testing.assert_close(AnswerLoss(head, tokens)(states, answers), want)


def test_likely_tokens_and_answers_are_always_among_them():
    torch.manual_seed(0)
    head, states = torch.randn(900, 8), torch.randn(40, 8)
    tokens = AnswerLoss.likely(head, states, torch.tensor([7, 499, 7]))
    assert tokens.tolist() == sorted({*tokens.tolist()}) and {7, 499} <= {*tokens.tolist()}
    assert len(tokens) in (500, 501, 502)
    assert (states @ head.T).argmax(-1).mode().values.item() in tokens


# The loop


def learned(tokenizer, kept_rows=0, steps=40, **changes):
    base = word_base()
    weights = {name: p.clone() for name, p in base.state_dict().items()}
    some = encode(tokenizer, [WORDS.text(i, False, length=2) for i in range(64)])
    h = hidden_states(base, some.ids, (2,), some.lengths())[2]
    model = a_hybrid(base, **changes)
    plan = TrainingPlan(steps=steps, batch_size=16, kept=kept_rows, learning_rate=1e-2)
    result = train(model, Known(some, 2, h), plan, (some.ids, h, h))
    for name, before in weights.items():
        assert torch.equal(base.state_dict()[name], before), "the base is frozen"
    with torch.no_grad():
        changed, _ = model.last_states(some.ids, h)
    is_token = torch.arange(some.ids.shape[1]) < some.lengths()[:, None]
    return result, (changed - h.float())[is_token].norm().item()


def test_it_learns_and_the_base_does_not(tokenizer):
    result, changed = learned(tokenizer)
    assert result["steps"] == 40 and result["cpu_seconds"] > 0
    assert learned(tokenizer, steps=100)[0]["loss"] < learned(tokenizer, steps=4)[0]["loss"] - 2
    again, changed_again = learned(tokenizer)
    assert (again["loss"], changed_again) == (result["loss"], changed), "the same seed gives the same run"


def test_kept_text_is_left_alone(tokenizer):
    assert learned(tokenizer, kept_rows=4)[1] < 0.5 * learned(tokenizer)[1]


def test_short_games_come_first(tokenizer):
    base = word_base()
    some = encode(tokenizer, [WORDS.text(i, False) for i in range(100)])
    known = Known(some, 2, hidden_states(base, some.ids, (2,), some.lengths())[2])
    model, draw = a_hybrid(base), torch.Generator().manual_seed(0)
    of = _Loss(model, known, TrainingPlan(steps=100, growing=0.5), None, draw)
    longest = [int(of.moves[of.rows_of(step)].max()) for step in range(100)]
    assert set(longest[:3]) == {1} and 6 <= max(longest[:25]) <= 9 and max(longest[:45]) < 16
    assert set(longest[60:]) == {16}
    at_once = _Loss(model, known, TrainingPlan(steps=100, growing=0), None, draw)
    assert int(at_once.moves[at_once.rows_of(0)].max()) == 16


def test_time_ends_it(tokenizer):
    base = word_base()
    some = encode(tokenizer, [WORDS.text(i, False, length=2) for i in range(8)])
    h = hidden_states(base, some.ids, (2,), some.lengths())[2]
    assert train(a_hybrid(base), Known(some, 2, h), TrainingPlan(steps=50, seconds=0.0))["steps"] == 1
