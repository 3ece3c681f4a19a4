"""Texts with questions inside: after some of their tokens an answer of one token is asked for."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

NOTHING = -100  # is asked for


@dataclass(frozen=True)
class AskedText:
    """Pieces, one after the other; what each is followed by, if that is asked for.

    pieces    ("The ball is under cup A. Swap these cups:", " left", ..., ". Now it is under cup")
    answers   (None, " B", ..., " C"): of one token each
    """

    pieces: tuple[str, ...]
    answers: tuple[str | None, ...]

    @property
    def prompt(self) -> str:
        """All of it; what comes next is the last answer."""
        return "".join(self.pieces)


@dataclass(frozen=True)
class Questions:
    """Texts as tokens, padded at the right.

    ids    [N, T] int64
    asked  [N, T] int64: the token that is the answer after this one, or NOTHING
    """

    ids: Tensor
    asked: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def lengths(self) -> Tensor:
        """[N] int64: tokens of each text, up to the last where something is asked."""
        places = torch.arange(1, self.ids.shape[1] + 1)
        return torch.where(self.asked != NOTHING, places, 0).amax(1)

    def closing(self) -> Tensor:
        """[N, T] bool: the last place of each text where something is asked."""
        is_asked = self.asked != NOTHING
        return is_asked & (is_asked.cumsum(1) == is_asked.sum(1, keepdim=True))


def encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[AskedText]) -> Questions:
    """Errors: ValueError for an answer of several tokens, and where a text's tokens cross its pieces."""
    ids, asked = [], []
    for text in texts:
        row: list[int] = []
        answers: list[int] = []
        for piece, answer in zip(text.pieces, text.answers, strict=True):
            tokens = tokenizer(piece, add_special_tokens=False).input_ids
            row += tokens
            answers += [NOTHING] * len(tokens)
            if answer is not None:
                answers[-1] = _one_token(tokenizer, answer)
        if tokenizer(text.prompt, add_special_tokens=False).input_ids != row:
            raise ValueError(
                f"encode: expected pieces whose tokens are those of the text, got {text.prompt!r}."
            )
        ids.append(torch.tensor(row))
        asked.append(torch.tensor(answers))
    return Questions(
        pad_sequence(ids, batch_first=True), pad_sequence(asked, batch_first=True, padding_value=NOTHING)
    )


def _one_token(tokenizer: PreTrainedTokenizerBase, answer: str) -> int:
    tokens: list[int] = tokenizer(answer, add_special_tokens=False).input_ids
    if len(tokens) != 1:
        raise ValueError(f"encode: expected an answer of one token, got {answer!r}, which is {len(tokens)}.")
    return tokens[0]
