"""Blocks of tokens to train and evaluate on, made from text.

Documents are put in a row and cut into rows of one length. Each begins and ends as the tokenizer has it (BOS,
where it puts one before a text), and is closed by its EOS where it has one; a chat is what its template
renders. A row says where its documents begin: its position ids start again at 0 there, which transformers and
masks.py read as sequences that must not look at each other, and no document's first token is predicted.

TokenStream makes the rows while they are trained on, of text of any size; TokenBlocks holds them all.

Rows that bring their own labels (labelled.py) are not put in a row: each stays what it is.
"""

import hashlib
import json
import os
import random
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from hybrid.data.chats import Chat, render, taken
from hybrid.data.collate import IGNORED
from hybrid.data.labelled import Example, Examples, LabelledRow, encode
from hybrid.data.sources import LONG, Piece, Sources, parts_of
from hybrid.data.special_tokens import habit_of
from hybrid.training.processes import end_with_parent

_CHUNK_PIECES, _CHUNK_CHARACTERS = 64, 2**20  # what a worker gets at once
_SHUFFLED_TOKENS = 2**21
_HELD_OUT_EVERY = 20


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


class TokenBlocks(Dataset):
    """Blocks of T tokens; item i is {"input_ids", "labels"} and, where it has positions, {"position_ids"}.

    tokens            [N] int32 or int64; what does not fill a last block is left out
    sequence_length   T, in tokens
    name              what the tokens came from, for errors
    positions         [N], of each token in its document; None: one document

    Errors: ValueError when there are fewer tokens than one block needs.
    """

    def __init__(
        self, tokens: Tensor, sequence_length: int, name: str = "data", positions: Tensor | None = None
    ) -> None:
        _check_length(sequence_length)
        if len(tokens) < sequence_length:
            raise ValueError(
                f"TokenBlocks: expected at least one sequence of {sequence_length} tokens in {name}, "
                f"got {len(tokens)} tokens. Ask for a shorter one (--sequence-length)."
            )
        self.name = name
        cut = len(tokens) // sequence_length * sequence_length
        self._blocks = tokens[:cut].view(-1, sequence_length)
        self._positions = None if positions is None else positions[:cut].view(-1, sequence_length)

    @classmethod
    def read(
        cls,
        sources: Sources | Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        field: str = "text",
        separate: bool = False,
        vocabulary: int | None = None,
    ) -> "TokenBlocks":
        """The blocks of everything that `sources` name, in their order; see sources.py.

        field        where `sources` are names: which one of a row holds the text
        separate     documents do not look at each other
        vocabulary   tokens that the model has; None is not checked
        """
        _check_length(sequence_length)
        reader = sources if isinstance(sources, Sources) else Sources(sources, field)
        tokenize = Tokenize(tokenizer, sequence_length, vocabulary)
        if reader.has_labels:
            raise ValueError(f"TokenBlocks: expected text, got rows with labels in {reader.name}.")
        rows = list(_pack(_with_ids(reader, tokenize), sequence_length, keep_rest=True))
        tokens, positions = ([getattr(row, name) for row, _ in rows] for name in ("tokens", "positions"))
        return cls(_joined(tokens), sequence_length, reader.name, _joined(positions) if separate else None)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self._blocks[index]
        positions = tokens if self._positions is None else self._positions[index]
        return Row(tokens.numpy(), positions.numpy(), index).item(separate=self._positions is not None)

    def split(self, held_out: int) -> tuple["TokenBlocks", "TokenBlocks"]:
        """(all blocks but the last `held_out`, the last `held_out`).

        Errors: ValueError when nothing would be left of either.
        """
        if not 1 <= held_out < len(self):
            raise ValueError(
                f"TokenBlocks: expected to hold out 1..{len(self) - 1} of the {len(self)} sequences of "
                f"{self.name}, got {held_out}."
            )
        length = self._blocks.shape[1]

        def part(name: str, blocks: slice) -> TokenBlocks:
            positions = None if self._positions is None else self._positions[blocks].reshape(-1)
            return TokenBlocks(self._blocks[blocks].reshape(-1), length, name, positions)

        return part(self.name, slice(-held_out)), part(f"the end of {self.name}", slice(-held_out, None))

    def largest_token(self) -> int:
        """The largest id, to be compared with a model's vocabulary."""
        return int(self._blocks.max())


