"""Rows that bring their own labels: what a row of a file or a data set says, as tokens and labels.

    {"input_ids": [4, 9, 9, 7], "labels": [-100, -100, 5, 7]}   -100: not counted
    {"prompt": "2 + 2 =", "completion": " 4"}                   the completion counts, and EOS after it
    {"text": ["2b", "a", "c"], "answers": ["1", null, "2"]}     after each part an answer, or none
    a chat, for a loss on completions                           what the assistant says counts; see chats.py

A label stands beside its own token, and a model shifts the labels: what is asked for after token t stands
beside token t + 1. An answer inside of the text has one token, which the model does not read; the last answer
has any number of tokens, follows the text and is read like a completion. Nothing closes it.

A text is tokenized as a whole, as it will be when the model is used, so a part has to end where a token does;
what the tokenizer puts before a text stands before it. A row is one example, which is not packed with others.
One that is too long is an error, but for a chat: it is cut, and what has no label is left out.

An attention_mask beside input_ids says with 0 what is padding: those tokens and their labels are dropped.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hybrid.data.chats import Chat, render_marked
from hybrid.data.collate import IGNORED
from hybrid.data.special_tokens import Habit


@dataclass(frozen=True)
class LabelledTokens:
    """Tokens and the label beside each."""

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class LabelledText:
    """Parts of a text, none empty, and the answer after each; `closes`: EOS follows the last answer."""

    parts: list[str]
    answers: list[str | None]
    closes: bool

    def __len__(self) -> int:
        return sum(map(len, self.parts))


@dataclass(frozen=True)
class LabelledChat:
    """A chat of which what the assistant says counts."""

    chat: Chat

    def __len__(self) -> int:
        return len(self.chat)


LabelledRow = LabelledTokens | LabelledText | LabelledChat

_LONG = 2**20  # characters of a text that may be far too long
_TOO_LARGE = 2**31  # for a token's id


class Example(NamedTuple):
    """Tokens [T] int32 and the label beside each, -100 for none; `number`: which row of all this is."""

    tokens: np.ndarray
    labels: np.ndarray
    number: int = 0

    def item(self, separate: bool = True) -> dict[str, Tensor]:
        """What a model is given; an example is one sequence, so that nothing in it is separate."""
        tokens, labels = (torch.from_numpy(t.astype(np.int64)) for t in self[:2])
        return {"input_ids": tokens, "labels": labels}


class Examples(Dataset):
    """Examples, each an item of its own length: {"input_ids", "labels"}, [T] int64."""

    def __init__(self, rows: list[Example], name: str) -> None:
        self._rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._rows[index].item()

    def largest_token(self) -> int:
        """The largest id, to be compared with a model's vocabulary."""
        return max(int(t.max()) for row in self._rows for t in row[:2])


def labelled_row(row: dict[str, Any], field: str) -> tuple[LabelledRow, set[str]] | None:
    """(what `row` says, the columns that say it) if it has labels; else None, for a text or a chat.

    Errors: ValueError, without the place, for labels that do not fit.
    """
    if "input_ids" in row and "labels" in row:
        return _tokens_of(row), {"input_ids", "labels", "attention_mask"}
    if "answers" in row and _are(str, row.get(field)):
        parts, answers = row[field], row["answers"]
        fits = _are(str | None, answers) and len(answers) == len(parts)
        if not fits or "" in [*parts, *answers]:
            raise ValueError(
                f"expected as many answers (a text or null) as parts of {field!r}, none of them empty, "
                f"got {len(parts)} parts and {answers!r:.80}."
            )
        return LabelledText(parts, answers, closes=False), {field, "answers"}
    if field not in row and "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if not (_are(str, [prompt, completion]) and prompt):
            raise ValueError(
                "expected a text in prompt, not an empty one, and one in completion, "
                f"got {prompt!r:.80} and {completion!r:.80}."
            )
        return LabelledText([prompt], [completion], closes=True), {"prompt", "completion"}
    return None


def _tokens_of(row: dict[str, Any]) -> LabelledTokens:
    ids, labels, mask = row["input_ids"], row["labels"], row.get("attention_mask")
    if not (_are(int, ids) and _are(int, labels) and len(ids) == len(labels)):
        raise ValueError("expected lists of as many whole numbers in input_ids and labels, got others.")
    if mask is None:
        return LabelledTokens(ids, labels)
    real = [index for index, value in enumerate(mask) if value == 1] if isinstance(mask, list) else []
    is_mask = bool(real) and len(mask) == len(ids) and all(value in (0, 1) for value in mask)
    if not is_mask or real[-1] - real[0] + 1 != len(real):
        raise ValueError(
            f"expected an attention_mask of {len(ids)} numbers, 0 for padding at the ends and 1 between, "
            f"got {mask!r:.80}."
        )
    part = slice(real[0], real[-1] + 1)
    return LabelledTokens(ids[part], labels[part])


