"""What a file is read as, by its name and packed or not; and what is never trained on as prose."""

import gzip
import json
from itertools import islice

import pytest

from hybrid.data.blocks import TokenBlocks
from hybrid.data.sources import Sources, documents
from hybrid.data.stream import TokenStream
from tests.support.tiny_text import character_tokenizer

TEXTS = [f'{i} and "one"\nis, {i + 1} ☃' for i in range(40)]
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def table(delimiter):
    rows = [f'{i}{delimiter}"{text.replace(chr(34), chr(34) * 2)}"\n\n' for i, text in enumerate(TEXTS)]
    return (f"id{delimiter}text\n" + "".join(rows)).encode()


CONTENTS = {
    "a.jsonl": LINES,
    "A.JSONL": LINES,
    "a.ndjson": LINES,
    "lines.json": LINES,
    "array.json": json.dumps(ROWS, ensure_ascii=False).encode(),
    "pretty.json": json.dumps(ROWS, indent=2).encode(),
    "objects.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "a.csv": table(","),
    "a.TSV": table("\t"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def packed(content, ending):
    if ending == ".gz":
        return gzip.compress(content[:100]) + gzip.compress(content[100:])
    zstandard = pytest.importorskip("zstandard", reason=".zst needs the package zstandard")
    frames = (zstandard.ZstdCompressor().compress(part) for part in (content[:100], content[100:]))
    return b"".join(frames)


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_is_read_as_what_it_is_from_any_place_on(name, ending, folder, monkeypatch):
    monkeypatch.setattr("hybrid.data.readers._PIECE", 50)
    content = CONTENTS[name]
    (folder / f"{name}{ending}").write_bytes(packed(content, ending.lower()) if ending else content)
    pieces = list(Sources([f"{name}{ending}"]).read())
    assert [piece.content for piece in pieces] == TEXTS
    assert all(piece.beside == ("id",) for piece in pieces)
    for k in (0, 1, 17, 39):
        place = json.loads(json.dumps(pieces[k].place))
        assert list(Sources([f"{name}{ending}"]).read(place)) == pieces[k:]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_packed_text(ending, folder, monkeypatch):
    monkeypatch.setattr("hybrid.data.readers._PIECE", 50)
    text = "a line of text\n" * 40
    for name in (f"a.txt{ending}", f"a{ending}"):
        (folder / name).write_bytes(packed(text.encode(), ending))
        assert list(documents([name])) == [text]


@pytest.mark.parametrize("piece", [5, 6, 7, 8, 17])
@pytest.mark.parametrize(
    "text", ["aé日𝄞bß語" * 5, "a\n\n日 b\nlonger lines\n\n\n" * 6], ids=["no lines", "lines"]
)
def test_a_long_text_comes_in_pieces_which_do_not_depend_on_where_reading_began(
    text, piece, folder, monkeypatch
):
    """A tokenizer may join what two pieces divide: a run that goes on has to see the same ones."""
    monkeypatch.setattr("hybrid.data.readers._PIECE", piece)
    (folder / "a.txt").write_text(text, encoding="utf-8")
    pieces = list(Sources(["a.txt"]).read())
    assert "".join(read.content for read in pieces) == text
    assert len(pieces) > 4
    for k, read in enumerate(pieces):
        assert list(Sources(["a.txt"]).read(read.place)) == pieces[k:]


def test_a_stream_of_a_table_goes_on_from_anywhere(folder):
    (folder / "a.csv").write_bytes(table(","))

    def some(number, at=None):
        data = TokenStream(Sources(["a.csv"]), character_tokenizer(), 8, shuffled_rows=5)
        return [(tuple(row.tokens), place) for row, place in islice(data.rows(at), number)]

    rows = some(120)
    for k in (0, 3, 30, 80):
        assert some(4, rows[k][1]) == rows[k + 1 : k + 5]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("two.jsonl", LINES + b"\xef\xbb\xbf" + LINES),
        ("a.json", CONTENTS["array.json"]),
        ("a.csv", CONTENTS["a.csv"]),
        ("a.txt", b"some text"),
        ("a.other", b"some text"),
    ],
)
def test_a_byte_order_mark_is_no_text(name, content, folder):
    (folder / name).write_bytes(b"\xef\xbb\xbf" + content)
    wanted = TEXTS * 2 if name == "two.jsonl" else ["some text"] if b"some" in content else TEXTS
    assert list(documents([name])) == wanted


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (LINES, "JSON"),
        (CONTENTS["array.json"], "JSON"),
        (CONTENTS["pretty.json"], "JSON"),
        (b"\xef\xbb\xbf" + LINES, "JSON"),
        (b'["some", "more"]', "JSON"),
        (b"{'text': 'some'}\n", "a dict of Python"),
        (b"id|text\n1|some\n", "a table with a column 'text'"),
        (b"id,text\n1,some\n", "a table with a column 'text'"),
        (b'"text"\t"label"\nsome\t1\n', "a table with a column 'text'"),
        (gzip.compress(LINES), "gzip"),
        (b"\x28\xb5\x2f\xfd....", "zstd"),
        (b"PAR1....", "parquet"),
        (b"PK\x03\x04....", "a zip archive"),
        (b"%PDF-1.7\n", "PDF"),
        (b"BZh91AY", "bzip2"),
        ("some text".encode("utf-16"), "UTF-16"),
        ("some text".encode("utf-16-le"), "binary content"),
        ("some text".encode("utf-32"), "UTF-32"),
        (b"some\0text", "binary content"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.dat", "a", "a.txt.gz"])
def test_what_looks_like_another_format_is_refused(name, content, found, folder):
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(ValueError, match=f"data: expected text in {name}, got what looks like {found}"):
        list(documents([name]))


def test_a_column_alone_is_a_title_in_a_text(folder):
    for name in ("a.txt", "a.dat"):
        (folder / name).write_text("text\nsome\nmore\n")
    assert list(documents(["a.txt"])) == ["text\nsome\nmore\n"]
    with pytest.raises(ValueError, match="a.dat, got what looks like a table with a column 'text'"):
        list(documents(["a.dat"]))


def test_a_table_of_other_columns_is_no_text_unless_its_name_says_so(folder):
    for delimiter in ",\t;|":
        table = '\ufeffidx,sentence\r\n1,some\r\n2,"more, and\r\nmore"\r\n'.replace(",", delimiter)
        for name in ("a.txt", "a.dat"):
            (folder / name).write_text(table, newline="")
        assert list(documents(["a.txt"])) == [table.removeprefix("\ufeff")]
        with pytest.raises(ValueError, match="a.dat, got what looks like a table of idx, sentence .*or .txt"):
            list(documents(["a.dat"]))


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world\nRoses, red\nViolets, blue\n",
        "one,two\nprose\nprose\n",
        '"Who?", she said.\n"I," he said.\n',
        "[[File:a.png]]\n[1] a note\n['a']\n",
        "{{cite}} {a: b}\n",
    ],
)
def test_prose_that_looks_like_no_format(text, folder):
    (folder / "a.dat").write_text(text)
    assert list(documents(["a.dat"])) == [text]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'"half \\ud83d"\n', "a.jsonl, line 1: expected text or a chat in .*'text', got str"),
        ("a.json", b'["some"]', "a.json, element 1: expected text or a chat in the field 'text', got str"),
        (
            "a.csv",
            b"id,body\n1,x\n",
            "a.csv, line 2: expected text or a chat in the field 'text', got id, body",
        ),
        ("a.csv", b"id,text\n1,x\n\n2\n", "a.csv, line 4: expected 2 cells, got 1"),
        ("a.csv", b'id,text\n1,"x\n', "a.csv, line 2: expected a row of CSV, got: unexpected end"),
        ("a.csv", b"text,text\n1,x\n", "line 1: expected names of columns, each once, got text, text"),
        ("a.csv", b"text\n", "expected text in a.csv, got an empty file"),
        ("a.csv", b"text\n\xff\n", "expected UTF-8 in a.csv, got byte 0xff at byte 5"),
        ("a.json", b"[]", "expected text in a.json, got an empty file"),
        ("a.json", b'[{"text": "x"}', "a.json, element 1: expected , or ] after it, got neither"),
        ("a.json", b'[{"text": "x"},', "a.json, element 2: expected a JSON object, got none"),
        ("a.json", b'[{"text": "x"}] {}', "expected nothing after its array, got more"),
        ("a.json", b'[{"text": "x"}, {"te', "a.json, element 2: expected a JSON object, got none"),
        ("a.json", b'{"text": "x"} prose', "a.json, element 2: expected a JSON object, got none"),
        ("a.json", b'{"text": "\xff"}', "expected UTF-8 in a.json, got byte 0xff"),
        ("a.jsonl.gz", b"no gzip", "expected a whole .gz file in a.jsonl.gz, got: Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(LINES)[:-40],
            "expected a whole .gz file in a.jsonl.gz, got: Compressed",
        ),
        (
            "a.parquet",
            b"PAR1 it is none",
            "expected a whole parquet file in a.parquet|a row that can be read",
        ),
        ("a.parquet.gz", b"", "expected parquet as it is, which packs itself, got a.parquet.gz"),
    ],
)
def test_a_file_that_is_not_what_it_says(name, content, message, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(documents([name]))


@pytest.mark.parametrize("content", [b"no zstd at all", None])
def test_a_zst_file_that_is_damaged(content, folder):
    whole = packed(LINES * 9, ".zst")
    (folder / "a.jsonl.zst").write_bytes(whole[:-9] if content is None else content)
    with pytest.raises(ValueError, match="expected a whole .zst file in a.jsonl.zst, got: "):
        list(documents(["a.jsonl.zst"]))


def test_a_zst_file_needs_a_package(folder, monkeypatch):
    (folder / "a.jsonl.zst").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"needs the package zstandard: .*pip install 'trm-hybrid\[data\]'"):
        list(documents(["a.jsonl.zst"]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "expected JSON with few levels inside each other"),
        (
            '{"text": "x", "a": ' + "[" * 200 + "]" * 200 + "}",
            "expected at most 64 levels of lists and objects",
        ),
        (
            '{"input_ids": [1, 9223372036854775808], "labels": [1, 1]}',
            "expected tokens from 0 on .* got 92233",
        ),
        (
            '{"input_ids": [1, 1], "labels": [1, 9223372036854775808]}',
            "expected tokens from 0 on .* got 92233",
        ),
        ('{"input_ids": [1, 4294967296], "labels": [1, 1]}', "expected tokens from 0 on .* got 4294967296"),
        ('{"input_ids": [1, -1], "labels": [1, 1]}', "expected tokens from 0 on .* got -1"),
        ('{"input_ids": [1, 97], "labels": [1, 1]}', "vocabulary of 97 tokens, got token 97"),
        ('{"input_ids": [1, 1], "labels": [1, 1' + "0" * 5000 + "]}", "expected a JSON object, got none"),
    ],
)
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
@pytest.mark.parametrize("workers", [0, 1])
def test_hostile_rows_are_named(line, message, ending, workers, folder):
    good = '{"input_ids": [1, 2], "labels": [1, 2]}'
    (folder / f"a{ending}").write_text(f"{good}\n{good}\n{line}\n")
    data = TokenStream(Sources([f"a{ending}"]), character_tokenizer(), 8, vocabulary=97, workers=workers)
    with pytest.raises(ValueError, match=f"a{ending}, (line|element) 3: .*{message}"):
        list(islice(data.rows(), 3))


