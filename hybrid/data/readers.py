"""How each kind of file is read: documents one after another, from any place on, a little at a time."""

import codecs
import csv
import json
import re
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from hybrid.data.formats import BOM, Format, check_text, open_bytes
from hybrid.error_text import first_line

_PIECE = 2**20  # bytes of a text file
_ROWS = 256  # of a data set between two places that it keeps itself
_SPACE = re.compile(r"[ \t\r\n]*")
_CUT = 16  # characters: an error so close to the end of what was read may be one of what was not read yet
_CELL = 2**31 - 1  # characters of a .csv's cell; Python's own limit is 128 KiB


class Read(NamedTuple):
    """What a reader found.

    found       a text, or a row
    place       JSON, from which reading goes on with it
    where       the same for a person
    begins, ends    whether a document does with it
    """

    found: Any
    place: Any
    where: str
    begins: bool = True
    ends: bool = True


def read_text(path: Path, format: Format, start: int | None, field: str) -> Iterator[Read]:
    """One document; a long one in pieces that end with a line where there is one.

    Where a piece ends is a function of where it begins: what goes on from a place reads the same pieces.
    """
    at, has_text = start or 0, bool(start)
    if not at:
        check_text(path, format.packed, field)
    with open_bytes(path, format.packed, at) as file:
        content = file.read(_PIECE + 1)  # the one says whether there is more
        while content:
            is_last = len(content) <= _PIECE
            piece = content if is_last else content[: _end_of_piece(content[:_PIECE])]
            has_text = has_text or bool(piece.strip())
            text = _decoded(piece, path, at)
            yield Read(text if at else text.removeprefix("\ufeff"), at, str(path), at == 0, is_last)
            at += len(piece)
            content = content[len(piece) :]
            content += file.read(_PIECE + 1 - len(content))
    if not has_text:
        raise _empty(path)


def read_lines(path: Path, format: Format, start: list[int] | None) -> Iterator[Read]:
    """A JSON object a line; a place is (byte, number of the line)."""
    at, number = start or (0, 1)
    has_text = at > 0
    with open_bytes(path, format.packed, at) as file:
        for line in file:
            content = line.removeprefix(BOM)
            if content.strip():
                has_text, where = True, f"{path}, line {number}"
                row = _parsed(_decoded(content, path, at + len(line) - len(content)), where)
                yield Read(row, [at, number], where)
            at, number = at + len(line), number + 1
    if not has_text:
        raise _empty(path)


def read_json(path: Path, format: Format, start: list[Any] | None) -> Iterator[Read]:
    """An array of objects, or objects one after another; a place is (byte, which of them, in an array)."""
    at, number, in_array = start or (0, 1, False)
    with open_bytes(path, format.packed, at) as file:
        text = _Text(file, path, at)
        if start is None:
            text.skip("\ufeff")
            in_array = text.skip("[")
        while in_array or not text.is_over():
            if number == 1 and in_array and text.skip("]"):
                break
            at = text.at
            where = f"{path}, element {number}"
            yield Read(text.value(where), [at, number, in_array], where)
            number += 1
            if in_array and text.skip("]"):
                in_array = False
                if not text.is_over():
                    raise ValueError(f"data: {path}: expected nothing after its array, got more.")
            elif in_array and not text.skip(","):
                raise ValueError(f"data: {where}: expected , or ] after it, got neither.")
    if number == 1:
        raise _empty(path)


def read_table(path: Path, format: Format, start: list[int] | None) -> Iterator[Read]:
    """A row of text a line, by the first line's names; a place is (byte, number of the line)."""
    csv.field_size_limit(_CELL)
    delimiter = "\t" if format.kind == "tsv" else ","
    with open_bytes(path, format.packed) as file:
        lines = _Lines(file, path)
        names = next(_records(lines, delimiter, path), (None, []))[1]
    if len(set(names)) < len(names):
        raise ValueError(
            f"data: {path}, line 1: expected names of columns, each once, got {', '.join(names)}."
        )
    at, number = start or (lines.at, lines.number)
    has_rows = start is not None
    with open_bytes(path, format.packed, at) as file:
        for place, cells in _records(_Lines(file, path, at, number), delimiter, path):
            has_rows, where = True, f"{path}, line {place[1]}"
            if len(cells) != len(names):
                raise ValueError(f"data: {where}: expected {len(names)} cells, got {len(cells)}.")
            yield Read(dict(zip(names, cells, strict=True)), place, where)
    if not has_rows:
        raise _empty(path)


