"""Pages whose tables are made by a program: each stands between `<!-- table: NAME -->` and `<!-- end -->`."""

import re
from collections.abc import Callable, Mapping

TABLE = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.S)


def with_tables(text: str, tables: Mapping[str, Callable[[], str]], who: str) -> str:
    """The text with every table in it made anew.

    Args:
        text: A page in Markdown.
        tables: How each table is made, by its name.
        who: Whose pages these are, for errors.

    Raises:
        ValueError: A table has an unknown name, or a marker has no end.
    """
    if (begun := text.count("<!-- table: ")) != (found := len(TABLE.findall(text))):
        raise ValueError(f"{who}: expected an end to each of {begun} tables, got {found}.")

    def anew(block: re.Match[str]) -> str:
        if block["name"] not in tables:
            raise ValueError(f"{who}: expected one of {', '.join(tables)}, got {block['name']!r}.")
        return f"{block[1]}{tables[block['name']]()}\n{block[4]}"

    return TABLE.sub(anew, text)
