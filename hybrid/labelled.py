"""Rows that bring their own labels: what a row of a file or a data set says, as tokens and labels.

    {"input_ids": [4, 9, 9, 7], "labels": [-100, -100, 5, 7]}   -100: not counted
    {"prompt": "2 + 2 =", "completion": " 4"}                   the completion counts, and EOS after it
    {"text": ["2b", "a", "c"], "answers": ["1", null, "2"]}     after each part an answer, or none

A label stands beside its own token, and a model shifts the labels: what is asked for after token t stands
beside token t + 1. An answer inside of the text has one token, which the model does not read; the last answer
has any number of tokens, follows the text and is read like a completion. Nothing closes it.

A text is tokenized as a whole, as it will be when the model is used, so a part has to end where a token does.
A row is one example: it is neither cut nor packed with others.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hybrid.collate import IGNORED


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


LabelledRow = LabelledTokens | LabelledText


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


def labelled_row(row: dict[str, Any], field: str) -> LabelledRow | None:
    """What `row` says if it has labels; None for one that has a text or a chat in `field`, or nothing.

    Errors: ValueError, without the place, for labels that do not fit.
    """
    if "input_ids" in row and "labels" in row:
        ids, labels = row["input_ids"], row["labels"]
        if not (_are(int, ids) and _are(int, labels) and len(ids) == len(labels)):
            raise ValueError("expected lists of as many whole numbers in input_ids and labels, got others.")
        return LabelledTokens(ids, labels)
    if "answers" in row and _are(str, row.get(field)):
        parts, answers = row[field], row["answers"]
        fits = _are(str | None, answers) and len(answers) == len(parts)
        if not fits or "" in [*parts, *answers]:
            raise ValueError(
                f"expected as many answers (a text or null) as parts of {field!r}, none of them empty, "
                f"got {len(parts)} parts and {answers!r}."
            )
        return LabelledText(parts, answers, closes=False)
    if field not in row and "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if not (_are(str, [prompt, completion]) and prompt):
            raise ValueError(
                "expected a text in prompt, not an empty one, and one in completion, "
                f"got {prompt!r} and {completion!r}."
            )
        return LabelledText([prompt], [completion], closes=True)
    return None


def encode(
    rows: list[LabelledRow], tokenizer: PreTrainedTokenizerBase, longest: int
) -> list[np.ndarray | str]:
    """Of each row its tokens and labels [2, T] int32, or what is wrong with it.

    longest   the most tokens that a row may have
    """
    texts = [row for row in rows if isinstance(row, LabelledText)]
    found = iter(_encode_texts(texts, tokenizer) if texts else ())
    both = [next(found) if isinstance(row, LabelledText) else _checked(row) for row in rows]
    return [tokens if isinstance(tokens, str) else _counted(tokens, longest) for tokens in both]


def _encode_texts(texts: list[LabelledText], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray | str]:
    inner = sorted({answer for text in texts for answer in text.answers[:-1] if answer is not None})
    ids_of = dict(zip(inner, _ids(tokenizer, inner)["input_ids"], strict=True)) if inner else {}
    whole = _ids(tokenizer, ["".join(t.parts) + (t.answers[-1] or "") for t in texts], with_offsets=True)
    end = tokenizer.eos_token_id
    encoded = zip(texts, whole["input_ids"], whole["offset_mapping"], strict=True)
    return [_encode_text(text, ids, offsets, ids_of, end) for text, ids, offsets in encoded]


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
    if text.closes and end is not None:
        ids, labels = [*ids, end], [*labels, end]
    return np.array([ids, labels], np.int32)


def _checked(row: LabelledTokens) -> np.ndarray | str:
    both = np.array([row.input_ids, row.labels], np.int64).reshape(2, -1)
    tokens, labels = both
    wrong = [*tokens[tokens < 0], *labels[(labels < 0) & (labels != IGNORED)], *both[both >= 2**31]]
    if wrong:
        return f"expected tokens from 0 on and labels like these or {IGNORED}, got {wrong[0]}."
    return both.astype(np.int32)


def _counted(both: np.ndarray, longest: int) -> np.ndarray | str:
    if both.shape[1] > longest:
        return f"expected at most {longest} tokens (the sequence length), got {both.shape[1]}."
    if (both[1, 1:] == IGNORED).all():
        return "expected a label that counts beside a token after the first, got none."
    return both


def _are(kind: Any, values: Any) -> bool:
    is_list = isinstance(values, list) and len(values) > 0
    return is_list and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
