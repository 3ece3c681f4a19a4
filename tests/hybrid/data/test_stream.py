"""Text of any size as a stream of rows: their order, going on from anywhere, documents that stay apart."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytest
import torch

from hybrid.cli import main
from hybrid.data.blocks import TokenBlocks
from hybrid.data.sources import Sources, documents
from hybrid.data.stream import StreamPlace, TokenStream
from hybrid.training.batches import Share, batches
from hybrid.training.evaluate import check_separate
from hybrid.training.loop import train
from tests.hybrid.cli.test_cli import options
from tests.hybrid.training.test_train import (
    Stopped,
    assert_equal,
    lines_of,
    phase_1,
    settings_for,
    stop_after,
)
from tests.support import forked, tiny
from tests.support.tiny_text import CHARACTERS, FIELDS, character_tokenizer, save_base

ROOT = Path(__file__).parents[3]
TEXTS = [f"{i**9} is {3**i % 10**12} and {7**i % 10**10} and so on"[: 20 + i % 30] for i in range(90)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def jsonl(folder):
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return ["a.jsonl"]


def stream(sources, length=16, **options):
    options = {"shuffled_rows": 20} | options
    return TokenStream(Sources(sources), character_tokenizer(), length, **options)


def some(data, number, at=None):
    """[(tokens, positions, place, number)] of the next rows."""
    return [(tuple(r.tokens), tuple(r.positions), p, r.number) for r, p in islice(data.rows(at), number)]


# What a row is


def test_rows_are_the_text_and_say_where_documents_begin(jsonl):
    data = stream(jsonl, shuffled_rows=1)  # rows in their own order
    rows = list(islice(data.rows(), 40))
    text = "".join(CHARACTERS[token] for row, _ in rows for token in row.tokens)
    assert "".join(f"{text}<end>" for text in TEXTS).startswith(text)
    for row, _ in rows:
        after = 0
        for k, token in enumerate(row.tokens):
            assert row.positions[k] == after
            after = 0 if token == CHARACTERS.index("<end>") else after + 1
        item = row.item(separate=True)
        assert torch.equal(item["labels"] == -100, item["position_ids"] == 0)
        assert "position_ids" not in row.item(separate=False)


def test_every_row_comes_once_a_pass_and_passes_differ(jsonl):
    rows_of_text = len(TokenBlocks.read(jsonl, character_tokenizer(), 16))
    rows = some(stream(jsonl), 2 * rows_of_text)
    first, second = ([row[0] for row in part] for part in (rows[:rows_of_text], rows[rows_of_text:]))
    assert sorted(first) == sorted(second)
    numbers = [sorted(row[3] for row in part) for part in (rows[:rows_of_text], rows[rows_of_text:])]
    assert numbers[0] == numbers[1] == list(range(rows_of_text))
    assert first != second
    assert [row[0] for row in some(stream(jsonl, seed=1), 20)] != first[:20]
    passes = [place.passes for _, place in islice(stream(jsonl).rows(), 2 * rows_of_text)]
    assert passes == [0] * rows_of_text + [1] * rows_of_text


def test_what_is_held_out_is_not_trained_on(jsonl):
    data = stream(jsonl, held_out=3)
    held_out = {tuple(item["input_ids"].tolist()) for item in data.held_out_rows()}
    rows = len(TokenBlocks.read(jsonl, character_tokenizer(), 16))
    trained = {row[0] for row in some(data, rows - 3)}
    assert len(held_out) == 3
    assert not held_out & trained
    assert len(trained) == rows - 3


# Its order


@pytest.fixture(params=["text", "jsonl", "parquet", "data set", "all"])
def sources(request, jsonl, folder, monkeypatch):
    (folder / "a.txt").write_text("\n".join(TEXTS))
    (folder / "long.txt").write_text("ein längerer Text\n" * 700)
    monkeypatch.setattr("hybrid.data.readers._PIECE", 1000)
    monkeypatch.setattr("hybrid.data.readers._ROWS", 7)
    if request.param in ("parquet", "data set", "all"):
        datasets = pytest.importorskip("datasets", reason="parquet needs the package datasets")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        (folder / "set").mkdir()
        rows = datasets.Dataset.from_dict({"text": TEXTS})
        rows.to_parquet(folder / "a.parquet")
        (folder / "set" / "train.jsonl").write_text((folder / "a.jsonl").read_text())
    names = {"text": ["a.txt", "long.txt"], "jsonl": jsonl, "parquet": ["a.parquet"], "data set": ["set"]}
    return sum(names.values(), []) if request.param == "all" else names[request.param]


def test_it_goes_on_from_anywhere(sources):
    """In the middle of a pass and at its end; a place is plain JSON."""
    number = 2 * len(TokenBlocks.read(sources, character_tokenizer(), 16)) + 30
    rows = some(stream(sources), number)
    for k in (*range(0, 60, 7), number // 2 - 16, number // 2 - 15, number - 20):
        place = StreamPlace(**json.loads(json.dumps(asdict(rows[k][2]))))
        assert some(stream(sources), 5, place) == rows[k + 1 : k + 6]


def test_workers_change_nothing(jsonl, monkeypatch):
    monkeypatch.setattr("hybrid.data.piece_tokens._CHUNK_PIECES", 4)
    rows = some(stream(jsonl), 200)
    assert some(stream(jsonl, workers=2), 200) == rows
    assert some(stream(jsonl, workers=1), 20, rows[99][2]) == rows[100:120]


def test_each_process_has_its_own_share(jsonl):
    """Two processes, or one with more forwards: the same items in a step."""

    def seen(rank, processes, batch_size, accumulate, steps=range(6), place=None):
        share = Share(rank, processes, batch_size, accumulate)
        return [
            [tuple(row.tolist()) for batch in step for row in batch.inputs["input_ids"]]
            for step, _ in batches(stream(jsonl), 0, share, steps, place)
        ]

    one = seen(0, 1, 8, 1)
    two = [seen(rank, 2, 2, 2) for rank in (0, 1)]
    for step in range(6):
        assert sorted(one[step]) == sorted(two[0][step] + two[1][step])
        assert not set(two[0][step]) & set(two[1][step])
    *_, (_, place) = batches(stream(jsonl), 0, Share(0, 2, 4, 1), range(3), None)
    assert seen(0, 1, 4, 2, range(3, 6), place) == one[3:]


def test_a_run_on_a_stream_resumes_exactly(jsonl, tmp_path):
    straight = phase_1()
    train(straight, stream(jsonl), settings_for(tmp_path / "a"))
    with pytest.raises(Stopped):
        train(phase_1(), stream(jsonl), settings_for(tmp_path / "b"), on_step=stop_after(13))
    resumed = phase_1()
    train(resumed, stream(jsonl, workers=1), settings_for(tmp_path / "b"), resume=True)
    assert_equal(resumed, straight)
    assert lines_of(tmp_path / "b") == lines_of(tmp_path / "a")
    (tmp_path / "a.jsonl").write_text('{"text": "another text"}\n' * 9)
    with pytest.raises(ValueError, match=r"expected data.sources.1.bytes \d+ as it began, got 225"):
        train(phase_1(), stream(jsonl), settings_for(tmp_path / "b"), resume=True)


def killed_in_step_15(words):
    """After backward and before the optimizer's step; in this process, which ends."""
    clip, steps = torch.nn.utils.clip_grad_norm_, iter(range(1, 99))

    def dies(*args, **kwargs):
        if next(steps) == 15:
            os.kill(os.getpid(), signal.SIGKILL)
        return clip(*args, **kwargs)

    torch.nn.utils.clip_grad_norm_ = dies
    main(words)


