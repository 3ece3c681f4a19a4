"""Documents to train on: files, globs and data sets in, pieces of text out, one after another.

Nothing is held: a text file is read a mebibyte at a time, others by the row (readers.py). A place in all of
it is a small JSON value, from which reading goes on without what comes before.
"""

import glob
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hybrid.data.chats import Chat, taken
from hybrid.data.formats import Format, format_of, is_file_name
from hybrid.data.labelled import LabelledChat, LabelledRow
from hybrid.data.readers import Read, read_data_set, read_json, read_lines, read_table, read_text
from hybrid.data.rows import LOSS_ON, Content, RowContent, read_row
from hybrid.training.contents import of_files

LONG = 2**20  # characters of a text that is tokenized in parts: tokenizers take 200 bytes for each
_FIRST_ROWS = 100  # whose columns are looked at
_COMPARED_ROWS = 64  # of a data set of the hub, when a run is resumed


@dataclass(frozen=True)
class Piece:
    """A document, or a piece of a long text file.

    content       text, or a chat; or a row with labels, see labelled.py
    begins, ends  whether the document does with it
    place         where it begins, for Sources.read
    where         the same for a person
    beside        columns of its row that it was not made of
    """

    content: Content
    begins: bool
    ends: bool
    place: list[Any]
    where: str
    beside: tuple[str, ...] = ()


class Sources:
    """Everything that `names` name, in their order; a glob's files come in the order of their names.

    names         files, globs, or NAME[:CONFIG[:SPLIT]] of data sets for datasets.load_dataset (a folder is
                  one too); the split is "train" where none is given
    field         of a row that holds the text or the chat; where a row has no "text", messages or
                  conversations
    loss_on       "all", or "completions": of chats what the assistant says (labelled.py)
    text_counts   whether with "completions" plain text will do as well, all of which counts

    All rows bring their own labels (labelled.py), or none does.

    Errors: ValueError for a file that is missing; on reading for one that is empty, damaged, not UTF-8 or not
    what its name says, a row without the field, labels in some rows only, a data set that cannot be loaded.
    """

    def __init__(
        self, names: Sequence[str], field: str = "text", loss_on: str = "all", text_counts: bool = False
    ) -> None:
        if loss_on not in LOSS_ON:
            raise ValueError(f"data: expected a loss on {' or '.join(LOSS_ON)}, got {loss_on!r}.")
        self.name = ", ".join(names)
        self.field, self.loss_on, self.text_counts = field, loss_on, text_counts
        self._parts: list[Path | str] = []
        for name in names:
            if not name:
                raise ValueError("data: expected names of files or data sets, got an empty one.")
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

    def columns_beside(self) -> tuple[set[str], bool]:
        """(columns of the first rows that nothing is made of, whether these rows are chats)"""
        names, has_chats = set[str](), False
        for piece in islice(self._read(), _FIRST_ROWS):
            names.update(piece.beside)
            has_chats = has_chats or isinstance(piece.content, Chat | LabelledChat)
        return names, has_chats

    def _read(self, place: list[Any] | None = None) -> Iterator[Piece]:
        first, inside, passed = (*(place or (0, None)), 0)[:3]
        for index in range(first, len(self._parts)):
            for read in self._read_part(self._parts[index], inside):
                said = self._said(read, self._parts[index])
                if isinstance(said.content, str) and len(said.content) > LONG:
                    yield from _long(said, read, index, passed)
                else:
                    place = [index, read.place]
                    yield Piece(said.content, read.begins, read.ends, place, read.where, said.beside)
                passed = 0
            inside = None

    def _read_part(self, part: Path | str, place: Any) -> Iterator[Read]:
        if not isinstance(part, Path) or _is_arrow(part):
            yield from read_data_set(part, place)
            return
        format = format_of(part)
        try:
            yield from self._read_file(part, format, place)
        except (OSError, EOFError, zlib.error) as error:
            reason = str(error) or type(error).__name__
            what = f"{format.packed} file" if format.packed else "file that can be read"
            raise ValueError(f"data: expected a whole {what} in {part}, got: {reason}.") from error

    def _read_file(self, path: Path, format: Format, place: Any) -> Iterator[Read]:
        if format.kind in (None, "text"):
            return read_text(path, format, place, self.field)
        assert format.kind is not None, "a file of no kind is text"
        reader = {"lines": read_lines, "json": read_json, "csv": read_table, "tsv": read_table}[format.kind]
        return reader(path, format, place)

    def _said(self, read: Read, part: Path | str) -> RowContent:
        if isinstance(part, Path) and format_of(part).kind in (None, "text"):
            if self.loss_on == "all" or self.text_counts:
                return RowContent(read.found, ())
            raise ValueError(
                f"data: {read.where}: expected chats for a loss on completions (--loss-on), got a text."
            )
        try:
            return read_row(read.found, self.field, self.loss_on, _is_arrow(part), self.text_counts)
        except ValueError as error:
            raise ValueError(f"data: {read.where}: {error}") from None

    def describe(self) -> dict[str, Any]:
        """What tells these sources from others: their content, as contents.py says it, not their place."""
        return {"field": self.field, "loss_on": self.loss_on, "sources": self._contents}

    @cached_property
    def _contents(self) -> dict[str, Any]:
        files = iter(of_files([part for part in self._parts if isinstance(part, Path)]))
        return {str(n): self._content_of(n - 1, files) for n in range(1, len(self._parts) + 1)}

    def _content_of(self, index: int, files: Iterator[dict[str, Any]]) -> dict[str, Any]:
        part = self._parts[index]
        if isinstance(part, Path):
            return format_of(part)._asdict() | next(files)
        if (folder := Path(part)).is_dir():
            inside = sorted(path for path in folder.rglob("*") if path.is_file())
            names = [path.relative_to(folder).as_posix() for path in inside]
            return {"kind": "folder", "files": dict(zip(names, of_files(inside), strict=True))}
        first = [piece.content for piece in islice(self._read([index, None]), _COMPARED_ROWS)]
        digest = hashlib.sha256(json.dumps(first, default=repr).encode()).hexdigest()
        return {"kind": part, "sha256 of its first rows": digest}


def documents(names: Sequence[str], field: str = "text") -> Iterator[Content]:
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
    if Path(source).is_dir() or not is_file_name(source):
        return None
    raise ValueError(f"data: expected a file {source}, got no such file.")


def _long(said: RowContent, read: Read, index: int, passed: int) -> Iterator[Piece]:
    """A long text in parts, but for the first `passed`; the place of a part counts those before it."""
    parts = list(parts_of(str(said.content)))
    for number, part in enumerate(parts[passed:], start=passed):
        begins, ends = read.begins and number == 0, read.ends and number == len(parts) - 1
        yield Piece(part, begins, ends, [index, read.place, number], read.where, said.beside)


def _is_arrow(part: Path | str) -> bool:
    """Whether datasets reads it, where every row has every column, null or not."""
    return isinstance(part, str) or format_of(part).kind == "parquet"


def parts_of(text: str) -> Iterator[str]:
    """Parts of a long text, each ending with a line where there is one, else with a word."""
    start = 0
    while start < len(text):
        end = start + LONG
        if end < len(text):
            line, word = (text.rfind(mark, start + 1, end) for mark in "\n ")
            end = line + 1 if line > 0 else word if word > 0 else end
        yield text[start:end]
        start = end


def unused_columns(sources: Sources, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The columns of the first rows that nothing is made of, nor taken by the tokenizer's chat template."""
    names, has_chats = sources.columns_beside()
    return sorted(names - taken(tokenizer) if has_chats else names)
