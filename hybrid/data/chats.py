"""Chats: what a row says, and the text that a tokenizer's template makes of it.

What the template renders is what is trained on: nothing is put before it, and no end after it.
"""

import functools
import inspect
import json
import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hybrid.data.formats import check_unicode
from hybrid.error_text import did_you_mean, first_line, nearest

# ShareGPT's names of who speaks, as templates know them
_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_USUAL = ("assistant", "system", "user", "tool", "developer", "function")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKS = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_KWARGS = "chat_template_kwargs"  # a column whose keys are handed to the template
_OURS = {"messages", "chat_template", "add_generation_prompt", "raise_exception", "strftime_now"}
# arguments of apply_chat_template that are not the template's
_NOT_A_ROWS = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "kwargs",
}
# transformers compiles a template once and notes in it what is marked, which two threads would mix up
_RENDERING = threading.Lock()
if hasattr(os, "register_at_fork"):  # no process is forked in the middle of it: a child could not end it
    os.register_at_fork(
        before=_RENDERING.acquire, after_in_parent=_RENDERING.release, after_in_child=_RENDERING.release
    )
_LONGEST_MARKED = 2**22  # characters of a chat whose completions are looked for: 1 GB of memory


@dataclass(frozen=True)
class Chat:
    """turns: {"role", "content", ...} each; others: the row's other columns, for the template."""

    turns: list[dict[str, Any]]
    others: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Characters, about."""
        return sum(len(value) for turn in self.turns for value in turn.values() if isinstance(value, str))


def chat_of(turns: list[dict[str, Any]], others: dict[str, Any], has_nulls: bool) -> Chat:
    """The chat in a row; see rows.py. A turn's key that is null is left out, as transformers 5.23 does.

    Errors: ValueError for a turn of neither form, or in ShareGPT's whose speaker nobody knows.
    """
    turns = [_turn(turn) for turn in turns]
    if has_nulls:
        return Chat(_without_nulls(turns), _without_nulls(others))
    return Chat([{key: value for key, value in turn.items() if value is not None} for turn in turns], others)


def parsed_turns(text: str) -> Any:
    """The list of objects that `text` is in JSON, as a table's cell holds a chat; else `text`."""
    try:
        value = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return text
    is_list = isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
    return value if is_list else text


def render(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a chat.

    Errors: ValueError when there is no template, when it refuses the chat or renders nothing, and for a role
    with a slip.
    """
    _check_roles(chat, _template(tokenizer, chat))
    text = str(_applied(chat, tokenizer, tokenize=False))
    check_unicode(text)
    if not text.strip():
        raise ValueError("expected text from the tokenizer's chat template, got nothing for this chat.")
    return text


def prompt_of_chat(text: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """{"input_ids", "attention_mask"} [1, T] int64 of `text` as a user's turn, and how an answer begins.

    Errors: ValueError as of render.
    """
    check_unicode(text)
    chat = Chat([{"role": "user", "content": text}])
    render(chat, tokenizer)
    found = _applied(chat, tokenizer, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def read_template(path: Path) -> str:
    """The chat template in a file.

    Errors: ValueError for a file that cannot be read, is not UTF-8 or no Jinja, or reads no `messages`.
    """
    try:
        template = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a chat template in {path}, got no text ({error}).") from None
    if "messages" not in _variables(template):
        raise ValueError(f"expected a chat template in {path}, got one that does not read `messages`.")
    return template


def render_marked(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """(tokens of a chat, 1 for each that the assistant says and 0 for others), by the template's marks.

    Errors: ValueError as of render, and for a template without marks.
    """
    if not _GENERATION.search(_template(tokenizer, chat)):
        raise ValueError(
            "expected a chat template that marks what the assistant says with {% generation %} and "
            "{% endgeneration %}, for a loss on completions, got one without: put the marks around it in a "
            "file for --chat-template, or use rows of prompt and completion."
        )
    if len(text := render(chat, tokenizer)) > _LONGEST_MARKED:
        raise ValueError(
            f"expected a chat of at most {_LONGEST_MARKED} characters for a loss on completions, "
            f"got {len(text)}."
        )
    found = _applied(chat, tokenizer, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = list(found["input_ids"]), list(found["assistant_masks"])
    said = [token for token, counts in zip(ids, mask, strict=True) if counts]
    if not str(tokenizer.decode(said, skip_special_tokens=True)).strip():  # no more than an end of the turn
        roles = ", ".join(dict.fromkeys(turn["role"] for turn in chat.turns))
        raise ValueError(
            f"expected a chat in which the assistant says something, got turns of {roles}, and nothing said."
        )
    return ids, mask


def taken(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The names of columns that the tokenizer's chat template takes beside the messages."""
    templates = tokenizer.chat_template or ()
    templates = templates.values() if isinstance(templates, dict) else [templates] if templates else ()
    names = {name for template in templates for name in _variables(template)}
    return (names | {_KWARGS}) - _OURS - set(tokenizer.special_tokens_map) if names else set()


@functools.lru_cache(16)
def _variables(template: str) -> frozenset[str]:
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(_MARKS.sub("", template))))
    except jinja2.TemplateError as error:
        raise ValueError(f"expected a chat template of Jinja, got one that it refuses ({error}).") from None