SURROGATE = "half \\ud83d of it"


@pytest.mark.parametrize(
    "line",
    [
        f'{{"text": "{SURROGATE}"}}',
        f'{{"prompt": "{SURROGATE}", "completion": "x"}}',
        f'{{"prompt": "x", "completion": "{SURROGATE}"}}',
        f'{{"text": ["{SURROGATE}"], "answers": ["x"]}}',
        f'{{"text": ["x"], "answers": ["{SURROGATE}"]}}',
        f'{{"messages": [{{"role": "user", "content": "{SURROGATE}"}}]}}',
    ],
)
def test_half_of_a_surrogate_pair(line, folder):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    good = line.replace(SURROGATE, "\\ud83d\\ude00")
    (folder / "a.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(
        ValueError, match=r"a.jsonl, line 2: .* got half of a surrogate pair, \\ud83d, as char"
    ):
        list(islice(TokenStream(Sources(["a.jsonl"]), tokenizer, 40).rows(), 3))


def test_an_empty_parquet_shard_is_passed_over_and_said(folder):
    datasets = pytest.importorskip("datasets", reason="parquet needs the package datasets")
    for name, texts in (("a", TEXTS[:3]), ("b", []), ("c", TEXTS[3:])):
        rows = datasets.Dataset.from_dict(
            {"text": texts}, datasets.Features({"text": datasets.Value("string")})
        )
        rows.to_parquet(folder / f"{name}.parquet")
    with pytest.warns(UserWarning, match="b.parquet has no rows and is passed over"):
        assert list(documents(["*.parquet"])) == TEXTS
    (folder / "a.parquet").rename("A.Parquet")
    assert list(documents(["A.Parquet"])) == TEXTS[:3]


