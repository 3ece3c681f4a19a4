"""The tokens of each piece of what is read: once by this process, or ahead by workers, pass after pass."""

import os
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader

from hybrid.data.sources import Piece, Sources
from hybrid.data.tokenize import Tokenize
from hybrid.training.processes import end_with_parent

_CHUNK_PIECES, _CHUNK_CHARACTERS = 64, 2**20  # what a worker gets at once


class PieceTokens(NamedTuple):
    """A piece's tokens [N], with those that begin and close a document; or tokens and labels [2, N]."""

    tokens: np.ndarray
    ends: bool
    place: list[Any]


class Loader:
    """The tokens of all pieces from `place` on, and of all again, and again; made ahead by workers.

    Its workers end when it is closed. Left to Python's collector of cycles (an error's traceback makes one),
    a DataLoader waits 5 s for each.
    """

    def __init__(self, sources: Sources, tokenize: Tokenize, workers: int, place: list[Any] | None) -> None:
        self._tokenize = tokenize
        self._is_stopped = False
        self._asked: deque[list[Piece] | Exception | None] = deque()  # None: a pass is over
        self._answers: Iterator[Any] = iter(
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
        """Nobody waits for the rest; a thread that reads it ends with an error."""
        self._is_stopped = True

    def close(self) -> None:
        """End the workers. No thread reads any more."""
        # PyTorch has no public name for it, and without workers nothing to end
        if (end := getattr(self._answers, "_shutdown_workers", None)) is not None:
            end()

    def one_pass(self) -> Iterator[PieceTokens]:
        for answer in self._answers:
            if self._is_stopped:
                raise RuntimeError("nobody waits for this")
            pieces = self._asked.popleft()
            if isinstance(pieces, Exception):
                raise pieces
            if pieces is None:
                return
            yield from _closed(pieces, answer, self._tokenize)


def tokens_of(sources: Sources, tokenize: Tokenize) -> Iterator[PieceTokens]:
    """The tokens of all pieces, once, by this process."""
    for chunk in _chunked(sources.read()):
        yield from _closed(chunk, tokenize[[piece.content for piece in chunk]], tokenize)


def _endless(
    sources: Sources, place: list[Any] | None, asked: deque[list[Piece] | Exception | None]
) -> Iterator[list[Any]]:
    """The contents of chunks from `place` on, and again and again; what they are of goes into `asked`.

    So does an error of reading: raised while a DataLoader begins, it would leave workers that nobody can end.
    """
    while True:
        try:
            for chunk in _chunked(sources.read(place)):
                asked.append(chunk)
                yield [piece.content for piece in chunk]
        except Exception as error:
            asked.append(error)
            yield []
            return
        asked.append(None)
        yield []
        place = None


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


def _closed(
    pieces: list[Piece], answer: list[np.ndarray | str] | str, tokenize: Tokenize
) -> Iterator[PieceTokens]:
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
        yield PieceTokens(ids, piece.ends, piece.place)


def _as_it_is(answer: Any) -> Any:
    return answer


def _one_thread(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with_parent()
