"""Rows that bring their own labels: what they say, how they are streamed, padded, trained on and measured."""

import json
import types
from dataclasses import asdict
from itertools import islice

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hybrid.data.blocks import TokenBlocks, read_rows
from hybrid.data.collate import collate
from hybrid.data.sources import Sources
from hybrid.data.stream import StreamPlace, TokenStream
from hybrid.demo.shell_game import ShellGame, follow
from hybrid.training.batches import Share, batches
from hybrid.training.evaluate import text_loss
from hybrid.training.loop import train
from tests.hybrid.training.test_train import (
    Stopped,
    assert_equal,
    lines_of,
    phase_1,
    settings_for,
    stop_after,
)
from tests.support import tiny
from tests.support.tiny_text import CHARACTERS, character_tokenizer, tiny_base

GAMES = [ShellGame(90, 3 + k % 7, seed=k).game(k) for k in range(90)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [name]


def as_row(ball, swaps):
    """A game: after every swap it is asked where the ball is."""
    return {"text": [str(ball), *swaps], "answers": [None, *map(str, follow(ball, swaps))]}


@pytest.fixture
def games(folder):
    return write(folder, "games.jsonl", [as_row(*game) for game in GAMES])


def read(names, length=16, tokenizer=None):
    return read_rows(names, tokenizer or character_tokenizer(), length)


def stream(sources, length=16, **options):
    return TokenStream(Sources(sources), character_tokenizer(), length, **{"shuffled_rows": 20} | options)


def characters(ids):
    return [None if i == -100 else CHARACTERS[i] for i in ids]


def some(data, number, at=None):
    return [(tuple(r.tokens), tuple(r.labels), place) for r, place in islice(data.rows(at), number)]


# What a row says


def test_what_is_asked_for_after_a_token_stands_beside_the_next(games):
    """The demo's games, written as rows, are the items that the demo trains on."""
    rows = read(games)
    assert len(rows) == 90
    for k, (ball, swaps) in enumerate(GAMES):
        game = ShellGame(90, len(swaps), seed=k)[k]
        assert game["input_ids"].tolist() == list(f"{ball}{swaps}{follow(ball, swaps)[-1]}".encode())
        for name in ("input_ids", "labels"):
            wanted = [None if i == -100 else chr(i) for i in game[name]]
            assert characters(rows[k][name]) == wanted
            assert rows[k][name].dtype == torch.int64


def test_the_three_forms(folder):
    names = write(
        folder, "a.jsonl", [{"prompt": "ab", "completion": "cd"}, {"prompt": "ab", "completion": ""}]
    )
    end, a, b, c, d = (CHARACTERS.index(x) for x in ("<end>", *"abcd"))
    first, second = read(names)
    assert first["input_ids"].tolist() == [a, b, c, d, end]
    assert first["labels"].tolist() == [-100, -100, c, d, end]
    assert second["labels"].tolist() == [-100, -100, end]
    with pytest.raises(ValueError, match="line 2: expected a label that counts"):
        read(names, tokenizer=character_tokenizer(with_end=False))  # nothing closes an empty one

    tokens = {"input_ids": [a, b, c, d], "labels": [-100, b, -100, a]}
    parts = {"text": ["a", "bc", "d"], "answers": ["b", "a", None]}
    (item,), (same,) = (read(write(folder, "a.jsonl", [row])) for row in (tokens, parts))
    assert item["input_ids"].tolist() == same["input_ids"].tolist() == [a, b, c, d]
    assert item["labels"].tolist() == same["labels"].tolist() == [-100, b, -100, a]


def test_a_row_whose_field_is_a_text_is_text(folder):
    names = write(
        folder, "a.jsonl", [{"text": "abcd" * 4, "answers": ["x"], "prompt": "a", "completion": "b"}]
    )
    assert isinstance(read(names), TokenBlocks)
    names = write(folder, "a.jsonl", [{"story": ["a"], "answers": ["bc"], "text": "no"}])
    assert characters(read_rows(Sources(names, "story"), character_tokenizer(), 9)[0]["labels"]) == [
        None,
        "b",
        "c",
    ]


def test_a_part_ends_where_a_token_does(folder):
    vocabulary = {token: i for i, token in enumerate(["a", "b", "ab", "c"])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    (item,) = read(write(folder, "a.jsonl", [{"text": ["cab", "ab"], "answers": ["b", "ab"]}]), 9, tokenizer)
    assert item["input_ids"].tolist() == [3, 2, 2, 2]
    assert item["labels"].tolist() == [-100, -100, 1, 2]
    with pytest.raises(
        ValueError, match="a.jsonl, line 1: expected a token to end where part 1 .* after 'ca'"
    ):
        read(write(folder, "a.jsonl", [{"text": ["ca", "b"], "answers": ["b", "b"]}]), 9, tokenizer)
    with pytest.raises(ValueError, match="after 'ca', got one that goes on"):
        read(write(folder, "a.jsonl", [{"prompt": "ca", "completion": "b"}]), 9, tokenizer)


IDS = {"input_ids": [1, 2], "labels": [-100, 3]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (IDS | {"labels": [1]}, "expected lists of as many whole numbers in input_ids and labels"),
        (IDS | {"input_ids": "12"}, "expected lists of as many whole numbers in input_ids and labels"),
        (IDS | {"input_ids": [1, -2]}, "expected tokens from 0 on and labels like these or -100, got -2"),
        (IDS | {"labels": [-1, 2]}, "expected tokens from 0 on and labels like these or -100, got -1"),
        (
            IDS | {"labels": [3, -100]},
            "expected a label that counts beside a token after the first, got none",
        ),
        ({"input_ids": [1] * 9, "labels": [1] * 9}, "expected at most 8 tokens .*, got 9"),
        ({"prompt": "a" * 5, "completion": "abc"}, "expected at most 8 tokens .*, got 9"),
        ({"prompt": "", "completion": "b"}, "a text in prompt, not an empty one"),
        ({"prompt": "a", "completion": 3}, "one in completion, got 'a' and 3"),
        ({"text": ["a", "b"], "answers": ["c"]}, "as many answers .* got 2 parts and"),
        ({"text": ["a", ""], "answers": ["c", "d"]}, "none of them empty"),
        ({"text": ["a", "b"], "answers": [None, None]}, "expected a label that counts"),
        ({"text": ["a", "b"], "answers": ["cd", "e"]}, "inside of the text to have one token, got 'cd' of 2"),
        ({"text": "abc"}, "expected labels, as in the first row of a.jsonl, got text without"),
    ],
)
def test_a_row_that_cannot_be_is_named(row, message, folder):
    good = {"prompt": "a", "completion": "b"}
    names = write(folder, "a.jsonl", [good, good, row])
    data = stream(names, 8)
    with pytest.raises(ValueError, match=f"a.jsonl, line .*{message}"):
        list(islice(data.rows(), 3))


def test_a_label_beyond_the_vocabulary(folder):
    names = write(folder, "a.jsonl", [IDS | {"labels": [-100, 97]}] * 2)
    with pytest.raises(
        ValueError, match="a.jsonl, line 1: expected .* vocabulary of 97 tokens, got token 97"
    ):
        next(stream(names, 8, vocabulary=97).rows())


def test_text_first_and_labels_later(folder, games):
    (folder / "a.txt").write_text("some text " * 9)
    with pytest.raises(ValueError, match="games.jsonl, line 1: expected text, as in the first .* got labels"):
        read(["a.txt", *games])
    with pytest.raises(ValueError, match="a.txt: expected labels, as in the first row of games.jsonl, a.txt"):
        read([*games, "a.txt"])
    with pytest.raises(ValueError, match="TokenBlocks: expected text, got rows with labels in games.jsonl"):
        TokenBlocks.read(games, character_tokenizer(), 16)


# Streams of them


@pytest.fixture(params=["jsonl", "parquet", "data set"])
def sources(request, games, folder, monkeypatch):
    monkeypatch.setattr("hybrid.data.readers._ROWS", 7)
    if request.param == "jsonl":
        return games
    datasets = pytest.importorskip("datasets", reason="parquet needs the package datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if request.param == "parquet":
        datasets.Dataset.from_list([as_row(*game) for game in GAMES]).to_parquet(folder / "a.parquet")
        return ["a.parquet"]
    (folder / "set").mkdir()
    (folder / "set" / "train.jsonl").write_text((folder / "games.jsonl").read_text())
    return ["set"]


def test_every_row_comes_once_a_pass_and_it_goes_on_from_anywhere(sources):
    rows = some(stream(sources), 190)
    wanted = sorted(tuple(item["input_ids"].tolist()) for item in read(sources))
    assert sorted(row[0] for row in rows[:90]) == sorted(row[0] for row in rows[90:180]) == wanted
    assert [row[0] for row in rows[:90]] != [row[0] for row in rows[90:180]]
    for k in (0, 6, 7, 19, 20, 45, 88, 89, 90, 150):
        place = StreamPlace(**json.loads(json.dumps(asdict(rows[k][2]))))
        assert some(stream(sources), 5, place) == rows[k + 1 : k + 6]


def test_workers_change_nothing(games, monkeypatch):
    monkeypatch.setattr("hybrid.data.piece_tokens._CHUNK_PIECES", 4)
    assert some(stream(games, workers=2), 120) == some(stream(games), 120)


def test_what_is_held_out_is_not_trained_on(games):
    data = stream(games, held_out=3)
    held_out = data.held_out_rows()
    everything = {tuple(item["input_ids"].tolist()) for item in read(games)}
    left_out = {tuple(item["input_ids"].tolist()) for item in held_out}
    assert len(held_out) == 3
    assert {row[0] for row in some(data, 87)} == everything - left_out


def test_shares_and_padding(games):
    """Two processes have what one has; a batch is as long as its longest row, and says what is padding."""

    def seen(rank, processes, batch_size):
        share = Share(rank, processes, batch_size, 1)
        return [
            batch.inputs for step, _ in batches(stream(games), 0, share, range(4), None) for batch in step
        ]

    one, two = seen(0, 1, 6), seen(0, 2, 3) + seen(1, 2, 3)
    rows = []
    for many in (one, two):
        rows.append([])
        for batch in many:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            assert mask.any(0).all()
            assert (batch["labels"][~mask] == -100).all()
            pairs = zip(batch["input_ids"], mask, strict=True)
            rows[-1] += [tuple(tokens[real].tolist()) for tokens, real in pairs]
    assert sorted(rows[0]) == sorted(rows[1])
    assert any("attention_mask" in batch for batch in one)
    equal = collate([{"input_ids": torch.arange(3), "labels": torch.arange(3)}] * 2)
    assert "attention_mask" not in equal


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_padding_changes_nothing(family):
    model = tiny.tiny_hybrid(family)
    ids = [tiny.tokens(1, length, seed=length)[0] for length in (9, 5, 12)]
    batch = collate([{"input_ids": row, "labels": row} for row in ids])
    logits = model(**batch, use_cache=False).logits
    for row, got in zip(ids, logits, strict=True):
        alone = model(input_ids=row[None], use_cache=False).logits[0]
        torch.testing.assert_close(got[: len(row)], alone, rtol=1e-4, atol=1e-5)


# Training and measuring


def test_a_run_resumes_exactly(games, tmp_path):
    held_out = {"new": stream(games, held_out=4).held_out_rows()}
    straight = phase_1()
    train(straight, stream(games, held_out=4), settings_for(tmp_path / "a"), held_out)
    with pytest.raises(Stopped):
        train(
            phase_1(),
            stream(games, held_out=4),
            settings_for(tmp_path / "b"),
            held_out,
            on_step=stop_after(13),
        )
    resumed = phase_1()
    train(resumed, stream(games, held_out=4), settings_for(tmp_path / "b"), held_out, resume=True)
    assert_equal(resumed, straight)
    assert lines_of(tmp_path / "b") == lines_of(tmp_path / "a")


def test_only_labels_are_counted(games):
    model, rows = tiny_base(), read(games)
    nats = tokens = right = 0
    with torch.no_grad():
        for item in (rows[i] for i in range(len(rows))):
            chances = model(item["input_ids"][None]).logits[0].double().log_softmax(-1)
            for t, label in enumerate(item["labels"].tolist()):
                if label != -100:
                    nats -= chances[t - 1, label].item()
                    right += int(chances[t - 1].argmax()) == label
                    tokens += 1
    loss = text_loss(model, rows, batch_size=7)
    assert (loss.tokens, loss.right) == (tokens, right)
    assert tokens == sum(len(swaps) for _, swaps in GAMES)
    assert loss.per_token == pytest.approx(nats / tokens, rel=1e-5)
    assert loss.accuracy == right / tokens


class Knowing(torch.nn.Module):
    """Its likeliest token is the label, but for tokens that it does not know."""

    device = torch.device("cpu")

    def forward(self, input_ids, labels, unknown=9, **given):
        following = torch.cat([labels[:, 1:], labels[:, :1]], dim=1).clamp(min=0)
        following[following == unknown] = 0
        logits = torch.nn.functional.one_hot(following, 10).float()
        return types.SimpleNamespace(logits=logits, loss=torch.tensor(1.0))


def test_a_row_is_right_when_all_its_labels_are():
    labels = [[7, -100, 3, 4], [-100, 9, 3, -100], [-100, -100, 5, -100], [6, -100, -100, -100]]
    rows = [{"input_ids": torch.zeros(4, dtype=torch.int64), "labels": torch.tensor(row)} for row in labels]
    loss = text_loss(Knowing(), rows, batch_size=2)
    assert (loss.tokens, loss.right, loss.rows) == (5, 4, 2), "the first of a row is not predicted"