@pytest.mark.parametrize(
    "name",
    [
        "wikimedia/wikipedia:20231101.en",
        "wikimedia/wikipedia:20231101.en:train",
        "allenai/c4:en",
        "org/corpus.v",
        "corpus.json:x",
    ],
)
def test_a_data_set_whose_name_ends_like_a_file(name, folder, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="data sets need the package datasets")
    asked = []

    def load(*given, **more):
        asked.append(given)
        raise ValueError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=f"expected a file or a data set, got {name}"):
        next(Sources([name]).read())
    assert asked == [(name.split(":")[0], (*name.split(":"), None)[1])]


def test_a_long_text_is_tokenized_in_parts(folder, monkeypatch):
    """The same tokens, from any worker; the tokenizer never sees more than a part."""
    monkeypatch.setattr("hybrid.data.sources.LONG", 64)
    tokenizer, longest = character_tokenizer(), []

    class Watched:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, texts, **options):
            longest.append(max(map(len, texts)) if isinstance(texts, list) else len(texts))
            return tokenizer(texts, **options)

    texts = ["short", "a line of text\n" * 30, "nospace" * 40, "words " * 50, "\n" * 130]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    blocks = TokenBlocks.read(["a.jsonl"], Watched(), 5)
    assert max(longest) <= 64
    for piece in (pieces := list(Sources(["a.jsonl"]).read())):
        assert list(Sources(["a.jsonl"]).read(piece.place)) == pieces[pieces.index(piece) :]
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], 0]]
    assert [i for k in range(len(blocks)) for i in blocks[k]["input_ids"].tolist()] == ids[
        : len(ids) // 5 * 5
    ]