def test_a_run_killed_with_workers_goes_on_with_another_number(jsonl, folder, monkeypatch):
    """Its next batch is the one that it would have had: losses, block and held-out loss, bit for bit."""
    monkeypatch.setattr("hybrid.data.stream._SHUFFLED_TOKENS", 1)  # of the fewest rows, 16
    monkeypatch.setattr("hybrid.data.piece_tokens._CHUNK_PIECES", 4)
    base = save_base(folder / "base")

    def command(run, workers):
        words = ["train", "--base", base, "--data", *jsonl, "--output", folder / run, "--steps", 34]
        words += ["--batch-size", 6, "--sequence-length", 16, "--save-every", 12, "--log-every", 1]
        words += ["--learning-rate", 1e-2, "--keep-checkpoints", 9, "--data-workers", workers]
        return [str(word) for word in (*words, *options(FIELDS))]

    assert forked.run(lambda: killed_in_step_15(command("b", 2))) == -signal.SIGKILL
    checkpoint = folder / "b" / "checkpoint-000012"
    place = json.loads((checkpoint / "state.json").read_text())["place"]
    assert (place["passes"], place["row"] > 0, place["taken"] > 0) == (0, True, True), "in the middle"
    assert lines_of(folder / "b")[-1]["step"] == 14

    assert main([*command("b", 1), "--resume"]) == 0
    assert main(command("a", 0)) == 0
    assert lines_of(folder / "b") == lines_of(folder / "a")
    ours, others = (folder / run / "checkpoint-000034" for run in "ab")
    assert json.loads((ours / "state.json").read_text())["place"]["passes"] > 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (ours / name).read_bytes() == (others / name).read_bytes()


