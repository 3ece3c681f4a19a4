"""The gate over what is counted: it passes, it fails when a slip is planted, and docs/ are up to date."""

import pytest
import torch

from bench import static
from bench.__main__ import main
from bench.report import picture, tables
from hybrid.demo.marked_tables import TABLE
from tests.support.pinned import on_record_with
from trm_kernels.recursion import fused_layer, fused_recursion
from trm_kernels.runtime import gemm_common
from trm_kernels.runtime.backend import interpreting

pytestmark = pytest.mark.skipif(interpreting(), reason="counts only, which needs no interpreter")

# torch.compile's launches wait for a C++ compiler: `python -m bench static --check` counts them too
QUICK = {"launches": False, "decode": True, "saved": True, "parameters": True}


@pytest.mark.parametrize("name", static.COUNTS)
def test_nothing_got_worse(name):
    if name == "launches" and not gemm_common._ADDMM_KNOWS_SHAPES:
        pytest.skip("this torch's sums of products in float32 are two calls where there are only shapes")
    found = static.check(name, static.load(name), static.COUNTS[name](QUICK[name]))
    assert not found, "\n".join([*found, "If this is meant: `make static` writes the files anew."])


def plant_a_launch(monkeypatch):
    """One kernel more for each evaluation: the residual's, twice."""
    fill = fused_layer.fill_linear_residual

    def twice(*args):
        fill(*args)
        fill(*args)

    monkeypatch.setattr(fused_layer, "fill_linear_residual", twice)


def test_more_launches_are_seen(monkeypatch):
    plant_a_launch(monkeypatch)
    found = static.check("launches", static.load("launches"), static.count_launches(with_compiled=False))
    assert "launches: ours, save=all, evaluation: 6 -> 8, WORSE" in found
    assert not any("eager" in line for line in found)


def test_more_bytes_are_seen(monkeypatch):
    """A policy that keeps what it need not."""
    kept = fused_recursion.SavedF
    monkeypatch.setattr(
        fused_recursion, "SavedF", lambda h2, inner: kept([*h2, torch.empty_like(h2[0])], inner)
    )
    found = static.check("saved", static.load("saved"), static.count_saved(with_compiled=False))
    assert any(line.startswith("saved: ours, save=layer") and line.endswith("WORSE") for line in found), found


def test_a_spill_is_seen():
    old = static.load("resources")["kernels"]["sm90"]["linear_swiglu"]
    kernel, (registers, _, shared, fingerprint) = next(iter(old.items()))
    new = old | {kernel: [registers - 8, 16, shared, fingerprint]}
    assert static.changes(old, new) == [
        f"{kernel} [0]: {registers} -> {registers - 8}, better",
        f"{kernel} [1]: 0 -> 16, WORSE",
    ]


def test_what_appears_and_disappears_is_seen():
    assert static.changes({"a": 1, "b": [1]}, {"b": [1, 2], "c": 3}) == [
        "a: 1 -> None, changed",
        "b: [1] -> [1, 2], changed",
        "c: None -> 3, changed",
    ]


def test_eager_of_another_torch_is_not_compared():
    old = {"torch": "2.0.0", "columns": ["a"], "rows": {static.EAGER: [1], "ours": [1]}}
    new = {"torch": "2.1.0", "columns": ["a"], "rows": {static.EAGER: [2], "ours": [2]}}
    assert static.check("launches", old, new) == ["launches: ours, a: 1 -> 2, WORSE"]
    assert len(static.check("launches", old, new | {"torch": "2.0.0"})) == 2


def test_files_are_written_as_they_are_kept(tmp_path):
    for name in static.COUNTS:
        static.write(name, static.load(name), tmp_path)
        assert (tmp_path / f"{name}.json").read_text() == (static.FOLDER / f"{name}.json").read_text()


def test_the_command_checks(monkeypatch, capsys):
    old = static.load("parameters")
    rows = {name: [base, trm + 1] for name, (base, trm) in old["rows"].items()}
    monkeypatch.setattr(static, "COUNTS", {"parameters": lambda with_compiled: old | {"rows": rows}})
    assert main(["static", "--check"]) == 1
    assert "llama_2_7b_level1, TRM: 239083520 -> 239083521, WORSE" in capsys.readouterr().out


def test_every_table_stands_on_a_page():
    shown = {found["name"] for page in tables.PAGES for found in TABLE.finditer(page.read_text())}
    assert shown == set(tables.TABLES)


PLANNED = {tables.DOCS / "planner.md", *tables.LEVEL_PAGES.values()}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=on_record_with("transformers") if page in PLANNED else ())
        for page in tables.PAGES
    ],
)
def test_the_pages_tables_are_those_of_the_files(page):
    text = page.read_text(encoding="utf-8")
    assert tables.rewritten(text) == text, "stale: `python -m bench tables` writes them anew"


@pytest.mark.parametrize("level", tables.LEVEL_PAGES)
def test_the_levels_pages_have_the_plan_of_both_phases(level):
    text = tables.LEVEL_PAGES[level].read_text(encoding="utf-8")
    assert f"trm-hybrid plan --level {level} --phase 2" in text


def test_a_table_is_rewritten_between_its_markers(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- table: parameters -->\nold\n<!-- end -->\nafter\n")
    assert tables.rewrite(path) and not tables.rewrite(path)
    first, *body, last = path.read_text().splitlines()
    assert (first, last) == ("before", "after")
    assert body[1] == "| preset | base | TRM | together |"
    assert body[3].startswith("| `llama_2_7b_level1` | 6,738,415,616 | 239,083,520 |")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<!-- table: speed -->\n<!-- end -->", "expected one of .*launches.*, got 'speed'"),
        ("<!-- table: launches -->\n", "expected an end to each of 1 tables, got 0"),
    ],
)
def test_refuses_tables(text, says):
    with pytest.raises(ValueError, match=says):
        tables.rewritten(text)


def test_the_picture_shows_what_is_counted(tmp_path):
    columns, rows = picture.columns(), static.load("launches")["rows"]
    assert len(columns) == rows["ours, save=all"][0]
    # r is added for the first layer of an f only: half an operator an evaluation, with two layers
    assert sum(len(column.eager) for column in columns) - 0.5 == rows[static.EAGER][0]
    picture.draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
