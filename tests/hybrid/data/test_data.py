"""Text as blocks of tokens: what may be named, how it is cut, and what is refused."""

import json
import sys

import pytest
import torch

from hybrid.data.blocks import TokenBlocks
from hybrid.data.sources import documents
from tests.support.tiny_text import CHARACTERS, character_tokenizer


def token(character):
    return CHARACTERS.index(character)


def text_of(blocks):
    return "".join(CHARACTERS[i] for k in range(len(blocks)) for i in blocks[k]["input_ids"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_blocks_are_what_was_written(folder):
    (folder / "a.txt").write_text("one two three")
    blocks = TokenBlocks.read(["a.txt"], character_tokenizer(), 4)
    assert len(blocks) == 3  # 13 characters and an end; the last two are left out
    assert text_of(blocks) == "one two thre"
    item = blocks[1]
    assert item["input_ids"].tolist() == [token(c) for c in "two "]
    assert torch.equal(item["labels"], item["input_ids"])
    assert item["input_ids"].dtype == torch.int64
    assert blocks.largest_token() == token("w")


def test_each_document_is_closed_where_the_tokenizer_has_an_end(folder):
    (folder / "a.jsonl").write_text('{"text": "ab"}\n\n{"text": "c"}\n')
    assert text_of(TokenBlocks.read(["a.jsonl"], character_tokenizer(), 5)) == "ab<end>c<end>"
    assert text_of(TokenBlocks.read(["a.jsonl"], character_tokenizer(with_end=False), 3)) == "abc"


def test_files_come_in_the_order_they_were_named_and_a_globs_by_name(folder):
    for name in ("b.txt", "a.txt", "c.txt"):
        (folder / name).write_text(name[0])
    (folder / "sub.txt").mkdir()
    assert list(documents(["c.txt", "[ab].txt"])) == ["c", "a", "b"]
    assert list(documents(["*.txt"])) == ["a", "b", "c"]
    (folder / "sub.txt" / "d.txt").write_text("d")
    assert list(documents(["**/*.txt"])) == ["a", "b", "c", "d"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(folder):
    (folder / "a[1].txt").write_text("here")
    assert list(documents(["a[1].txt"])) == ["here"]


def test_another_field(folder):
    (folder / "a.jsonl").write_text(json.dumps({"text": "no", "story": "snow ☃"}))
    assert list(documents(["a.jsonl"], field="story")) == ["snow ☃"]


def test_a_line_ends_where_json_says(folder):
    text = "one\u2028still one"
    (folder / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(documents(["a.jsonl"])) == [text]


def test_the_last_blocks_are_held_out():
    blocks = TokenBlocks(torch.arange(26), 5)
    train, held_out = blocks.split(2)
    assert [item["input_ids"].tolist()[0] for item in (train[0], train[2])] == [0, 10]
    assert (len(train), len(held_out)) == (3, 2)
    assert held_out[0]["input_ids"].tolist() == [15, 16, 17, 18, 19]
    assert held_out[1]["input_ids"].tolist() == [20, 21, 22, 23, 24]


@pytest.mark.parametrize("count", [0, 5, 6])
def test_something_must_be_left_of_both(count):
    with pytest.raises(
        ValueError, match=f"expected to hold out 1..4 of the 5 sequences of data, got {count}"
    ):
        TokenBlocks(torch.arange(26), 5).split(count)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "expected text in empty.txt, got an empty file"),
        ("empty.jsonl", b"\n \n", "expected text in empty.jsonl, got an empty file"),
        ("bytes.txt", b"good \xc3\xa9 \xff bad", "expected UTF-8 in bytes.txt, got byte 0xff at byte 8"),
        ("cut.txt", b"good \xc3", "expected UTF-8 in cut.txt, got byte 0xc3 at byte 5"),
        (
            "short.txt",
            b"abc",
            r"expected at least one sequence of 8 tokens in short.txt, got 4 tokens",
        ),
        (
            "field.jsonl",
            b'{"text": "x"}\n{"body": 1, "id": 2}\n',
            "field.jsonl, line 2: expected text or a chat in the field 'text', got body, id",
        ),
        (
            "number.jsonl",
            b'{"text": 3}',
            "number.jsonl, line 1: expected text or a chat in the field 'text', got 3",
        ),
        ("list.jsonl", b"[1]", "list.jsonl, line 1: expected text or a chat in the field 'text', got list"),
        ("broken.jsonl", b'{"text": "x"}\n{"te', "broken.jsonl, line 2: expected a JSON object, got none"),
    ],
)
def test_a_file_that_cannot_be_used(name, content, message, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TokenBlocks.read([name], character_tokenizer(), 8)


@pytest.mark.parametrize("source", ["gone.txt", "sub/gone.jsonl", "./gone", "/nowhere/gone"])
def test_a_file_that_is_not_there(source, folder):
    with pytest.raises(ValueError, match=f"expected a file {source}, got no such file"):
        list(documents([source]))


def test_a_glob_that_matches_nothing(folder):
    with pytest.raises(ValueError, match=r"expected files that match \*.txt, got none"):
        list(documents(["*.txt"]))


def test_a_sequence_predicts_something():
    with pytest.raises(ValueError, match="expected sequence_length of at least 2 tokens, got 1"):
        TokenBlocks(torch.arange(26), 1)


# Data sets


@pytest.fixture
def no_network(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="data sets need the package datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_data_set(folder, no_network, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    (folder / "stories").mkdir()
    (folder / "stories" / "train.jsonl").write_text('{"text": "ab"}\n{"text": "cd"}\n')
    (folder / "stories" / "test.jsonl").write_text('{"text": "ef"}\n')
    assert list(documents(["stories"])) == ["ab", "cd"]
    assert list(documents(["stories::test"])) == ["ef"]
    with pytest.raises(
        ValueError, match="stories, row 0: expected text or a chat in the field 'body', got text"
    ):
        list(documents(["stories"], field="body"))


def test_a_data_set_that_cannot_be_loaded(folder, no_network):
    with pytest.raises(
        ValueError, match="expected a file or a data set, got nobody/nothing, which is no file"
    ):
        list(documents(["nobody/nothing"]))


def test_a_data_set_needs_a_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'trm-hybrid\[data\]'"):
        list(documents(["nobody/nothing"]))