# Documents that stay apart


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_no_document_sees_another(family, jsonl):
    """Neither in the base nor in the TRM: what is before changes nothing, and alone it is the same."""
    row = next(row for row, _ in stream(jsonl, 40).rows() if 0 in row.positions[6:30])
    item = {name: tensor[None] for name, tensor in row.item(separate=True).items()}
    begin = 6 + list(row.positions[6:]).index(0)
    for model in (tiny.tiny_base(family), tiny.tiny_hybrid(family)):
        given = {name: item[name] for name in ("input_ids", "position_ids")}
        logits = model(**given, use_cache=False).logits
        changed = given["input_ids"].clone()
        changed[:, :begin] = (changed[:, :begin] + 1) % 90
        others = model(**given | {"input_ids": changed}, use_cache=False).logits
        assert torch.equal(logits[:, begin:], others[:, begin:])
        assert not torch.equal(logits[:, :begin], others[:, :begin])
        end = next((t for t in range(begin + 1, 40) if row.positions[t] == 0), 40)
        alone = model(input_ids=given["input_ids"][:, begin:end], use_cache=False).logits
        torch.testing.assert_close(logits[:, begin:end], alone, rtol=1e-4, atol=1e-5)


def test_a_base_that_cannot_keep_them_apart_is_refused(jsonl, tmp_path):
    for family in ("llama", "qwen3", "mistral", "gemma2", "gpt2", "gpt_neox", "phi"):
        check_separate(tiny.tiny_hybrid(family))
    for family in ("opt", "bloom"):  # falcon keeps them apart in newer transformers
        with pytest.raises(ValueError, match=r"documents can be separate, got \w+ForCausalLM with attention"):
            check_separate(tiny.tiny_base(family))


# Chats


TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<end>{% endfor %}"
CHAT = [{"role": "user", "content": "1 and one"}, {"role": "assistant", "content": "is 2"}]


def test_a_chat_goes_through_the_template(folder):
    (folder / "chat.jsonl").write_text(json.dumps({"messages": CHAT, "text": "no"}) + "\n")
    tokenizer = character_tokenizer()
    sources = Sources(["chat.jsonl"], "messages")
    with pytest.raises(
        ValueError, match="chat.jsonl, line 1: expected .* a chat template .* got one without"
    ):
        next(TokenStream(sources, tokenizer, 8).rows())
    tokenizer.chat_template = TEMPLATE
    tokens = next(TokenStream(sources, tokenizer, 32).rows())[0].tokens
    assert "".join(CHARACTERS[t] for t in tokens) == "user: 1 and one<end>assistant: is 2<end>"
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"template takes, got one it refuses \(roles must alternate\)"):
        next(TokenStream(sources, tokenizer, 8, workers=1).rows())


# What cannot be used