def read_data_set(source: Path | str, start: list[Any] | None) -> Iterator[Read]:
    """A row a document; a place is (what datasets calls its state, the rows before it, rows to pass over)."""
    if isinstance(source, Path) and _has_no_rows(source):
        warnings.warn(f"data: {source} has no rows and is passed over.", stacklevel=2)
        return
    rows = _data_set(source)
    state, before, passed = start or (None, 0, 0)
    if state is not None:
        rows.load_state_dict(state)
    iterator = iter(rows)
    for _ in islice(iterator, passed):
        pass
    state, number = (rows.state_dict(), before) if state is None else (state, before)
    while True:
        where = f"{source}, row {number + passed}"
        try:
            row = next(iterator)
        except StopIteration:
            break
        except Exception as error:  # of datasets, pyarrow, fsspec, ...: whatever is damaged
            raise ValueError(
                f"data: {where}: expected a row that can be read, got: {first_line(error)}"
            ) from error
        yield Read(row, [state, number, passed], where)
        passed += 1
        if passed >= _ROWS:
            state, number, passed = rows.state_dict(), number + passed, 0
    if not number + passed:
        warnings.warn(f"data: {source} has no rows and is passed over.", stacklevel=2)


def _has_no_rows(path: Path) -> bool:
    """Whether a parquet file is a whole one without rows, of which datasets makes an error."""
    try:
        from pyarrow.parquet import read_metadata

        return read_metadata(path).num_rows == 0
    except (ImportError, OSError, ValueError):
        return False  # datasets says what is wrong


def _data_set(source: Path | str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"data: {source} is no file of text, JSON or CSV here, and parquet and data sets need the "
            "package datasets: expected it installed (pip install 'trm-hybrid[data]'), got none."
        ) from None
    try:
        if isinstance(source, Path):
            return load_dataset("parquet", data_files=[str(source)], split="train", streaming=True)
        name, config, split = (*source.split(":"), "", "")[:3]
        return load_dataset(name, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(source, Path):
            raise ValueError(
                f"data: expected a whole parquet file in {source}, got: {first_line(error)}"
            ) from error
        raise ValueError(
            f"data: expected a file or a data set, got {source}, which is no file here and cannot be loaded "
            f"as a data set ({first_line(error)})."
        ) from error


class _Text:
    """A file of JSON as text, of which no more is held than a value needs."""

    def __init__(self, file: IO[bytes], path: Path, at: int) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._next, self._has_more = "", 0, True
        self._at = at  # the byte of self._text[self._next]

    @property
    def at(self) -> int:
        """The byte at which what comes next begins; space is passed over."""
        self.is_over()
        return self._at

    def is_over(self) -> bool:
        """Whether nothing but space is left."""
        while True:
            space = _SPACE.match(self._text, self._next)
            self._drop(space.end() if space else self._next)
            if self._next < len(self._text):
                return False
            if not self._read():
                return True

    def skip(self, mark: str) -> bool:
        """Whether `mark` comes next; it is passed over."""
        found = not self.is_over() and self._text.startswith(mark, self._next)
        self._drop(self._next + len(mark) if found else self._next)
        return found

    def value(self, where: str) -> Any:
        """What comes next. Errors: ValueError where nothing does."""
        self.is_over()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._next)
            except RecursionError:
                raise _nests_too_deeply(where) from None
            except ValueError as error:
                at = getattr(error, "pos", 0)
                may_be_cut = "Unterminated" in str(error) or at >= len(self._text) - _CUT
                if not (may_be_cut and self._read()):
                    raise _no_json(where, error) from None
            else:
                self._drop(end)
                return value

    def _drop(self, end: int) -> None:
        self._at += len(self._text[self._next : end].encode())
        self._next = end

    def _read(self) -> bool:
        """Read as much again as is held. False: there is no more."""
        self._text, self._next = self._text[self._next :], 0
        content = self._file.read(max(_PIECE, len(self._text))) if self._has_more else b""
        self._has_more = bool(content)
        try:
            self._text += self._decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"data: expected UTF-8 in {self._path}, got byte 0x{error.object[error.start]:02x}."
            ) from None
        return self._has_more


class _Lines:
    """The lines of a file as text, for csv, which may take several for a row."""

    def __init__(self, file: IO[bytes], path: Path, at: int = 0, number: int = 1) -> None:
        self._file, self._path, self.at, self.number = file, path, at, number

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._file)
        text = _decoded(line, self._path, self.at)
        text = text if self.at else text.removeprefix("\ufeff")
        self.at, self.number = self.at + len(line), self.number + 1
        return text


def _records(lines: _Lines, delimiter: str, path: Path) -> Iterator[tuple[list[int], list[str]]]:
    """((byte, line) where a record begins, its cells); empty lines are passed over."""
    records = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        place = [lines.at, lines.number]
        try:
            cells = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"data: {path}, line {place[1]}: expected a row of CSV, got: {error}.") from None
        if cells:
            yield place, cells


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


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise _nests_too_deeply(where) from None
    except ValueError as error:
        raise _no_json(where, error) from None


def _nests_too_deeply(where: str) -> ValueError:
    return ValueError(f"data: {where}: expected JSON with few levels inside each other, got too many.")


def _no_json(where: str, error: ValueError) -> ValueError:
    return ValueError(f"data: {where}: expected a JSON object, got none ({error}).")


def _empty(path: Path) -> ValueError:
    return ValueError(f"data: expected text in {path}, got an empty file.")