def encode(
    rows: list[LabelledRow], tokenizer: PreTrainedTokenizerBase, habit: Habit, longest: int
) -> list[np.ndarray | str]:
    """Of each row its tokens and labels [2, T] int32, or what is wrong with it.

    habit     what the tokenizer puts before and after a text
    longest   the most tokens that a row may have, if it is no chat
    """
    found = _encode_texts([row for row in rows if isinstance(row, LabelledText)], tokenizer, habit, longest)
    both = []
    for row in rows:
        if isinstance(row, LabelledChat):
            both.append(_encode_chat(row, tokenizer))
            continue
        tokens = next(found) if isinstance(row, LabelledText) else _checked(row, longest)
        both.append(tokens if isinstance(tokens, str) else _counted(tokens, longest))
    return both


def _encode_chat(row: LabelledChat, tokenizer: PreTrainedTokenizerBase) -> np.ndarray | str:
    try:
        ids, counts = render_marked(row.chat, tokenizer)
    except ValueError as error:
        return str(error)
    return np.array([ids, np.where(counts, ids, IGNORED)], np.int32)


def _encode_texts(
    texts: list[LabelledText], tokenizer: PreTrainedTokenizerBase, habit: Habit, longest: int
) -> Iterator[np.ndarray | str]:
    inner = sorted({answer for text in texts for answer in text.answers[:-1] if answer is not None})
    ids_of = dict(zip(inner, _ids(tokenizer, inner)["input_ids"], strict=True)) if inner else {}
    whole = ["".join(t.parts) + (t.answers[-1] or "") for t in texts]
    too_long = [_check_long(text, tokenizer, longest) for text in whole]
    short = [text for text, wrong in zip(whole, too_long, strict=True) if wrong is None]
    found = _ids(tokenizer, short, with_offsets=True) if short else {"input_ids": (), "offset_mapping": ()}
    encoded = zip(found["input_ids"], found["offset_mapping"], strict=True)
    for text, wrong in zip(texts, too_long, strict=True):
        yield (
            _encode_text(text, *next(encoded), ids_of, tokenizer.eos_token_id, habit)
            if wrong is None
            else wrong
        )


def _check_long(text: str, tokenizer: PreTrainedTokenizerBase, longest: int) -> str | None:
    """What is wrong with a text whose beginning has too many tokens already; the rest is not tokenized."""
    if len(text) <= _LONG or len(_ids(tokenizer, [text[:_LONG]])["input_ids"][0]) <= longest:
        return None
    return f"expected at most {longest} tokens (the sequence length), got a text of {len(text)} characters."


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], with_offsets: bool = False) -> Any:
    try:
        return tokenizer(texts, add_special_tokens=False, return_offsets_mapping=with_offsets, verbose=False)
    except NotImplementedError:
        raise ValueError(
            f"data: expected a tokenizer that knows where its tokens are in a text, got "
            f"{type(tokenizer).__name__}; rows of input_ids and labels need none."
        ) from None


def _encode_text(
    text: LabelledText,
    ids: list[int],
    offsets: list[tuple[int, int]],
    ids_of: dict[str, list[int]],
    end: int | None,
    habit: Habit,
) -> np.ndarray | str:
    labels = [IGNORED] * len(ids)
    ends = [stop for _, stop in offsets]
    characters = token = 0
    for number, (part, answer) in enumerate(zip(text.parts, text.answers, strict=True), start=1):
        characters += len(part)
        while token < len(ends) and ends[token] <= characters:
            token += 1  # the first token after this part
        if token == 0 or ends[token - 1] != characters:
            return (
                f"expected a token to end where part {number} of the text does, after {part[-20:]!r}, got "
                "one that goes on: a space, say, belongs to the beginning of what follows."
            )
        if answer is None:
            continue
        if number == len(text.parts):
            labels[token:] = ids[token:]
        elif len(ids_of[answer]) != 1:
            return (
                f"expected an answer inside of the text to have one token, got {answer!r} of "
                f"{len(ids_of[answer])}."
            )
        else:
            labels[token] = ids_of[answer][0]
    ids, labels = [*habit.before, *ids], [IGNORED] * len(habit.before) + labels
    closing = habit.closing(end) if text.closes else []
    return np.array([[*ids, *closing], [*labels, *closing]], np.int32)


def _checked(row: LabelledTokens, longest: int) -> np.ndarray | str:
    if len(row) > longest:
        return _too_long(len(row), longest)
    wrong = [id for id in row.input_ids if not 0 <= id < _TOO_LARGE]
    wrong += [label for label in row.labels if not (0 <= label < _TOO_LARGE or label == IGNORED)]
    if wrong:
        return f"expected tokens from 0 on and labels like these or {IGNORED}, got {str(wrong[0])[:40]}."
    return np.array([row.input_ids, row.labels], np.int32)


def _counted(both: np.ndarray, longest: int) -> np.ndarray | str:
    if both.shape[1] > longest:
        return _too_long(both.shape[1], longest)
    if (both[1, 1:] == IGNORED).all():
        return "expected a label that counts beside a token after the first, got none."
    return both


def _too_long(tokens: int, longest: int) -> str:
    return f"expected at most {longest} tokens (the sequence length), got {tokens}."


def _are(kind: Any, values: Any) -> bool:
    is_list = isinstance(values, list) and len(values) > 0
    return is_list and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
