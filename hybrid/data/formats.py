"""What a file is: by its name's ending, and by how its content begins where the name says text or nothing."""

import csv
import gzip
import io
import re
from pathlib import Path
from typing import IO, Any, NamedTuple

_KINDS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_PACKED = (".gz", ".zst")
BOM = b"\xef\xbb\xbf"  # some editors begin a file with it
_HEAD = 2**16  # bytes of a file that are looked at
_MARKS = {
    b"\x1f\x8b": "gzip (name it .gz)",
    b"\x28\xb5\x2f\xfd": "zstd (name it .zst)",
    b"PAR1": "parquet (name it .parquet)",
    b"PK\x03\x04": "a zip archive",
    b"%PDF-": "PDF",
    b"ARROW1": "Arrow",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"SQLite format 3": "SQLite",
    b"\xff\xfe\0\0": "UTF-32 (expected UTF-8)",
    b"\0\0\xfe\xff": "UTF-32 (expected UTF-8)",
    b"\xff\xfe": "UTF-16 (expected UTF-8)",
    b"\xfe\xff": "UTF-16 (expected UTF-8)",
}
_STRING = rb'"(?:[^"\\\n]|\\.)*"'
_JSON = re.compile(rb"\s*(?:(?:\[\s*)?\{\s*%b\s*:|\[\s*%b\s*[,\]])" % (_STRING, _STRING))
_PYTHON = re.compile(rb"\s*(?:\[\s*)?\{\s*'(?:[^'\\\n]|\\.)*'\s*:")
_DELIMITERS = ",\t;|"
_COLUMN = re.compile(r'"?[A-Za-z_][A-Za-z0-9_.-]*"?')
_LINES = 20  # of a file whose cells are counted
_BUFFER = 2**20  # bytes of what is unpacked
_ZSTD_WINDOW = 2**31  # bytes; the widest that `zstd --long` writes


class Format(NamedTuple):
    """How a file is read.

    kind     "text", "lines" (a JSON object a line), "json" (an array of objects, or one after another),
             "csv", "tsv" or "parquet"; None: its name does not say: it is text if it looks like text
    packed   ".gz" or ".zst", or ""
    """

    kind: str | None
    packed: str


def format_of(path: Path) -> Format:
    """What the name of `path` says; capital letters are as small ones."""
    name = path.name.lower()
    packed = next((ending for ending in _PACKED if name.endswith(ending)), "")
    kind = _KINDS.get(Path(name.removesuffix(packed)).suffix)
    if kind == "parquet" and packed:
        raise ValueError(f"data: expected parquet as it is, which packs itself, got {path}.")
    return Format(kind, packed)


def is_file_name(name: str) -> bool:
    """Whether `name` can only be a file's or a folder's: by its ending, its beginning or its depth.

    A data set has at most one / and may have any other ending: "org/corpus.v", "wikipedia:20231101.en".
    """
    place = name.partition(":")[0]
    has_ending = Path(place.lower()).suffix in (*_KINDS, *_PACKED) and ":" not in name
    return has_ending or name[:1] in ("/", ".", "~") or place.count("/") > 1


def open_bytes(path: Path, packed: str, at: int = 0) -> IO[bytes]:
    """The bytes inside of `path`, from `at` on; of a packed file what is before is read and passed over.

    Errors: ValueError where a package is missing.
    """
    if not packed:
        file = open(path, "rb")  # noqa: SIM115  the caller closes it
        file.seek(at)
        return file
    raw: Any = gzip.GzipFile(path) if packed == ".gz" else _Zstandard(path)
    unpacked = io.BufferedReader(raw, _BUFFER)
    while at and (passed := unpacked.read(min(at, _BUFFER))):
        at -= len(passed)
    return unpacked


def check_text(path: Path, packed: str, field: str) -> None:
    """See that `path` is text. Errors: ValueError for what looks like another format, which is named."""
    with open_bytes(path, packed) as file:
        head = file.read(_HEAD)
    found = next((what for mark, what in _MARKS.items() if head.startswith(mark)), None)
    if found is None and b"\0" in head:
        found = "binary content (a zero byte)"
    if found is None and _JSON.match(head.removeprefix(BOM)):
        found = "JSON (name it .jsonl or .json; to train on JSON as text, put it into a field of rows)"
    if found is None and _PYTHON.match(head.removeprefix(BOM)):
        found = "a dict of Python (write it as JSON, and name it .jsonl)"
    has_text_name = format_of(path).kind == "text"
    if found is None and _is_table(head, field, has_text_name):
        found = f"a table with a column {field!r} (name it .csv or .tsv)"
    if found is None and not has_text_name and (names := _columns(head)):
        found = f"a table of {', '.join(names)} (name it .csv or .tsv; or .txt, to train on it as text)"
    if found is not None:
        raise ValueError(f"data: expected text in {path}, got what looks like {found}.")


def check_unicode(text: str) -> None:
    """Refuse half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"expected Unicode text, got half of a surrogate pair, \\u{ord(text[error.start]):04x}, "
            f"as character {error.start + 1}."
        ) from None


def _is_table(head: bytes, field: str, has_text_name: bool) -> bool:
    """Whether the first line names columns, `field` among them; in a .txt file one word alone does not."""
    line = head.removeprefix(BOM).partition(b"\n")[0].decode("utf-8", "replace").strip()
    for delimiter in _DELIMITERS:
        cells = [cell.strip() for cell in line.split(delimiter)]
        are_names = all(map(_COLUMN.fullmatch, cells)) and field in [cell.strip('"') for cell in cells]
        if are_names and (len(cells) > 1 or not has_text_name):
            return True
    return False


def _columns(head: bytes) -> list[str]:
    """The names in the first line, where the lines after it, two at least, have as many cells; else none."""
    text = head.removeprefix(BOM).decode("utf-8", "replace")
    lines = text.splitlines() if len(head) < _HEAD else text.splitlines()[:-1]  # the last may be cut
    for delimiter in _DELIMITERS:
        names, *rows = [row for row in csv.reader(lines[:_LINES], delimiter=delimiter) if row] or [[]]
        is_table = len(names) > 1 and len(rows) > 1 and all(len(row) == len(names) for row in rows)
        if is_table and all(map(_COLUMN.fullmatch, names)):
            return names
    return []


class _Zstandard(io.RawIOBase):
    """A .zst file, frame after frame; one that was cut short is an error, unlike with zstandard's reader."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise ValueError(
                f"data: {path} needs the package zstandard: expected it installed "
                "(pip install 'trm-hybrid[data]'), got none."
            ) from None
        self._new = lambda: zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
        self._error, self._path = zstandard.ZstdError, path
        self._file = open(path, "rb")  # noqa: SIM115  closed with this one
        self._frame: Any = None
        self._unread, self._ready = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._unread or self._file.read(2**14)
            if not packed:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._ready = self._frame.decompress(packed)
            except self._error as error:
                raise OSError(f"no zstd ({error})") from None
            self._unread = b""
            if self._frame.eof:
                self._unread, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
