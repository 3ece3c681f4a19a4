"""README and docs/: short, whole, and true of the code: links, commands, messages, walks, public names."""

import ast
import importlib.util
import logging
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hybrid.cli.parser import COMMANDS, parse, parser_of
from tests.support.docs_pages import DOCS, PAGES, ROOT, anchors, commands, links, name_of, paths
from tools import docs_site

HAS_GRIFFE = importlib.util.find_spec("griffe") is not None
HAS_MKDOCS = importlib.util.find_spec("material") is not None


def test_the_readme_is_short_and_names_the_two_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert {"make demo", "make test"} <= {" ".join(words[:2]) for words in commands(ROOT / "README.md")}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "native/README.md"], ids=name_of)
def test_links_lead_somewhere(page):
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {path}, which is not there"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)}: {path or page.name} has no heading #{anchor}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_files_that_are_named_are_there(page):
    assert [path for path in paths(page) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_those_that_there_are(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for words in commands(page):
        if words[0] == "make":
            wrong = [word for word in words[1:] if "=" not in word and word not in targets]
            assert not wrong, f"{name_of(page)}: make has no target {wrong[0]}"
        elif (argv := trm_hybrid_arguments(words)) is not None:
            check_options(argv, f"{name_of(page)}: {' '.join(words)}")
        elif words[:2] == ["python", "-m"] and not words[2].startswith(("evidence", "vllm")):  # of others
            assert importlib.util.find_spec(words[2]), f"{name_of(page)}: there is no module {words[2]}"
        elif words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).exists(), f"{name_of(page)}: there is no {words[1]}"


def trm_hybrid_arguments(words):
    """What follows `trm-hybrid`, or `-m hybrid` of a launcher; None for other commands."""
    if words[0] == "trm-hybrid":
        return words[1:]
    at = [i for i in range(1, len(words)) if words[i - 1 : i + 1] == ["-m", "hybrid"]]
    return words[at[0] + 1 :] if at else None


def check_options(argv, where):
    """All that is typed parses; of a line with `...` every option is one of its command."""
    try:
        if "..." not in argv:
            parse(argv)
            return
        assert argv[0] in COMMANDS, f"{where}: there is no command {argv[0]}"
        known = parser_of(argv[0])._option_string_actions
        wrong = [word for word in argv if word.startswith("--") and word not in known]
        assert not wrong, f"{where}: there is no option {wrong[0]}"
    except ValueError as error:
        pytest.fail(f"{where}: {error}")


def test_a_wrong_option_is_found():
    with pytest.raises(pytest.fail.Exception, match="--stepps"):
        check_options(["train", "--base", "b", "--data", "d", "--output", "o", "--stepps", "3"], "page")
    with pytest.raises(AssertionError, match="--stepps"):
        check_options(["train", "...", "--stepps", "3"], "page")


@pytest.fixture(scope="module")
def messages():
    """Every text in the code that may be a message, `…` in place of what is filled in."""
    found = set()
    for package in ("hybrid", "trm_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.add("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return found


def quoted_messages():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `(.+?)` \|", text, re.M)


def test_troubleshooting_has_many_messages():
    assert len(quoted_messages()) > 40


@pytest.mark.parametrize("message", quoted_messages())
def test_messages_of_troubleshooting_are_those_of_the_code(message, messages):
    assert any(message.rstrip("….") in text for text in messages), f"no text in the code has: {message}"


def walks():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    return re.findall(r"<!-- walk: (\d+) -->\n(.*?)<!-- end of walk -->", text, re.S)


@pytest.mark.parametrize(("most", "table"), walks())
def test_the_walks_take_few_files_that_there_are(most, table):
    files = re.findall(r"`([\w/]+\.py)`", table)
    assert 1 < len(set(files)) <= int(most)
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_there_are_two_walks():
    assert [most for most, _ in walks()] == ["8", "7"]


@pytest.mark.skipif(not HAS_GRIFFE, reason="griffe is in the extra docs")
def test_every_public_name_is_documented(tmp_path):
    assert list(docs_site.undocumented()) == []
    for page in (DOCS / "api").iterdir():
        entries = page.read_text(encoding="utf-8").replace("::: hybrid.Halting\n", "")
        (tmp_path / page.name).write_text(entries, encoding="utf-8")
    assert [problem.split()[0] for problem in docs_site.undocumented(tmp_path)] == ["hybrid.Halting"]


def test_links_out_of_docs_become_names_and_broken_ones_are_said(caplog):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="decisions/input-norm.md"))
    text = "[the map](../../CONTRIBUTING.md#the-house), [x](../files.md), [gone.py](../../hybrid/gone.py)"
    with caplog.at_level(logging.WARNING):
        named = docs_site.on_page_markdown(text, page)
    assert named == "the map, [x](../files.md), `gone.py`"
    assert [record.getMessage() for record in caplog.records] == [
        "decisions/input-norm.md links to ../../hybrid/gone.py, which is not there"
    ]


def test_aligned_columns_of_docstrings_stay_aligned():
    pytest.importorskip("griffe", reason="griffe is in the extra docs")
    from tools.docstrings import fenced

    prose, columns = "One line.", "name    what it is\n        and more"
    arguments = "Args:\n    x: one  two"
    assert fenced(f"{prose}\n\n{columns}\n\n{arguments}") == (
        f"{prose}\n\n```text\n{columns}\n```\n\n{arguments}"
    )


@pytest.mark.slow  # `make docs`, which CI runs, builds the same
@pytest.mark.skipif(not HAS_MKDOCS, reason="mkdocs-material is in the extra docs")
def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "recursion_sampling" in (tmp_path / "api/hybrid/index.html").read_text(encoding="utf-8")