def read_rows(
    sources: Sources | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    separate: bool = False,
    vocabulary: int | None = None,
) -> TokenBlocks | Examples:
    """Everything that `sources` name: text as TokenBlocks.read has it, or rows that bring their own labels.

    vocabulary   tokens that the model has; None is not checked

    Errors: ValueError as in sources.py and labelled.py, for text that fills no block.
    """
    reader = sources if isinstance(sources, Sources) else Sources(sources)
    if not reader.has_labels:
        return TokenBlocks.read(reader, tokenizer, sequence_length, separate=separate, vocabulary=vocabulary)
    tokenize = Tokenize(tokenizer, sequence_length, vocabulary)
    rows = [row for row, _ in _examples(_with_ids(reader, tokenize), sequence_length)]
    return Examples(rows, reader.name)


def unused_columns(sources: Sources, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The columns of the first rows that nothing is made of, nor taken by the tokenizer's chat template."""
    names, has_chats = sources.columns_beside()
    return sorted(names - taken(tokenizer) if has_chats else names)


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
        _check_length(sequence_length)
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
        all_rows = self._rows_of(_with_ids(self.sources, self._tokenize))
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
        tokens, positions = (
            _joined([getattr(row, name) for row in rows]) for name in ("tokens", "positions")
        )
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
        pieces = _Loader(self.sources, self._tokenize, self.workers, None).one_pass()
        if self.sources.has_labels:
            lengths = [len(row) for (row, *_), _ in _examples(pieces, self.sequence_length)]
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
        loader = _Loader(self.sources, self._tokenize, self.workers, at.place)  # before there are threads
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

    def _rows_of(
        self, pieces: Iterator["_Ids"], used: int = 0, first: int = 0
    ) -> Iterator[tuple[Any, tuple[list[Any], int]]]:
        if self.sources.has_labels:
            return _examples(pieces, self.sequence_length, used, first)
        return _pack(pieces, self.sequence_length, used, first=first)

    def _is_held_out(self, number: int) -> bool:
        return number % _HELD_OUT_EVERY == 0 and number // _HELD_OUT_EVERY < self._held_out

    def _shuffles(self, loader: "_Loader", at: StreamPlace) -> Iterator[_Shuffle]:
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


class Tokenize(Dataset):
    """Contents -> their tokens, each [N] int32, as they stand in a document: see `before` and `closing`.

    Of rows with labels, tokens and labels [2, N]. What is wrong with a content comes as text in its place,
    what is wrong with all as text alone: an exception from a worker would bring its whole stack along.

    As a data set its "indices" are lists of contents, so that a DataLoader's workers tokenize.

    before    tokens that a text begins with
    closing   tokens that a text ends with
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, sequence_length: int, vocabulary: int | None = None
    ) -> None:
        self.vocabulary, self.sequence_length = vocabulary, sequence_length
        self._tokenizer, self._habit = tokenizer, habit_of(tokenizer)
        self.before, self.closing = self._habit.before, self._habit.closing(tokenizer.eos_token_id)

    def __getitem__(self, contents: list[Any]) -> list[np.ndarray | str] | str:
        try:
            if contents and isinstance(contents[0], LabelledRow):
                found = encode(contents, self._tokenizer, self._habit, self.sequence_length)
            else:
                found = self._ids([self._text(content) for content in contents])
        except ValueError as error:
            return str(error)
        return [ids if isinstance(ids, str) else self._checked(ids) for ids in found]

    def fingerprint(self) -> str:
        """A checksum of what makes the tokens: vocabulary, rules, chat template."""
        rules = getattr(self._tokenizer, "backend_tokenizer", None)
        what = self._tokenizer.get_vocab() if rules is None else json.loads(rules.to_str())
        for name in ("truncation", "padding"):  # of the last call to it
            what.pop(name, None)
        ends = [self.before, self.closing]
        parts = [type(self._tokenizer).__name__, what, ends, self._tokenizer.chat_template]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _text(self, content: str | Chat) -> str | ValueError:
        if isinstance(content, str):
            return content
        try:
            return render(content, self._tokenizer)
        except ValueError as error:
            return error

    def _ids(self, texts: list[str | ValueError]) -> list[np.ndarray | str]:
        """Short texts at once; long ones part by part, so that memory does not grow with them."""
        short = [text for text in texts if isinstance(text, str) and len(text) <= LONG]
        found = iter(self._call(short))
        return [
            str(text)
            if isinstance(text, ValueError)
            else next(found)
            if len(text) <= LONG
            else np.concatenate([self._call([part])[0] for part in parts_of(text)])
            for text in texts
        ]

    def _call(self, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        found = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.array(ids, dtype=np.int32) for ids in found]

    def _checked(self, ids: np.ndarray) -> np.ndarray | str:
        if self.vocabulary is None or not ids.size or ids.max() < self.vocabulary:
            return ids
        return (
            f"expected a tokenizer for the model's vocabulary of {self.vocabulary} tokens, "
            f"got token {ids.max()}."
        )


class _Ids(NamedTuple):
    """A piece's tokens [N], with those that begin and close a document; or tokens and labels [2, N]."""

    tokens: np.ndarray
    ends: bool
    place: list[Any]


class _Loader:
    """The tokens of all pieces from `place` on, and of all again, and again; made ahead by workers."""

    def __init__(self, sources: Sources, tokenize: Tokenize, workers: int, place: list[Any] | None) -> None:
        self._tokenize = tokenize
        self._is_stopped = False
        self._asked: deque[list[Piece] | None] = deque()  # None: a pass is over
        self._answers = iter(
            DataLoader(
                tokenize,
                sampler=_endless(sources, place, self._asked),  # type: ignore[arg-type]  # lists of contents
                batch_size=None,
                num_workers=workers,
                collate_fn=_as_it_is,
                worker_init_fn=_one_thread,
                prefetch_factor=4 if workers else None,
            )
        )

    def stop(self) -> None:
        """Nobody waits for the rest."""
        self._is_stopped = True

    def one_pass(self) -> Iterator[_Ids]:
        for answer in self._answers:
            if self._is_stopped:
                raise RuntimeError("nobody waits for this")
            pieces = self._asked.popleft()
            if pieces is None:
                return
            yield from _closed(pieces, answer, self._tokenize)


def _endless(
    sources: Sources, place: list[Any] | None, asked: deque[list[Piece] | None]
) -> Iterator[list[Any]]:
    """The contents of chunks from `place` on, and again and again; what they are of goes into `asked`."""
    while True:
        for chunk in _chunked(sources.read(place)):
            asked.append(chunk)
            yield [piece.content for piece in chunk]
        asked.append(None)
        yield []
        place = None


def _with_ids(sources: Sources, tokenize: Tokenize) -> Iterator[_Ids]:
    """The tokens of all pieces, once, by this process."""
    for chunk in _chunked(sources.read()):
        yield from _closed(chunk, tokenize[[piece.content for piece in chunk]], tokenize)


def _chunked(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    chunk: list[Piece] = []
    characters = 0
    for piece in pieces:
        chunk.append(piece)
        characters += len(piece.content)
        if len(chunk) == _CHUNK_PIECES or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _closed(pieces: list[Piece], answer: list[np.ndarray | str] | str, tokenize: Tokenize) -> Iterator[_Ids]:
    """The pieces with what a text begins and ends with; a chat's template has seen to that."""
    if isinstance(answer, str):
        first, last = pieces[0].where, pieces[-1].where
        raise ValueError(f"{answer} It is in {first}{'' if first == last else f' to {last}'}.")
    for piece, ids in zip(pieces, answer, strict=True):
        if isinstance(ids, str):
            raise ValueError(f"data: {piece.where}: {ids}")
        if isinstance(piece.content, str):
            before = tokenize.before if piece.begins else []
            closing = tokenize.closing if piece.ends else []
            ids = np.concatenate([before, ids, closing], dtype=np.int32, casting="unsafe")
        yield _Ids(ids, piece.ends, piece.place)


def _pack(
    pieces: Iterator[_Ids], length: int, used: int = 0, keep_rest: bool = False, first: int = 0
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


def _examples(
    pieces: Iterator[_Ids], length: int, used: int = 0, first: int = 0
) -> Iterator[tuple[Example, tuple[list[Any], int]]]:
    """What _pack gives, of rows with labels: a row a piece; a chat that is too long for one makes several."""
    for both, _, place in pieces:
        while used < both.shape[1]:
            tokens, labels = both[:, used : used + length]
            used += len(tokens)
            if (labels[1:] != IGNORED).any():
                yield Example(tokens, labels, first), (place, used)
                first += 1
        used = 0


def _joined(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, np.int32), *arrays]))


def _check_length(sequence_length: int) -> None:
    if sequence_length < 2:
        raise ValueError(
            f"TokenBlocks: expected sequence_length of at least 2 tokens, got {sequence_length}."
        )


def _as_it_is(answer: Any) -> Any:
    return answer


def _one_thread(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with_parent()
