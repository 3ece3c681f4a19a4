"""Documents to train on: files, globs and data sets in, pieces of text out, one after another.

Nothing is held: a text file is read a mebibyte at a time, a .jsonl file by the line, .parquet files and data
sets by the row, streamed by the package datasets. A place in all of it is a small JSON value, from which
reading goes on without what comes before.
"""

import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from hybrid.contents import of_files
from hybrid.labelled import LabelledRow, labelled_row

# a name that ends like this is a file's, and is looked for nowhere else
_FILE = re.compile(r"\.[A-Za-z]{1,7}$|^[./~]")
_PIECE = 2**20  # bytes of a text file
_COMPARED_ROWS = 64  # of a data set of the hub, when a run is resumed
_ROWS = 256  # of a data set between two places that it keeps itself


@dataclass(frozen=True)
class Piece:
    """A document, or a piece of a long text file.

    content   text, or a chat: a list of {"role": ..., "content": ...}; or a row with labels, see labelled.py
    ends      the document is over with it
    place     where it begins, for Sources.read
    where     the same for a person
    """

    content: str | list[Any] | LabelledRow
    ends: bool
    place: list[Any]
    where: str


class Sources:
    """Everything that `names` name, in their order; a glob's files come in the order of their names.

    names   files, globs, or NAME[:CONFIG[:SPLIT]] of data sets for datasets.load_dataset (a folder is one
            too); the split is "train" where none is given
    field   of a .jsonl line or a row that holds the text or the chat

    All rows bring their own labels (labelled.py), or none does.

    Errors: ValueError for a file that is missing; on reading for one that is empty or not UTF-8, a line or
    a row without the field, labels in some rows only, a data set that cannot be loaded.
    """

    def __init__(self, names: Sequence[str], field: str = "text") -> None:
        self.name = ", ".join(names)
        self.field = field
        self._parts: list[Path | str] = []
        for name in names:
            paths = _files(name)
            self._parts += [name] if paths is None else paths

    def read(self, place: list[Any] | None = None) -> Iterator[Piece]:
        """The pieces from `place` on; None: from the beginning."""
        for piece in self._read(place):
            if isinstance(piece.content, LabelledRow) != self.has_labels:
                kinds = ("labels", "text without") if self.has_labels else ("text", "labels")
                raise ValueError(
                    f"data: {piece.where}: expected {kinds[0]}, as in the first row of {self.name}, "
                    f"got {kinds[1]}."
                )
            yield piece

    @cached_property
    def has_labels(self) -> bool:
        """Whether the rows bring their own labels: whether the first does."""
        first = next(self._read(), None)
        return first is not None and isinstance(first.content, LabelledRow)

    def _read(self, place: list[Any] | None = None) -> Iterator[Piece]:
        first, inside = place or (0, None)
        for index in range(first, len(self._parts)):
            part = self._parts[index]
            read: Callable[..., Iterator[tuple[Any, bool, Any, str]]] = _rows
            if isinstance(part, Path) and part.suffix != ".parquet":
                read = _lines if part.suffix == ".jsonl" else _text
            for content, ends, at, where in read(part, inside, self.field):
                yield Piece(content, ends, [index, at], where)
            inside = None

    def describe(self) -> dict[str, Any]:
        """What tells these sources from others: their content, as contents.py says it, not their place."""
        return {"field": self.field, "sources": self._contents}

    @cached_property
    def _contents(self) -> dict[str, Any]:
        files = iter(of_files([part for part in self._parts if isinstance(part, Path)]))
        return {str(n): self._content_of(n - 1, files) for n in range(1, len(self._parts) + 1)}

    def _content_of(self, index: int, files: Iterator[dict[str, Any]]) -> dict[str, Any]:
        part = self._parts[index]
        if isinstance(part, Path):
            kind = part.suffix if part.suffix in (".jsonl", ".parquet") else "text"
            return {"kind": kind} | next(files)
        if (folder := Path(part)).is_dir():
            inside = sorted(path for path in folder.rglob("*") if path.is_file())
            names = [path.relative_to(folder).as_posix() for path in inside]
            return {"kind": "folder", "files": dict(zip(names, of_files(inside), strict=True))}
        first = [piece.content for piece in islice(self._read([index, None]), _COMPARED_ROWS)]
        digest = hashlib.sha256(json.dumps(first, default=repr).encode()).hexdigest()
        return {"kind": part, "sha256 of its first rows": digest}


def documents(names: Sequence[str], field: str = "text") -> Iterator[str | list[Any] | LabelledRow]:
    """The documents of everything that `names` name, each whole; see Sources."""
    begun: list[str] = []
    for piece in Sources(names, field).read():
        if isinstance(piece.content, str) and (begun or not piece.ends):
            begun.append(piece.content)
            if piece.ends:
                yield "".join(begun)
                begun = []
        else:
            yield piece.content