def test_a_stream_that_fills_no_row(folder):
    (folder / "a.txt").write_text("abc")
    with pytest.raises(ValueError, match="at least one sequence of 16 tokens to train on in a.txt, got none"):
        next(stream(["a.txt"]).rows())
    with pytest.raises(ValueError, match="at least two sequences of 16 tokens in a.txt, one to hold out"):
        stream(["a.txt"], held_out=2).held_out_rows()


def test_its_workers_end_with_it_although_an_error_is_kept(jsonl, folder):
    """An error's traceback keeps all that it went through, until Python collects cycles."""
    others = set(multiprocessing.active_children())

    def workers():
        return len(set(multiprocessing.active_children()) - others)

    with pytest.raises(ValueError, match="vocabulary") as kept:
        next(stream(jsonl, vocabulary=50, workers=1).rows())
    assert workers() == 0
    with pytest.raises(ValueError, match="vocabulary") as kept_as_well:
        stream(jsonl, vocabulary=50, workers=1).count_rows()
    assert workers() == 0
    (folder / "broken.jsonl").write_text('{"text": "good"}\nnone\n')
    with pytest.raises(ValueError, match="broken.jsonl") as kept_of_reading:
        next(stream(["broken.jsonl"], workers=1).rows())
    assert workers() == 0
    assert kept.tb is not None and kept_as_well.tb is not None and kept_of_reading.tb is not None

    rows = stream(jsonl, workers=1).rows()
    next(rows)
    assert workers() == 1
    rows.close()
    assert workers() == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_token_beyond_the_vocabulary(jsonl, workers):
    with pytest.raises(ValueError, match="a.jsonl, line 1: expected .* vocabulary of 50 tokens, got token"):
        next(stream(jsonl, vocabulary=50, workers=workers).rows())


def test_an_error_in_the_middle_names_its_place(jsonl, folder):
    with open(folder / "a.jsonl", "ab") as file:
        file.write(b'{"text": "good"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="expected UTF-8 in a.jsonl, got byte 0xff at byte"):
        list(documents(jsonl))


# Any size


ENDLESS = """
import resource, sys, time
from itertools import islice
import numpy as np
from hybrid.data import sources, stream as data
from hybrid.training.batches import Share, batches

class Bytes:  # a tokenizer that is as fast as text comes
    eos_token_id = 0
    def __call__(self, texts, **_):
        return {"input_ids": [np.frombuffer(t.encode(), np.uint8) for t in texts]}

def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

name, T = sys.argv[1], 1024
stream = data.TokenStream(sources.Sources([name]), Bytes(), T, shuffled_rows=256)
share = Share(rank=0, processes=64, batch_size=1, accumulate=1)
feed = batches(stream, 0, share, range(10**9), None)
next(feed)
limit = memory() + 60 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
steps = int(sys.argv[2]) // T // 64
for _, place in islice(feed, steps):
    pass
print(place["row"] * T)
"""


def test_memory_does_not_grow_with_the_text(folder):
    """A text of 100 GB that takes no room on the disk; 80 MB of it under a limit of 60 MiB more."""
    with open(folder / "huge.txt", "wb") as file:
        file.write(b"it looks like text\n" * 5000)  # then all are zero bytes
        file.truncate(100 * 10**9)
    ended = subprocess.run(
        [sys.executable, "-c", ENDLESS, str(folder / "huge.txt"), str(80 * 10**6)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 75 * 10**6


def test_going_on_far_inside_reads_nothing_before(folder, monkeypatch):
    monkeypatch.setattr("hybrid.data.readers._PIECE", 100)
    with open(folder / "huge.txt", "wb") as file:
        file.write(b"it looks like text\n" * 5000)
        file.truncate(100 * 10**9)
        file.seek(99 * 10**9)
        file.write(b"here it is: some text, far inside\n")
    place = StreamPlace(0, 10**6, [0, 99 * 10**9], 4)
    row = next(stream(["huge.txt"], shuffled_rows=1).rows(place))[0]
    assert "".join(CHARACTERS[t] for t in row.tokens) == " it is: some tex"
