"""TokenStream: rows to train on, read, tokenized and shuffled while they are needed, of text of any size."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from hybrid.data.blocks import TokenBlocks
from hybrid.data.blocks import read_rows as read_rows  # by its name of before, as the next two
from hybrid.data.labelled import Example, Examples
from hybrid.data.packing import Row, check_length, examples, joined, pack
from hybrid.data.piece_tokens import Loader, PieceTokens, tokens_of
from hybrid.data.sources import Sources
from hybrid.data.sources import unused_columns as unused_columns
from hybrid.data.tokenize import Tokenize

_SHUFFLED_TOKENS = 2**21
_HELD_OUT_EVERY = 20


@dataclass(frozen=True)
class StreamPlace:
    """Where in a stream training is; JSON.

    passes   over all the text, done
    row      of this pass, where the shuffled rows that are being trained on begin
    place    of the piece that this row begins in, for Sources.read; None: the beginning
    used     tokens of that piece that are in rows before
    taken    of the shuffled rows
    """

    passes: int = 0
    row: int = 0
    place: list[Any] | None = None
    used: int = 0
    taken: int = 0


@dataclass
class _Shuffle:
    """Rows that follow each other in the text, in the order they are trained on; `at` is where they begin."""

    at: StreamPlace
    rows: list[Row | Example] = field(default_factory=list)


class TokenStream:
    """Rows of T tokens for training, read, tokenized and shuffled while they are needed, pass after pass.

    The order is a function of the text and the seed alone: of each 2M tokens that follow each other the rows
    are shuffled. Every process sees all rows and takes its share of each step, so that the order does not
    depend on how many there are, nor on `workers`. Reading needs memory for the rows of two shuffles,
    whatever the size of the text.

    sources           see sources.py
    sequence_length   T, in tokens; the most that a row with labels may have
    separate          documents do not look at each other
    held_out          every twentieth row of the text, so many of them, is left out; see held_out_rows
    workers           processes that tokenize; 0: this one does
    vocabulary        tokens that the model has; None is not checked
    shuffled_rows     None: 2M tokens

    Errors: ValueError as in sources.py, for text that does not fill a row, a token beyond the vocabulary, a
    row with labels that is too long.
    """

    def __init__(
        self,
        sources: Sources,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        *,
        separate: bool = True,
        held_out: int = 0,
        workers: int = 0,
        vocabulary: int | None = None,
        seed: int = 0,
        shuffled_rows: int | None = None,
    ) -> None:
        check_length(sequence_length)
        if not isinstance(workers, int) or workers < 0:
            raise ValueError(f"TokenStream: expected workers to be a count, got {workers!r}.")
        self.sources, self.sequence_length = sources, sequence_length
        self.separate = separate and not sources.has_labels
        self.workers, self.seed = workers, seed
        self.shuffled_rows = shuffled_rows or max(16, _SHUFFLED_TOKENS // sequence_length)
        self._held_out = held_out
        self._tokenize = Tokenize(tokenizer, sequence_length, vocabulary)

    def held_out_rows(self) -> TokenBlocks | Examples:
        """The rows that are left out.

        Errors: ValueError when nothing would be left to train on.
        """
        length, rows = self.sequence_length, []
        all_rows = self._rows_of(tokens_of(self.sources, self._tokenize))
        number = -1
        for number, (row, _) in enumerate(islice(all_rows, _HELD_OUT_EVERY * self._held_out)):
            if self._is_held_out(number):
                rows.append(row)
        if number < 1:
            raise ValueError(
                f"data: expected at least two sequences of {length} tokens in {self.sources.name}, one to "
                f"hold out, got {number + 1}."
            )
        name = f"what is held out of {self.sources.name}"
        if self.sources.has_labels:
            return Examples(rows, name)
        tokens, positions = (joined([getattr(row, name) for row in rows]) for name in ("tokens", "positions"))
        return TokenBlocks(tokens, length, name, positions if self.separate else None)

    def describe(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run that began."""
        return self.sources.describe() | {
            "tokens": self.sequence_length,
            "separate": self.separate,
            "tokenizer": self._tokenize.fingerprint(),
            "held_out": self._held_out,
            "shuffled_rows": self.shuffled_rows,
        }

    def describe_rows(self) -> dict[str, Any]:
        """What each row of a pass is a function of; their order is not."""
        return self.sources.describe() | {
            "tokens": self.sequence_length,
            "separate": self.separate,
            "tokenizer": self._tokenize.fingerprint(),
        }

    def count_rows(self) -> int:
        """The rows of the text, held out ones too. Reads and tokenizes all of it."""
        return self.count_rows_and_tokens()[0]

    def count_rows_and_tokens(self) -> tuple[int, int]:
        """(rows, tokens in them) as count_rows."""
        with closing(Loader(self.sources, self._tokenize, self.workers, None)) as loader:
            pieces = loader.one_pass()
            if self.sources.has_labels:
                lengths = [len(row) for (row, *_), _ in examples(pieces, self.sequence_length)]
                return len(lengths), sum(lengths)
            rows = sum(len(ids.tokens) for ids in pieces) // self.sequence_length
            return rows, rows * self.sequence_length

    def count_trained(self, rows: int) -> int:
        """Of so many rows of the text, those that are trained on."""
        return rows - min(self._held_out, -(-rows // _HELD_OUT_EVERY))

    def rows(self, at: StreamPlace | None = None) -> Iterator[tuple[Row | Example, StreamPlace]]:
        """(a row, where the stream is after it), without end.

        The next shuffle is made in a thread while the rows of this one are trained on.
        """
        at = at or StreamPlace()
        loader = Loader(self.sources, self._tokenize, self.workers, at.place)  # before there are threads
        shuffles = self._shuffles(loader, at)
        pool = ThreadPoolExecutor(1)
        try:
            coming = pool.submit(next, shuffles)
            while True:
                shuffle = coming.result()
                coming = pool.submit(next, shuffles)
                for taken in range(shuffle.at.taken, len(shuffle.rows)):
                    yield shuffle.rows[taken], replace(shuffle.at, taken=taken + 1)
        finally:
            loader.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            loader.close()

    def _rows_of(
        self, pieces: Iterator["PieceTokens"], used: int = 0, first: int = 0
    ) -> Iterator[tuple[Any, tuple[list[Any], int]]]:
        if self.sources.has_labels:
            return examples(pieces, self.sequence_length, used, first)
        return pack(pieces, self.sequence_length, used, first=first)

    def _is_held_out(self, number: int) -> bool:
        return number % _HELD_OUT_EVERY == 0 and number // _HELD_OUT_EVERY < self._held_out

    def _shuffles(self, loader: "Loader", at: StreamPlace) -> Iterator[_Shuffle]:
        while True:
            has_rows, shuffle, number = at.row > 0, _Shuffle(at), at.row
            for row, (place, used) in self._rows_of(loader.one_pass(), at.used, first=number):
                if not self._is_held_out(row.number):
                    shuffle.rows.append(row)
                    has_rows = True
                number = row.number + 1
                if len(shuffle.rows) == self.shuffled_rows:
                    yield self._in_order(shuffle)
                    shuffle = _Shuffle(StreamPlace(at.passes, number, place, used))
            if shuffle.rows:
                yield self._in_order(shuffle)
            if not has_rows:
                raise ValueError(
                    f"data: expected at least one sequence of {self.sequence_length} tokens to train on in "
                    f"{self.sources.name}, got none beside {number} held out."
                )
            at = StreamPlace(at.passes + 1)

    def _in_order(self, shuffle: _Shuffle) -> _Shuffle:
        random.Random(f"{self.seed}:{shuffle.at.passes}:{shuffle.at.row}").shuffle(shuffle.rows)
        return shuffle