def _files(source: str) -> list[Path] | None:
    """The files that `source` names; None where it names a data set."""
    if glob.has_magic(source) and not Path(source).exists():
        paths = [Path(name) for name in sorted(glob.glob(source, recursive=True))]
        if paths := [path for path in paths if path.is_file()]:
            return paths
        raise ValueError(f"data: expected files that match {source}, got none.")
    if Path(source).is_file():
        return [Path(source)]
    if Path(source).is_dir() or not _FILE.search(source):
        return None
    raise ValueError(f"data: expected a file {source}, got no such file.")


def _text(path: Path, start: int | None, field: str) -> Iterator[tuple[str, bool, int, str]]:
    """One document; a long one in pieces that end with a line where there is one."""
    at, has_text = start or 0, bool(start)
    with open(path, "rb") as file:
        file.seek(at)
        content = file.read(_PIECE)
        while content:
            more = file.read(_PIECE)
            piece = content if not more else content[: _end_of_piece(content)]
            has_text = has_text or bool(piece.strip())
            yield _decoded(piece, path, at), not more, at, str(path)
            at += len(piece)
            content = content[len(piece) :] + more
    if not has_text:
        raise ValueError(f"data: expected text in {path}, got an empty file.")


def _end_of_piece(content: bytes) -> int:
    """After the last line that is whole; else before a character that may be cut."""
    if end := content.rfind(b"\n") + 1:
        return end
    end = len(content) - 1
    while end > max(1, len(content) - 4) and content[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _decoded(content: bytes, path: Path, at: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data: expected UTF-8 in {path}, got byte 0x{content[error.start]:02x} "
            f"at byte {at + error.start}."
        ) from None


def _lines(path: Path, start: list[int] | None, field: str) -> Iterator[tuple[Any, bool, list[int], str]]:
    """A document a line; a place is (byte, number of the line)."""
    at, number = start or (0, 1)
    has_text = at > 0
    with open(path, "rb") as file:
        file.seek(at)
        for content in file:
            if content.strip():
                has_text, where = True, f"{path}, line {number}"
                try:
                    row = json.loads(_decoded(content, path, at))
                except json.JSONDecodeError as error:
                    raise ValueError(f"data: {where}: expected a JSON object, got none ({error}).") from None
                yield _content(row, field, where), True, [at, number], where
            at, number = at + len(content), number + 1
    if not has_text:
        raise ValueError(f"data: expected text in {path}, got an empty file.")


def _rows(
    source: Path | str, start: list[Any] | None, field: str
) -> Iterator[tuple[Any, bool, list[Any], str]]:
    """A document a row; a place is (what datasets calls its state, the rows before it, rows to pass over)."""
    rows = _data_set(source)
    state, before, passed = start or (None, 0, 0)
    if state is not None:
        rows.load_state_dict(state)
    iterator = iter(rows)
    for _ in islice(iterator, passed):
        pass
    state, number = (rows.state_dict(), before) if state is None else (state, before)
    for row in iterator:
        where = f"{source}, row {number + passed}"
        yield _content(row, field, where), True, [state, number, passed], where
        passed += 1
        if passed >= _ROWS:
            state, number, passed = rows.state_dict(), number + passed, 0


def _data_set(source: Path | str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"data: {source} is no text or .jsonl file here, and parquet and data sets need the package "
            "datasets: expected it installed (pip install 'trm-hybrid[data]'), got none."
        ) from None
    try:
        if isinstance(source, Path):
            return load_dataset("parquet", data_files=[str(source)], split="train", streaming=True)
        name, config, split = (*source.split(":"), "", "")[:3]
        return load_dataset(name, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(source, Path):
            raise ValueError(f"data: expected a whole parquet file in {source}, got: {reason}") from error
        raise ValueError(
            f"data: expected a file or a data set, got {source}, which is no file here and cannot be loaded "
            f"as a data set ({reason})."
        ) from error


def _content(row: object, field: str, where: str) -> str | list[Any] | LabelledRow:
    try:
        if isinstance(row, dict) and (labelled := labelled_row(row, field)) is not None:
            return labelled
    except ValueError as error:
        raise ValueError(f"data: {where}: {error}") from None
    content = row.get(field) if isinstance(row, dict) else None
    is_chat = isinstance(content, list) and content and all(isinstance(turn, dict) for turn in content)
    if not isinstance(content, str) and not is_chat:
        if isinstance(row, dict) and field in row:
            got = f"{content!r:.40}"
        else:
            got = ", ".join(map(str, row)) or "no fields" if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"data: {where}: expected text or a chat in the field {field!r}, got {got}.")
    return content  # type: ignore[return-value]  # what is left is one of the two
