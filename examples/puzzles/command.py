"""data | train | evaluate | pictures: parses, calls, prints"""

import argparse
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import puzzle_folder
from safetensors import SafetensorError

from puzzles import arc, evaluation, mazes, packages, pictures
from puzzles.layout import Split, read
from puzzles.run import Run, train, trained_model
from puzzles.settings import PAPERS, Settings

_HELP = {
    "recursion_curriculum": "FIRST:STEPS: begin at n FIRST, or n and T FIRSTxT; all after STEPS steps",
    "mlp_t": "cells are mixed by an MLP, not by attention",
}


# settings that not every kind of data has, and what they are unless they are given
_USUAL = {"augmentations": 10, "side": 30, "shortest": 8, "version": "1", "rules": None}
_HAS = {
    "arc": {"augmentations", "side", "version"},
    "arc1d": {"augmentations", "side", "rules"},
    "maze": {"side", "shortest"},
    "4x4": {"augmentations"},
    "9x9": {"augmentations"},
}
_COUNTS = {"train": 1000, "test": 100}  # tasks or puzzles, unless they are given; of ARC-AGI at most all
# a maze has walls around a start and a goal; rows of ARC-1D are drawn from 10 cells on
_LEAST_SIDE = {"arc": 2, "arc1d": 10, "maze": 4, "4x4": 0, "9x9": 0}


def _data(given: argparse.Namespace) -> None:
    for name, usual in _USUAL.items():
        if getattr(given, name) is None:
            setattr(given, name, usual)
        elif name not in _HAS[given.kind]:
            raise ValueError(f"--{name}: expected a setting of {given.kind}, which has no such thing.")
    for name, usual in _COUNTS.items():
        if getattr(given, name) is None and given.kind != "arc":  # which has a number of tasks of its own
            setattr(given, name, usual)
    least = {"train": 1, "test": 1, "rules": 1, "side": _LEAST_SIDE[given.kind], "shortest": 1}
    for name, fewest in (least | {"augmentations": 0, "seed": 0}).items():
        if (value := getattr(given, name)) is not None and value < fewest:
            raise ValueError(f"--{name}: expected at least {fewest}, got {value}.")
    puzzle_folder.check_empty(given.folder)
    _MAKERS[given.kind](given)
    counts = ((split, len(read(given.folder, split).inputs)) for split in ("train", "test"))
    print(f"{given.folder}: " + ", ".join(f"{count:,} examples to {split}" for split, count in counts))


def _make_arc(given: argparse.Namespace) -> None:
    """Tasks with larger grids are left out; those to test are of the evaluation set."""
    size = (given.side, given.side)
    sets = [
        {name: task for name, task in tasks.items() if arc.fits(task, size)}
        for tasks in packages.arc_tasks(given.version)
    ]
    for name, tasks in zip(_COUNTS, sets, strict=True):
        if (count := getattr(given, name)) is not None and count > len(tasks):
            raise ValueError(
                f"--{name}: expected at most {len(tasks)}, the tasks with grids of up to "
                f"{given.side}x{given.side}, got {count}."
            )
    learned, tested = (
        dict(list(tasks.items())[: getattr(given, name) or _COUNTS[name]])
        for name, tasks in zip(_COUNTS, sets, strict=True)
    )
    arc.make(given.folder, learned, tested, given.augmentations, size, given.seed)


def _make_arc1d(given: argparse.Namespace) -> None:
    """Tasks of a few examples; or, with --rules, a task a rule, with --train and --test examples."""
    learned, together = {}, None
    if given.rules is None:
        tasks = list(packages.arc1d_tasks(given.train + given.test, given.seed, given.side).items())
        learned, tested = dict(tasks[: given.train]), dict(tasks[given.train :])
    else:
        tested = packages.arc1d_rules(given.rules, given.train, given.test, given.seed, given.side)
        together = 4  # a batch of all examples of one rule would teach that rule alone
    size = (1, given.side)
    arc.make(given.folder, learned, tested, given.augmentations, size, given.seed, together)


def _make_maze(given: argparse.Namespace) -> None:
    mazes.make(given.folder, given.train, given.test, given.side, given.shortest, given.seed)


def _make_sudoku(given: argparse.Namespace) -> None:
    puzzle_folder.make(given.folder, given.kind, given.train, given.test, given.augmentations, given.seed)


_MAKERS: dict[str, Callable[[argparse.Namespace], None]] = {
    "arc": _make_arc,
    "arc1d": _make_arc1d,
    "maze": _make_maze,
    "4x4": _make_sudoku,
    "9x9": _make_sudoku,
}


