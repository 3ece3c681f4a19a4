"""The options of each command as argparse has them; a typo is reported as the typo."""

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NamedTuple, NoReturn

from hybrid.cli import options
from hybrid.error_text import did_you_mean, nearest
from hybrid.options import add_options
from hybrid.training.settings import TrainSettings

_BLOCK = "the recursive block"


class Command(NamedTuple):
    """One command: the module that runs it, what it is for, an example, and what it takes."""

    module: str
    help: str
    example: str
    takes: tuple[type, ...]


COMMANDS = {
    "demo": Command(
        "demo",
        "train one from nothing in minutes, on any machine",
        "trm-hybrid demo --output demo-output",
        (options.DemoOptions, options.DemoBackendOptions),
    ),
    "train": Command(
        "train",
        "train a TRM inside a language model, or both",
        "trm-hybrid train --base meta-llama/Llama-2-7b-hf --data 'texts/*.txt' "
        "--injection-layers middle last --steps 2000 --output runs/first",
        (
            options.TrainOptions,
            TrainSettings,
            options.DataOptions,
            options.ChatOptions,
            options.HybridBaseOptions,
            options.TrustOptions,
            options.BackendOptions,
            options.BlockOptions,
        ),
    ),
    "generate": Command(
        "generate",
        "continue a prompt",
        "trm-hybrid generate --model runs/first --prompt 'Once upon a time' --num-recursion-steps 8",
        (
            options.GenerateOptions,
            options.ChatOptions,
            options.InferenceOptions,
            options.HybridBaseOptions,
            options.TrustOptions,
            options.BackendOptions,
        ),
    ),
    "eval": Command(
        "evaluate",
        "perplexity on text, or tasks of lm-eval",
        "trm-hybrid eval --model runs/first --data held-out.txt",
        (
            options.EvaluateOptions,
            options.DataOptions,
            options.ChatOptions,
            options.InferenceOptions,
            options.HybridBaseOptions,
            options.TrustOptions,
            options.BackendOptions,
        ),
    ),
    "info": Command(
        "info",
        "parameter counts by part, without loading or downloading weights",
        "trm-hybrid info --base qwen3-8b --injection-layers middle last --trm-hidden-size 1024",
        (options.BaseOptions, options.TrustOptions, options.BlockOptions),
    ),
    "plan": Command(
        "plan",
        "memory, time and money of a training, before anything is loaded or rented",
        "trm-hybrid plan --level 1 --cards 1xA100-80GB --gigabytes 1",
        (options.PlanOptions, options.BaseOptions, options.TrustOptions, options.BlockOptions),
    ),
}
# what an option was called once; it is taken, and said
_RENAMED = {"plan": {"--accumulation": "--accumulate", "--shards": "--shard", "--lora": "--lora-rank"}}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """What was typed, as a namespace of the options' fields, with `module`.

    Errors: ValueError for a typo, with what is near it, or for what argparse refuses.
    """
    words = _with_dashes(argv)
    if words and words[0] in COMMANDS:
        parser = parser_of(words[0])
        words = _check_names(words[0], words[1:], parser)
        return parser.parse_args(words)
    parser = _Parser(prog="trm-hybrid", description="A recursive block inside a frozen language model.")
    parser.add_argument("--version", action="version", version=f"trm-hybrid {_version()}")
    commands = parser.add_subparsers(required=True, metavar=" | ".join(COMMANDS))
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help)
    word = next((word for word in words if not word.startswith("-")), None)
    if word is not None and (near := _near(word, COMMANDS)):
        raise ValueError(f"invalid choice: {word!r}{did_you_mean(near)} See trm-hybrid --help")
    if word is None:
        _check_names("", words, parser)
    return parser.parse_args(words)


def parser_of(name: str) -> argparse.ArgumentParser:
    command = COMMANDS[name]
    parser = _Parser(
        prog=f"trm-hybrid {name}",
        description=f"{command.help[0].upper()}{command.help[1:]}.",
        epilog=f"example: {command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # an example can be copied
    )
    parser.set_defaults(module=command.module)
    for takes in command.takes:
        group: Any = parser
        if takes is options.BlockOptions:
            group = parser.add_argument_group(_BLOCK, "the fields of HybridConfig")
            add_options(group.add_mutually_exclusive_group(), options.WholeBlockOptions)
        add_options(group, takes)
    return parser


class _Parser(argparse.ArgumentParser):
    """Complains in one line, like everything else here, and takes no part of a name for it."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def _check_names(command: str, words: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """The words with the names of today. Errors: ValueError for the first name that there is not."""
    names = parser._option_string_actions
    checked = []
    for word in words:
        name, equals, value = word.partition("=")
        if new := _RENAMED.get(command, {}).get(name):
            print(f"trm-hybrid: {name} is called {new} now", file=sys.stderr)
            name = new
        if name.startswith("--") and len(name) > 2 and name not in names and " " not in name:
            hint = did_you_mean(_near(name, names))
            raise ValueError(f"unrecognized arguments: {name}{hint} See {parser.prog} --help")
        checked.append(name + equals + value if word.startswith("--") else word)
    if "--quantize-base" in names and "int8" in _values(checked, "--dtype"):
        raise ValueError(f"--dtype int8 is called --quantize-base int8; see {parser.prog} --help")
    return checked


def _values(words: list[str], name: str) -> list[str]:
    spelt = " ".join(words).replace(f"{name}=", f"{name} ").split()
    return [value for option, value in zip(spelt, spelt[1:], strict=False) if option == name]


def _near(word: str, names: Any) -> str | None:
    """The name most like `word`; the dashes that all options share do not count."""
    bare = {name.lstrip("-"): name for name in names}
    near = nearest(word.lstrip("-"), bare)
    return bare[near] if near else None


def _with_dashes(argv: Sequence[str]) -> list[str]:
    """--injection_layers is --injection-layers."""
    names = [(argument, *argument.partition("=")) for argument in argv]
    return [
        name.replace("_", "-") + equals + value if argument.startswith("--") else argument
        for argument, name, equals, value in names
    ]


def _version() -> str:
    try:
        return metadata.version("trm-hybrid")
    except metadata.PackageNotFoundError:
        return "(not installed)"
