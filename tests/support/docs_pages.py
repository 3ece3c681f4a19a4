"""The pages of the documentation as tests read them: blocks of Python, lines of shell, links, anchors."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# `<!-- not run: reason -->` before a block of Python that cannot run in a test
_NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+?) -->")
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")  # of text or of a picture
_SHELL = ("", "sh", "bash", "shell")
_OF_OTHERS = ("tests/test_decoder_models.py",)  # PEFT's
_FOLDERS = ("trm_kernels", "hybrid", "bench", "examples", "tools", "native", "tests", "docs")


class Block(NamedTuple):
    """A fenced block of Python; `not_run` is why it cannot run here, None where it can."""

    code: str
    line: int
    not_run: str | None


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> list[Block]:
    """The ```python blocks of a page, in order."""
    blocks, before = [], None
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence" and token.info.strip() == "python":
            marked = _NOT_RUN.search(before.content) if before and before.type == "html_block" else None
            assert token.map is not None
            blocks.append(Block(token.content, token.map[0] + 2, marked["reason"] if marked else None))
        before = token
    return blocks


def commands(page: Path) -> Iterator[list[str]]:
    """The lines of a page's shell blocks as words: indented code, and fences of shell or no language.

    Comments and variables before a command are dropped. Lines that no shell can read are no commands.
    """
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "code_block" or (token.type == "fence" and token.info.strip() in _SHELL):
            for line in token.content.replace("\\\n", " ").splitlines():
                for part in line.split(";"):
                    try:
                        words = shlex.split(part, comments=True)
                    except ValueError:
                        continue
                    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                        words = words[1:]
                    if words:
                        yield words


def links(page: Path) -> Iterator[tuple[str, str]]:
    """(path, anchor) of each link of a page to a file or a heading here; either may be empty."""
    without_code = re.sub(r"```.*?```|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.S)
    for found in _LINK.finditer(without_code):
        if not re.match(r"[a-z]+:", found["target"]):
            path, _, anchor = found["target"].partition("#")
            yield path, anchor


def paths(page: Path) -> Iterator[str]:
    """Files of this repository that a page names in `code`, with a folder: `hybrid/config.py`."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|json|toml|md|yaml|h|c))`", text):
        if name.split("/")[0] in _FOLDERS and name not in _OF_OTHERS:
            yield name


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs and code hosts make them."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", text.lower()).strip()) for text in headings}
