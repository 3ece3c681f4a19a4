"""BOS and EOS: training, measuring and generating agree with the tokenizer's own habit."""

import json

import pytest
import torch
from tokenizers import processors

from hybrid.data.blocks import TokenBlocks, read_rows
from hybrid.data.special_tokens import habit_of, prompt_tokens
from hybrid.training.evaluate import text_loss
from tests.support.tiny_text import CHARACTERS, character_tokenizer, tiny_base

BOS, EOS = CHARACTERS.index("~"), CHARACTERS.index("<end>")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tokenizer_with(template):
    tokenizer = character_tokenizer()
    tokens = [("~", BOS), ("<end>", EOS)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=tokens
    )
    return tokenizer


def ids_of(text):
    return [CHARACTERS.index(c) for c in text]


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [("$A", [], []), ("~ $A", [BOS], []), ("~ $A <end>", [BOS], [EOS]), ("$A <end>", [], [EOS])],
)
def test_a_document_begins_and_ends_as_the_tokenizer_has_it(template, before, after, folder):
    tokenizer = tokenizer_with(template)
    assert habit_of(tokenizer) == (before, after)
    (folder / "a.jsonl").write_text('{"text": "ab"}\n{"text": "c"}\n')
    blocks = TokenBlocks.read(["a.jsonl"], tokenizer, 3)
    ids = [*before, *ids_of("ab"), EOS, *before, *ids_of("c"), EOS]
    assert [i for k in range(len(blocks)) for i in blocks[k]["input_ids"].tolist()] == ids[
        : len(ids) // 3 * 3
    ]
    assert prompt_tokens("ab", tokenizer)["input_ids"].tolist() == [[*before, *ids_of("ab")]]
    (folder / "a.jsonl").write_text(
        '{"prompt": "ab", "completion": "c"}\n{"text": ["ab"], "answers": ["c"]}\n'
    )
    first, second = read_rows(["a.jsonl"], tokenizer, 9)
    assert first["input_ids"].tolist() == [*before, *ids_of("abc"), EOS]
    assert first["labels"].tolist() == [-100] * (len(before) + 2) + [*ids_of("c"), EOS]
    assert second["input_ids"].tolist() == [*before, *ids_of("abc")]


def test_a_text_in_pieces_has_one_beginning(folder, monkeypatch):
    monkeypatch.setattr("hybrid.data.readers._PIECE", 10)
    (folder / "a.txt").write_text("some text\n" * 5)
    blocks = TokenBlocks.read(["a.txt"], tokenizer_with("~ $A"), 52)
    assert blocks[0]["input_ids"].tolist() == [BOS, *ids_of("some text\n" * 5), EOS]


@pytest.mark.parametrize("prompt", ["", "half \ud83d"])
def test_a_prompt_that_is_none(prompt):
    with pytest.raises(ValueError, match="expected --prompt of at least one token|half of a surrogate pair"):
        prompt_tokens(prompt, tokenizer_with("$A <end>"))


def test_a_padded_row_is_measured_without_its_padding(folder):
    """On either side, and with whatever stands in it; as the base does with the mask."""
    base = tiny_base()
    ids = torch.tensor([ids_of("12 and one is 13")])
    wanted = base(input_ids=ids, labels=ids).loss.item()
    for before, after in ((0, 0), (5, 0), (0, 3), (4, 2)):
        mask = [0] * before + [1] * ids.shape[1] + [0] * after
        padded = [7] * before + ids[0].tolist() + [7] * after
        row = {"input_ids": padded, "labels": padded, "attention_mask": mask}
        (folder / "a.jsonl").write_text(json.dumps(row))
        loss = text_loss(base, read_rows(["a.jsonl"], character_tokenizer(), 32), 2)
        assert loss.per_token == pytest.approx(wanted, rel=1e-5)
    for wrong in ([1, 0] * 8, [0] * 16, [1] * 15, [1] * 15 + [2], 1):
        (folder / "a.jsonl").write_text(
            json.dumps(row | {"input_ids": [1] * 16, "labels": [1] * 16, "attention_mask": wrong})
        )
        with pytest.raises(
            ValueError, match="line 1: expected an attention_mask of 16 numbers, 0 for padding"
        ):
            read_rows(["a.jsonl"], character_tokenizer(), 32)


def test_a_mask_of_an_items_own_is_kept():
    from hybrid.data.collate import collate

    item = {
        "input_ids": torch.arange(3),
        "labels": torch.arange(3),
        "attention_mask": torch.tensor([0, 1, 1]),
    }
    longer = {"input_ids": torch.arange(4), "labels": torch.arange(4)}
    assert collate([item, longer])["attention_mask"].tolist() == [[0, 1, 1, 0], [1, 1, 1, 1]]
