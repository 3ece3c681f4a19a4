"""A griffe extension for mkdocs.yml: columns that a docstring aligns with spaces stay aligned on the site.

    name    what it is        Markdown would join such lines into one paragraph

A paragraph with such a line becomes a block of plain text. Sections that griffe parses ("Args:") stay.
"""

import re
from typing import Any

import griffe

_ALIGNED = re.compile(r"^\s*\S.*?\S {2,}\S")
_SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Attributes|Examples?|Notes?|Warns):\s*$")


class AlignedColumns(griffe.Extension):
    """Wraps paragraphs with aligned columns in a fence, object by object."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(docstring: str) -> str:
    """`docstring` with each paragraph that has aligned columns in a fence."""
    return "\n\n".join(map(_fenced, docstring.split("\n\n")))


def _fenced(paragraph: str) -> str:
    lines = paragraph.splitlines()
    if _SECTION.match(lines[0] if lines else "") or not any(map(_ALIGNED.match, lines)):
        return paragraph
    return "\n".join(["```text", *lines, "```"])