def _template(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "expected a tokenizer with a chat template for a chat, got one without; --chat-template gives it "
            "one."
        )
    return tokenizer.get_chat_template(tools=chat.others.get("tools"))


def _applied(chat: Chat, tokenizer: PreTrainedTokenizerBase, **how: Any) -> Any:
    """What apply_chat_template gives. Errors: ValueError where the template refuses the chat."""
    given = _arguments(tokenizer, chat)
    try:
        with _RENDERING:
            return tokenizer.apply_chat_template(chat.turns, **how, **given)
    except Exception as error:  # whatever the template's author lets it raise
        raise _refused(error) from error


def _arguments(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> dict[str, Any]:
    """What is handed to the template beside the messages."""
    names = taken(tokenizer)
    given = {name: value for name, value in chat.others.items() if name in names and value is not None}
    for name in ("tools", "documents", _KWARGS):
        if isinstance(given.get(name), str):  # in columns of one type, what differs from row to row is text
            given[name] = _parsed(name, given[name])
    more = given.pop(_KWARGS, None) or {}
    if not isinstance(more, dict) or (ours := _NOT_A_ROWS & more.keys()):
        got = f"{', '.join(sorted(ours))} in it" if isinstance(more, dict) else type(more).__name__
        raise ValueError(f"expected variables of the chat template in {_KWARGS}, got {got}.")
    return given | more


def _parsed(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"expected JSON in the column {name!r}, got {text!r:.40}.") from None


def _refused(error: Exception) -> ValueError:
    why = first_line(error)
    return ValueError(f"expected a chat that the tokenizer's template takes, got one it refuses ({why}).")


def _check_roles(chat: Chat, template: str) -> None:
    """A role nearly one of the usual is a slip, but where the template names it."""
    for role in {turn["role"] for turn in chat.turns}.difference(_USUAL):
        is_named = f"'{role}'" in template or f'"{role}"' in template or not role.isalpha()
        if not is_named and (near := nearest(role.lower(), _USUAL, cutoff=0.8)):
            raise ValueError(f"expected a turn's role, got {role!r}{did_you_mean(near)}")


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    """{"role", "content", ...} of a turn in either form."""
    if isinstance(turn.get("role"), str):
        return turn
    if "from" not in turn or "value" not in turn:
        raise ValueError(f"expected a turn to have role, or from and value, got {', '.join(map(str, turn))}.")
    name = str(turn["from"])
    if name.lower() not in _ROLES:
        raise ValueError(f"expected a turn to be from {', '.join(_ROLES)}, got {turn['from']!r}.")
    return {"role": _ROLES[name.lower()], "content": turn["value"]}


def _without_nulls(value: Any) -> Any:
    """Parquet and Arrow give every row all keys: what is null was not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
