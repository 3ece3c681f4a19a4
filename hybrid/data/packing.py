"""From the tokens of documents to rows of one length; a row that brings its own labels stays what it is.

Documents are put in a row and cut into rows of one length. Each begins and ends as the tokenizer has it (BOS,
where it puts one before a text), and is closed by its EOS where it has one; a chat is what its template
renders. A row says where its documents begin: its position ids start again at 0 there, which transformers and
masks.py read as sequences that must not attend to each other, and no document's first token is predicted.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hybrid.data.collate import IGNORED
from hybrid.data.labelled import Example
from hybrid.data.piece_tokens import PieceTokens


class Row(NamedTuple):
    """T tokens, and the position of each in its document, or in as much of it as the row has.

    number   which row of the text this is, in its order
    """

    tokens: np.ndarray
    positions: np.ndarray
    number: int

    def item(self, separate: bool) -> dict[str, Tensor]:
        """What a model is given; `separate`: documents do not look at each other."""
        tokens = torch.from_numpy(self.tokens.astype(np.int64))
        if not separate:
            return {"input_ids": tokens, "labels": tokens}
        positions = torch.from_numpy(self.positions.astype(np.int64))
        labels = tokens.masked_fill(positions == 0, IGNORED)
        return {"input_ids": tokens, "labels": labels, "position_ids": positions}


def pack(
    pieces: Iterator[PieceTokens], length: int, used: int = 0, keep_rest: bool = False, first: int = 0
) -> Iterator[tuple[Row, tuple[list[Any], int]]]:
    """(a row, (the piece that the next one begins in, the tokens of it that are used up)).

    used        tokens of the first piece to pass over
    keep_rest   the last tokens, which fill no row, come as a shorter one
    first       number of the first row
    """
    tokens, positions = np.empty(length, np.int32), np.empty(length, np.int32)
    filled, position, number = 0, 0, first
    place: list[Any] = []
    for ids, ends, place in pieces:
        while used < len(ids):
            count = min(length - filled, len(ids) - used)
            tokens[filled : filled + count] = ids[used : used + count]
            positions[filled : filled + count] = np.arange(position, position + count)
            filled, used, position = filled + count, used + count, position + count
            if filled == length:
                yield Row(tokens.copy(), positions.copy(), number), (place, used)
                number += 1
                filled = position = 0  # what goes on in the next row sees nothing of this one
        used = 0
        if ends:
            position = 0
    if keep_rest and filled:
        yield Row(tokens[:filled].copy(), positions[:filled].copy(), number), (place, used)


def examples(
    pieces: Iterator[PieceTokens], length: int, used: int = 0, first: int = 0
) -> Iterator[tuple[Example, tuple[list[Any], int]]]:
    """What pack gives, of rows with labels: a row a piece; a chat that is too long for one makes several."""
    for both, _, place in pieces:
        while used < both.shape[1]:
            tokens, labels = both[:, used : used + length]
            used += len(tokens)
            if (labels[1:] != IGNORED).any():
                yield Example(tokens, labels, first), (place, used)
                first += 1
        used = 0


def joined(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, np.int32), *arrays]))


def check_length(sequence_length: int) -> None:
    if sequence_length < 2:
        raise ValueError(
            f"TokenBlocks: expected sequence_length of at least 2 tokens, got {sequence_length}."
        )