def _train(given: argparse.Namespace) -> None:
    chosen = {
        field.name: value for field in fields(Settings) if (value := getattr(given, field.name)) is not None
    }
    if given.save_every < 1:
        raise ValueError(f"--save-every: expected at least 1, got {given.save_every}.")
    if not 0 <= given.seed < 1 << 63:
        raise ValueError(f"--seed: expected a number from 0 to below 2^63, got {given.seed}.")
    if given.run.resolve() == given.data.resolve():
        raise ValueError(f"{given.run}: expected a folder of the run's own, got that of its puzzles.")
    split = read(given.data, "train")
    settings = replace(PAPERS[split.what], **chosen)
    checkpoint = given.checkpoint and given.checkpoint.resolve()
    run = Run(given.data.resolve(), split.digest(), split.kind, settings, given.seed, checkpoint)
    train(run, split, given.run, given.save_every)


def _answers(given: argparse.Namespace) -> tuple[Split, evaluation.Answers, Path]:
    """(what was tested, the answers, its folder)."""
    for name in ("rows", "most", "each"):
        if (value := getattr(given, name, None)) is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1, got {value}.")
    run = Run.read(given.run)
    data = given.data or run.data
    split = _tested(run, data).first(given.most)
    model, steps = trained_model(given.run, split), run.settings.supervision_steps
    return split, evaluation.answered(model, split, steps, given.rows), data


def _tested(run: Run, data: Path) -> Split:
    """What is to test in `data`. Errors: ValueError for puzzles that the run cannot know."""
    split = read(data, "test")
    if split.kind != run.puzzles:
        raise ValueError(f"{data}: expected puzzles like those of the run, {run.puzzles}; got {split.kind}.")
    if split.what == "arc" and read(data, "train").digest() != run.digest:
        raise ValueError(
            f"{data}: expected the folder that the run is trained on, for it learned an embedding of each "
            "task; got other tasks."
        )
    return split


def _evaluate(given: argparse.Namespace) -> None:
    split, answers, data = _answers(given)
    shares = evaluation.report(data, split, answers, is_whole=given.most is None)
    print(f"{len(answers.right):,} examples of {data}")
    for name, share in shares.items():
        print(f"{share:7.1%}  {name}")
    (given.run / "evaluation.json").write_text(json.dumps(shares, indent=1))


def _pictures(given: argparse.Namespace) -> None:
    split, answers, _ = _answers(given)
    solved, failed = (evaluation.shown(split, answers, right, given.each) for right in (True, False))
    file = given.run / "puzzles.png"
    pictures.page(file, split.what, solved, failed)
    print(f"{file}: {len(solved)} solved, {len(failed)} failed")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m puzzles", description="Puzzles with the classic TRM.")
    commands = parser.add_subparsers(required=True)

    data = commands.add_parser("data", help="make a folder of puzzles, in the layout of the TRM paper's code")
    data.set_defaults(call=_data)
    data.add_argument("kind", choices=_MAKERS)
    data.add_argument("folder", type=Path)
    for name, usual in _COUNTS.items():
        data.add_argument(
            f"--{name}", type=int, help=f"tasks or puzzles; default {usual}, of arc at most all"
        )
    data.add_argument("--augmentations", type=int, help="of each; mazes have all 8; default 10")
    data.add_argument("--side", type=int, help="of a grid, the cells of a row; default 30")
    data.add_argument("--shortest", type=int, help="steps of a maze's path, at least; default 8")
    data.add_argument("--rules", type=int, help="of ARC-1D: a task each, with --train and --test examples")
    data.add_argument("--version", choices=packages.VERSIONS, help="of ARC-AGI; default 1")
    data.add_argument("--seed", type=int, default=0)

    training = commands.add_parser("train", help="begin a run, or go on with it")
    training.set_defaults(call=_train)
    training.add_argument("data", type=Path)
    training.add_argument("run", type=Path)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--save-every", type=int, default=100, metavar="STEPS", help="default 100")
    training.add_argument(
        "--checkpoint", type=Path, metavar="FILE.safetensors", help="begin with these weights"
    )
    _add_settings(training)

    for name, call, what in (
        ("evaluate", _evaluate, "test what a run learned"),
        ("pictures", _pictures, "draw solved and failed puzzles"),
    ):
        testing = commands.add_parser(name, help=what)
        testing.set_defaults(call=call)
        testing.add_argument("run", type=Path)
        testing.add_argument("--data", type=Path, help="default those of the run")
        testing.add_argument("--rows", type=int, default=64, help="examples together; default 64")
        testing.add_argument("--most", type=int, help="the first so many tasks or puzzles alone, whole")
        if call is _pictures:
            testing.add_argument("--each", type=int, default=3, help="pictures of each; default 3")
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    for field in fields(Settings):
        flag, kind = f"--{field.name.replace('_', '-')}", field.type
        if isinstance(field.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=_HELP.get(field.name))
        else:
            made = kind if kind in (int, float) else str
            parser.add_argument(flag, type=made, metavar="VALUE", help=_HELP.get(field.name))


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        given.call(given)
    except (ValueError, OSError, SafetensorError) as error:
        parser.error(str(error))
    except MemoryError as error:
        parser.error(f"expected numbers that fit into memory, got: {error}")
