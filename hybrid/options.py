"""Options of a command line, made from dataclasses: name, type, default and help stand in a field."""

import argparse
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal


def option(default: Any = dataclasses.MISSING, help: str = "", **more: Any) -> Any:
    """A field that is an option as well.

    more   for the option alone: `flag`, another name than the field's, or several; `shown`, what help says of
           a default; `cli_default`, where it is not the field's; `is_unset`: a namespace has only what was
           given; and what argparse takes (metavar, type, nargs, ...)
    """
    return dataclasses.field(default=default, metadata={"help": help, **more})


def add_options(parser: Any, options: type, skip: tuple[str, ...] = ()) -> None:
    """Add one option for every field of the dataclass `options` that has help, but for those in `skip`."""
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if "help" in field.metadata and field.name not in skip:
            _add_option(parser, field, hints[field.name])


def given(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """The values that `arguments` have of the fields of `options`."""
    names = [field.name for field in dataclasses.fields(options)]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _add_option(parser: Any, field: dataclasses.Field, hint: Any) -> None:
    more = dict(field.metadata)
    text, shown, is_unset = more.pop("help"), more.pop("shown", None), more.pop("is_unset", False)
    flags = more.pop("flag", flag_of(field.name))
    default = more.pop("cli_default", field.default)
    arguments = {**_type_of(hint), **more}
    if default is dataclasses.MISSING:
        arguments["required"] = True
    else:
        text = f"{text} (default: {shown or _as_text(default)})"
        arguments["default"] = argparse.SUPPRESS if is_unset else default
    flags = (flags,) if isinstance(flags, str) else flags
    parser.add_argument(*flags, dest=field.name, help=text.replace("%", "%%"), **arguments)


def _as_text(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _type_of(hint: Any) -> dict[str, Any]:
    """What argparse has to know about a field of this type."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if may_be_none := typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = kinds[0]
    if hint is bool:
        return {"action": "store_true"}
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return {"choices": choices, "type": type(choices[0])}
    if typing.get_origin(hint) in (list, tuple):
        kind = typing.get_args(hint)[0]
        return {"type": kind, "nargs": "+", "metavar": _METAVARS[kind]}
    if hint not in _METAVARS:
        return {}  # its own `type` says it
    return {"type": _or_none(hint) if may_be_none else hint, "metavar": _METAVARS[hint]}


_METAVARS = {int: "N", float: "X", str: "NAME", Path: "FOLDER"}


def _or_none(kind: type) -> Any:
    def value(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    value.__name__ = kind.__name__  # argparse names it in its errors
    return value
