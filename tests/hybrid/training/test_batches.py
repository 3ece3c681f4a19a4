"""Which items a step has: short ones first, and texts that are kept among others."""

import json
from itertools import islice

import pytest
import torch

from hybrid.data.sources import Sources
from hybrid.data.stream import TokenStream
from hybrid.training.batches import LengthCurriculum, Share, batches
from hybrid.training.loop import train
from tests.hybrid.training.test_train import (
    Stopped,
    assert_equal,
    lines_of,
    phase_1,
    settings_for,
    stop_after,
)
from tests.support.tiny_text import TEXT, Counting, character_tokenizer, tiny_hybrid

# a row of 3, 4, ... 14 tokens that is answered at its end only
ROWS = [{"text": ["abcdefghijklmnop"[: 2 + i % 12]], "answers": ["0123456789"[i % 10]]} for i in range(60)]
ONE = Share(0, 1, 4, 1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def stream(name, **options):
    return TokenStream(Sources([name]), character_tokenizer(), 16, **{"shuffled_rows": 10} | options)


def rows_of(step):
    """The tokens of every row of a step's batches, without padding."""
    rows = []
    for batch, _, _ in step:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        rows += [tuple(t[m].tolist()) for t, m in zip(batch["input_ids"], mask, strict=True)]
    return rows


# A length curriculum


def test_a_length_grows_evenly():
    curriculum = LengthCurriculum(first=4, last=12, steps=16)
    assert [curriculum.at(step) for step in range(18)] == [4 + step // 2 for step in range(16)] + [None, None]
    for wrong in ({"first": 1}, {"first": 13}, {"steps": 0}):
        with pytest.raises(ValueError, match="a first length in 2..12 tokens and at least 1 step, got"):
            LengthCurriculum(**{"first": 4, "last": 12, "steps": 16} | wrong)


def test_texts_are_cut_and_none_is_left_out(folder):
    curriculum = LengthCurriculum(4, 16, 6)
    steps = [
        [rows_of(step) for step, _ in batches(stream("text.txt"), 0, ONE, range(8), None, chosen)]
        for chosen in (None, curriculum)
    ]
    for step, (whole, cut) in enumerate(zip(*steps, strict=True)):
        assert cut == [row[: curriculum.at(step)] for row in whole]


@pytest.mark.parametrize("make", [lambda: stream("rows.jsonl"), lambda: Answered()], ids=["stream", "items"])
def test_what_is_answered_at_its_end_waits_until_it_fits(folder, make):
    """Those that fit come in the order of the data, whatever the number of processes; none is changed."""
    curriculum = LengthCurriculum(3, 15, 12)
    whole = [rows_of(step) for step, _ in batches(make(), 0, ONE, range(60), None)]
    order = iter([row for step in whole for row in step])
    steps = [rows_of(s) for s, _ in batches(make(), 0, ONE, range(16), None, curriculum)]
    for step, rows in enumerate(steps):
        fits = (row for row in order if len(row) <= (curriculum.at(step) or 16))
        assert rows == list(islice(fits, 4))
    assert {len(row) for row in steps[0]} == {3}
    shares = [
        [rows_of(s) for s, _ in batches(make(), 0, Share(r, 2, 2, 1), range(16), None, curriculum)]
        for r in (0, 1)
    ]
    assert [sorted(rows) for rows in steps] == [sorted(a + b) for a, b in zip(*shares, strict=True)]
    for done in (1, 5, 13):
        *_, (_, place) = batches(make(), 0, ONE, range(done), None, curriculum)
        place = json.loads(json.dumps(place))
        rest = batches(make(), 0, ONE, range(done, 16), place, curriculum)
        assert [rows_of(step) for step, _ in rest] == steps[done:]


class Answered(Counting):
    """Items of 3 to 14 tokens with one label each, the last."""

    def __getitem__(self, index):
        ids = super().__getitem__(index)["input_ids"][: 3 + index % 12]
        return {"input_ids": ids, "labels": torch.where(torch.arange(len(ids)) < len(ids) - 1, -100, ids)}


def test_a_curriculum_in_which_nothing_fits(folder):
    for data in (stream("rows.jsonl"), Answered()):
        with pytest.raises(ValueError, match="a label in their first 2 tokens .* got none in a whole pass"):
            next(batches(data, 0, ONE, range(1), None, LengthCurriculum(2, 16, 100)))


def test_a_run_with_a_curriculum_resumes_exactly(folder, tmp_path):
    settings = {"length_curriculum": LengthCurriculum(3, 16, 16)}
    straight, resumed = phase_1(), phase_1()
    train(straight, stream("rows.jsonl"), settings_for(tmp_path / "a", **settings))
    with pytest.raises(Stopped):
        train(
            phase_1(), stream("rows.jsonl"), settings_for(tmp_path / "b", **settings), on_step=stop_after(13)
        )
    train(resumed, stream("rows.jsonl"), settings_for(tmp_path / "b", **settings), resume=True)
    assert_equal(resumed, straight)
    assert lines_of(tmp_path / "b") == lines_of(tmp_path / "a")
    with pytest.raises(ValueError, match="expected length_curriculum.first 3 as it began, got none"):
        train(phase_1(), stream("rows.jsonl"), settings_for(tmp_path / "b"), resume=True)
    with pytest.raises(ValueError, match="a length_curriculum within 15 steps .* got 16"):
        settings_for(tmp_path, steps=15, **settings)


# Texts that are kept


def test_a_share_of_each_step_is_kept():
    for ratio, kept in ((0.25, 3), (0.01, None), (0.99, None), (0.5, 6)):
        shares = [Share(rank, 3, 2, 2) for rank in range(3)]
        if kept is None:
            with pytest.raises(ValueError, match=f"keep_ratio .* the 12 items .* at least one, got {ratio}"):
                shares[0].split(ratio)
            continue
        both = [share.split(ratio) for share in shares]
        for part, items in ((0, 12 - kept), (1, kept)):
            assert {pair[part].items_per_step for pair in both} == {items}
            for number in range(items):
                assert sum(pair[part].has(number) for pair in both) == 1
    for share in (Share(rank, 3, 1, 1).split(1 / 3) for rank in range(3)):
        assert any(part.has(number) for part in share for number in range(part.items_per_step))


def test_both_means_weigh_as_many_items_as_they_have(folder, tmp_path):
    """However long the texts are beside the rows with labels."""
    data, keep = stream("rows.jsonl"), stream("text.txt")
    losses = []
    settings = settings_for(tmp_path, batch_size=4, steps=3, keep_ratio=0.25, learning_rate=1e-9)
    model = tiny_hybrid()
    train(model, data, settings, on_step=lambda _, loss: losses.append(loss), keep=keep)
    shares = Share(0, 1, 4, 1).split(0.25)
    feeds = [
        batches(some, 0, share, range(3), None) for some, share in zip((data, keep), shares, strict=True)
    ]
    for step, pair in enumerate(zip(*feeds, strict=True)):
        n = model.draw_recursion_steps(step)
        (rows,), (text,) = ([batch.inputs for batch in of_part] for of_part, _ in pair)
        assert (len(rows["labels"]), len(text["labels"])) == (3, 1)
        with torch.no_grad():
            means = [
                model.train()(**batch, use_cache=False, num_recursion_steps=n).loss for batch in (rows, text)
            ]
        assert losses[step] == pytest.approx(0.75 * means[0].item() + 0.25 * means[1].item(), rel=1e-5)


def test_a_run_with_kept_texts_resumes_exactly(folder, tmp_path):
    def run(model, name, **more):
        settings = settings_for(tmp_path / name, keep_ratio=1 / 3, accumulate=2)
        train(model, stream("rows.jsonl"), settings, keep=stream("text.txt"), **more)

    straight, resumed = phase_1(), phase_1()
    run(straight, "a")
    with pytest.raises(Stopped):
        run(phase_1(), "b", on_step=stop_after(13))
    run(resumed, "b", resume=True)
    assert_equal(resumed, straight)
    assert lines_of(tmp_path / "b") == lines_of(tmp_path / "a")
    with pytest.raises(ValueError, match="expected keep_ratio 0.333.* as it began, got 0.5"):
        settings = settings_for(tmp_path / "b", keep_ratio=0.5, accumulate=2)
        train(phase_1(), stream("rows.jsonl"), settings, keep=stream("text.txt"), resume=True)
    with pytest.raises(ValueError, match="expected keep and keep_ratio together, got one"):
        train(phase_1(), stream("rows.jsonl"), settings_for(tmp_path / "c"), keep=stream("text.txt"))
