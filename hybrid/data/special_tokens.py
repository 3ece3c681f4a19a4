"""What a tokenizer puts before and after a text by its own habit: BOS, EOS, or nothing."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hybrid.data.formats import check_unicode

_TRIED = ("a", "0", "the", ".", "あ")  # one of them every tokenizer knows


class Habit(NamedTuple):
    """Tokens before a text and after it."""

    before: list[int]
    after: list[int]

    def closing(self, end: int | None) -> list[int]:
        """What closes a document: the habit's tokens, and `end`, where there is one, once."""
        return self.after if end is None or end in self.after else [*self.after, end]


def habit_of(tokenizer: PreTrainedTokenizerBase) -> Habit:
    """The habit of `tokenizer`, as it answers to a plain call."""
    for text in _TRIED:
        bare = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if not bare:
            continue
        whole = list(tokenizer(text, verbose=False)["input_ids"])
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return Habit(whole[:start], whole[start + len(bare) :])
    return Habit([], [])


def prompt_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """{"input_ids", "attention_mask"} [1, T] int64 of a text to be continued: without what closes a text.

    Errors: ValueError for a text without a token, or which is none.
    """
    check_unicode(text)
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    after = habit_of(tokenizer).after
    if after and ids[-len(after) :] == after:
        del ids[-len(after) :]
    if not ids:
        raise ValueError("generate: expected --prompt of at least one token, got none.")
    tokens = torch.tensor([ids])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
