"""The tables of docs/evidence-real.md, made from results.jsonl alone.

A seed that was not run is shown as missing; arms of which no seed was run are named below the table.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import statistics
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

from evidence_real.arms import ARMS
from evidence_real.measures import N
from evidence_real.results import Lines
from evidence_real.tasks import TASKS
from evidence_real.yardstick import short_games
from hybrid.demo.report import table

SEEDS = range(5)
_NONE = "-"
_NOTHING = "Nothing was run."
_FOLLOWED = 0.9  # of the answers are right after a move that a model follows

Result = dict[str, Any]


def _seeds(lines: Lines, task: str, arm: str, of: Callable[[Result], float], digits: int = 3) -> list[str]:
    """[the mean of the seeds' values, each of them]; a run that is not there is missing."""
    found = lines.of(task, arm)
    values = {seed: of(result) for seed, result in found.items() if seed in SEEDS}
    each = " ".join(f"{values[seed]:.{digits}f}" if seed in values else _NONE for seed in SEEDS)
    if ARMS[arm].learns == "nothing":
        each = f"{values[0]:.{digits}f}" if values else _NONE
    return [f"{statistics.mean(values.values()):.{digits}f}" if values else _NONE, each]


def _run(lines: Lines, task: str) -> list[str]:
    """The arms of which there is a run."""
    return [arm for arm in ARMS if lines.of(task, arm)]


def _with_those_not_run(made: str, lines: Lines, task: str) -> str:
    """The table, and the arms that it lacks."""
    lacking = [arm for arm in ARMS if arm not in _run(lines, task) and not _is_out_of_place(task, arm)]
    if not _run(lines, task):
        return _NOTHING
    return f"{made}\n\nNot run: {'; '.join(lacking)}." if lacking else made


def _is_out_of_place(task: str, arm: str) -> bool:
    """Fillers stand between questions."""
    return ARMS[arm].fillers and not TASKS[task].asks_often


def _places(result: Result, most: int) -> float:
    return statistics.mean(result["by_moves"][:most])


def _beyond(result: Result, most: int) -> float:
    return statistics.mean(result["by_moves"][most:])


def _followed(result: Result) -> int:
    """Moves that are followed: those before the first after which less than 90% is right."""
    shares: list[float] = result["by_moves"]
    return next((move for move, share in enumerate(shares) if share < _FOLLOWED), len(shares))


def _trained(values: list[float]) -> float:
    """Of the questions that are trained on: all but the last."""
    return statistics.mean(values[:-1])


def _at_the_end(result: Result) -> float:
    return _trained(result["closing"])


def _in_the_new_wording(result: Result) -> float:
    closing: list[float] = result["closing"]
    return closing[-1]


def answers(lines: Lines, task: str) -> str:
    """Each arm: what it answers, seed by seed."""
    most, often = TASKS[task].most, TASKS[task].asks_often
    rows = []
    for arm in _run(lines, task):
        cells = []
        if often:
            cells += _seeds(lines, task, arm, partial(_places, most=most))
            cells += _seeds(lines, task, arm, partial(_beyond, most=most))[:1]
        cells += _seeds(lines, task, arm, lambda result: _trained(result["generate"]))
        cells += _seeds(lines, task, arm, _at_the_end)[:1]
        cells += _seeds(lines, task, arm, _in_the_new_wording)[:1]
        rows.append([arm, *cells])
    asked = (
        ["after each move", "each seed", f"after move {most + 1} to {TASKS[task].longer}"] if often else []
    )
    made = table(["arm", *asked, "generate", "each seed", "at the end", "at the end, new wording"], *rows)
    return _with_those_not_run(made, lines, task)


def each_seed(lines: Lines, task: str) -> str:
    """Each arm: what `answers` and `costs` give the mean of, seed by seed."""
    most, longer = TASKS[task].most, TASKS[task].longer
    columns: dict[str, tuple[Callable[[Result], float], int]] = {}
    if TASKS[task].asks_often:
        columns = {
            "moves followed": (_followed, 0),
            f"after move {most + 1} to {longer}": (partial(_beyond, most=most), 2),
        }
    columns |= {
        "at the end": (_at_the_end, 2),
        "at the end, new wording": (_in_the_new_wording, 2),
        "CPU seconds": (lambda result: result.get("cpu_seconds", 0.0), 0),
    }
    rows = [
        [arm, *(_seeds(lines, task, arm, of, digits)[1] for of, digits in columns.values())]
        for arm in _run(lines, task)
    ]
    return table(["arm", *columns], *rows) if rows else _NOTHING


def costs(lines: Lines, task: str) -> str:
    """Each arm: what it cost, and what it did to ordinary text."""
    rows = []
    for arm in _run(lines, task):
        found = list(lines.of(task, arm).values())
        seconds = [result.get("cpu_seconds", 0.0) for result in found]
        cells = [
            f"{found[0]['trained_parameters']:,}",
            f"{max(result.get('steps', 0) for result in found):,}",
            f"{statistics.mean(seconds):.0f}",
        ]
        for text in ("help texts", "Python sources"):
            cells += _seeds(lines, task, arm, itemgetter(text), digits=2)
        rows.append([arm, *cells])
    columns = [
        "trained parameters",
        "steps",
        "CPU seconds",
        "help texts",
        "each seed",
        "Python sources",
        "each seed",
    ]
    return table(["arm", *columns], *rows) if rows else _NOTHING


def by_n(lines: Lines, task: str) -> str:
    """Each recursion: accuracy by n at inference, in the mean over the seeds that are there."""
    most = TASKS[task].most
    what: dict[str, Callable[[Result], float]] = {"at the end": _at_the_end}
    if TASKS[task].asks_often:
        what = {
            f"move 1 to {most}": partial(_places, most=most),
            f"move {most + 1} to {TASKS[task].longer}": partial(_beyond, most=most),
            **what,
        }
    rows = []
    for arm in _run(lines, task):
        if ARMS[arm].learns != "recursion":
            continue
        found = list(lines.of(task, arm).values())
        for title, of in what.items():
            shares = [f"{statistics.mean(of(result['by_n'][str(n)]) for result in found):.3f}" for n in N]
            rows.append([arm, title, *shares])
    return table(["arm", "answers", *(f"n = {n}" for n in N)], *rows) if rows else _NOTHING


_SHOWN = [name for name in TASKS if not name.endswith(", fillers")]
TABLES: dict[str, Callable[[Lines], str]] = {
    "short-games": short_games,
    **{
        f"{task.replace(' ', '-')}{end}": partial(make, task=task)
        for task in _SHOWN
        for end, make in (("", answers), ("-each-seed", each_seed), ("-costs", costs), ("-by-n", by_n))
    },
}
