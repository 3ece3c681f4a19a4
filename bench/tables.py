"""The README's tables, made from bench/results/**: no number there that is not in a file here.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; `python -m bench tables` writes all anew.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench import static

README = Path(__file__).parents[1] / "README.md"

_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.S)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, numbers to the right."""
    lines = [f"| {' | '.join(columns)} |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def number(value: float) -> str:
    """With commas, and a fraction only where there is one."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def launches() -> str:
    figures = static.load("launches")
    rows = [[name, *map(number, row)] for name, row in figures["rows"].items()]
    return markdown(("kernels started by", *figures["columns"]), rows)


def saved_bytes() -> str:
    figures = static.load("saved")
    most = figures["rows"][static.EAGER][0]
    rows = [[name, number(row[0]), f"1/{most / row[0]:.1f}"] for name, row in figures["rows"].items()]
    return markdown(("kept for backward", "bytes per token and evaluation", "of eager's"), rows)


def parameters() -> str:
    figures = static.load("parameters")
    rows = [
        [f"`{name}`", number(base), number(trm), number(base + trm)]
        for name, (base, trm) in figures["rows"].items()
    ]
    return markdown(("preset", "base", "TRM", "together"), rows)


def resources() -> str:
    """The most that any kernel takes, a row each architecture."""
    rows = []
    for arch, cases in static.load("resources")["kernels"].items():
        used = [figures for kernels in cases.values() for figures in kernels.values()]
        registers, stack, shared = (max(column) for column in zip(*used, strict=True))
        rows.append([arch, number(len(used)), number(registers), number(stack), number(shared)])
    columns = (
        "architecture",
        "kernels",
        "registers a thread",
        "stack, bytes a thread",
        "shared, bytes a block",
    )
    return markdown(columns, rows)


TABLES: dict[str, Callable[[], str]] = {
    "launches": launches,
    "saved-bytes": saved_bytes,
    "parameters": parameters,
    "resources": resources,
}


def rewritten(text: str) -> str:
    """The text with every table in it made anew.

    Errors: ValueError for a table of an unknown name, and for a marker without its end.
    """
    if (begun := text.count("<!-- table: ")) != (found := len(_BLOCK.findall(text))):
        raise ValueError(f"README tables: expected an end to each of {begun} tables, got {found}.")

    def table(block: re.Match[str]) -> str:
        if block["name"] not in TABLES:
            raise ValueError(f"README tables: expected one of {', '.join(TABLES)}, got {block['name']!r}.")
        return f"{block[1]}{TABLES[block['name']]()}\n{block[4]}"

    return _BLOCK.sub(table, text)


def rewrite(path: Path = README) -> bool:
    """Whether the file changed."""
    old = path.read_text(encoding="utf-8")
    new = rewritten(old)
    if new != old:
        path.write_text(new, encoding="utf-8")
    return new != old
