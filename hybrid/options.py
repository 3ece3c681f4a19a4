"""HybridConfig on the command line: every field under its own name, a JSON file, or a preset."""

import argparse
import inspect
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

from hybrid.config import HybridConfig, trm_fields
from hybrid.presets import PresetConfigs

PRESETS = dict(inspect.getmembers(PresetConfigs, inspect.isfunction))


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """--preset or --config, and one option for every field; a field that is given wins over both."""
    group = parser.add_argument_group("the recursive block", "the fields of HybridConfig")
    whole = group.add_mutually_exclusive_group()
    whole.add_argument("--preset", choices=PRESETS, help="one of the levels")
    whole.add_argument("--config", type=Path, metavar="FILE", help="a JSON object of the fields below")
    hints, meanings = typing.get_type_hints(HybridConfig.__init__), _meanings()
    for name in trm_fields():
        group.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            help=meanings[name].replace("%", "%%"),
            **_type_of(hints[name]),
        )


def given_fields(arguments: argparse.Namespace) -> list[str]:
    """The options that say something about the block: fields, --preset and --config."""
    whole = [name for name in ("preset", "config") if getattr(arguments, name) is not None]
    return whole + [name for name in trm_fields() if hasattr(arguments, name)]


def config_of(arguments: argparse.Namespace) -> HybridConfig:
    """The config that the options make.

    Errors: ValueError for what cannot be combined, a field that there is not, a file that is no JSON object.
    """
    fields: dict[str, Any] = {}
    if arguments.preset is not None:
        preset = PRESETS[arguments.preset]()
        fields = {name: getattr(preset, name) for name in trm_fields()}
    elif arguments.config is not None:
        fields = _read(arguments.config)
    fields |= {name: getattr(arguments, name) for name in trm_fields() if hasattr(arguments, name)}
    return HybridConfig(**fields)


def _read(path: Path) -> dict[str, Any]:
    """The fields in a JSON file; of a saved hybrid's config.json, those that are about the block."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected a JSON object with fields of HybridConfig, got none ({error})."
        ) from None
    if not isinstance(fields, dict):
        raise ValueError(
            f"{path}: expected a JSON object with fields of HybridConfig, got {type(fields).__name__}."
        )
    if fields.get("model_type") == HybridConfig.model_type:
        return {name: fields[name] for name in trm_fields() if name in fields}
    if others := [name for name in fields if name not in trm_fields()]:
        raise ValueError(
            f"{path}: expected fields of HybridConfig ({', '.join(trm_fields())}), got {others[0]}."
        )
    return fields


def _type_of(hint: Any) -> dict[str, Any]:
    """What argparse has to know about a field of this type."""
    if hint == list[int] | None:
        return {"type": int, "nargs": "+", "metavar": "N"}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if hint == str | None:
        return {"type": _name_or_none, "metavar": "NAME"}
    if isinstance(hint, types.UnionType):
        return {"type": _whole_number_or_none, "metavar": "N"}
    return {"type": hint, "metavar": {int: "N", float: "X", str: "NAME"}[hint]}


def _whole_number_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _name_or_none(text: str) -> str | None:
    return None if text.lower() == "none" else text


def _meanings() -> dict[str, str]:
    """Each field's line in HybridConfig's docstring."""
    doc = inspect.cleandoc(HybridConfig.__doc__ or "")
    found = re.findall(r"^(\w+) {2,}(.+(?:\n {4,}.+)*)", doc, flags=re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in found}
