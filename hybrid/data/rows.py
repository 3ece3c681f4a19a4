"""What a row of a file or a data set says: a text, a chat, or tokens with labels."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from hybrid.data.chats import Chat, chat_of, parsed_turns
from hybrid.data.formats import check_unicode
from hybrid.data.labelled import LabelledChat, LabelledRow, LabelledText, labelled_row
from hybrid.error_text import did_you_mean, nearest

LOSS_ON = ("all", "completions")
_CHATS = ("messages", "conversations")
_INSTEAD = {"text": _CHATS}  # of the default field, where a row has none
_LEVELS = 64  # of lists and objects inside each other

Content = str | Chat | LabelledRow


class RowContent(NamedTuple):
    """What is made of a row, and its other columns. A chat's template may take some of these."""

    content: Content
    beside: tuple[str, ...]


def read_row(
    row: object, field: str, loss_on: str = "all", has_nulls: bool = False, text_counts: bool = False
) -> RowContent:
    """What `row` says.

    field         holds the text or the chat; "text" may be messages or conversations as well
    loss_on       "completions": of a chat what the assistant says is learned; of rows that bring their
                  labels only those of prompt and completion will do
    has_nulls     a column or a key that a row does not have came as null, as from parquet
    text_counts   with "completions" a text will do as well

    Errors: ValueError, without the place, for a row that says nothing of this kind, or is no text.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected text or a chat in the field {field!r}, got {type(row).__name__}.")
    _check_levels(row)
    if has_nulls:
        row = {name: value for name, value in row.items() if value is not None}
    content, used = _content(row, field, has_nulls)
    if loss_on == "completions" and not (text_counts and isinstance(content, str)):
        content = _completion(content)
    for text in _texts(content):
        check_unicode(text)
    return RowContent(content, tuple(str(name) for name in row if name not in used))


def _content(row: dict[str, Any], field: str, has_nulls: bool) -> tuple[Content, set[str]]:
    if (found := labelled_row(row, field)) is not None:
        return found
    names = (field, *_INSTEAD.get(field, ()))
    name = next((name for name in names if row.get(name) is not None), field)
    value = row.get(name)
    if isinstance(value, str) and name in _CHATS:
        value = parsed_turns(value)
    if isinstance(value, str):
        return value, {name}
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        others = {key: other for key, other in row.items() if key != name}
        return chat_of(value, others, has_nulls), {name}
    got = f"{value!r:.40}" if name in row else ", ".join(map(str, row)) or "no fields"
    missing = [] if name in row else list(map(str, row))
    near = next((near for key in missing if (near := nearest(key, names, cutoff=0.8))), None)
    other = " Another field: --field, or field=." if missing and near is None else ""
    raise ValueError(f"expected text or a chat in the field {name!r}, got {got}{did_you_mean(near)}{other}")


def _completion(content: Content) -> Content:
    if isinstance(content, Chat):
        return LabelledChat(content)
    if isinstance(content, LabelledText) and content.closes:
        return content
    what = "a text" if isinstance(content, str) else "labels of its own"
    raise ValueError(
        f"expected a chat, or prompt and completion, for a loss on completions (--loss-on), got {what}."
    )


def _texts(content: Content) -> Iterator[str]:
    """Those that stand in the row; a chat's is known once its template has rendered it."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, LabelledText):
        yield from content.parts
        yield from (answer for answer in content.answers if answer is not None)


def _check_levels(value: Any, levels: int = _LEVELS) -> None:
    if not levels:
        raise ValueError(f"expected at most {_LEVELS} levels of lists and objects, got more.")
    inside = value.values() if isinstance(value, dict) else value
    for part in inside:
        if isinstance(part, list | dict):
            _check_levels(part, levels - 1)
