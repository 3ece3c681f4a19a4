"""The tables of docs/evidence.md, each made from results.json alone.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; `make evidence ARGS=--publish` makes all
anew.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from evidence.results import Results, mean_and_deviation
from evidence.shell_game import SWAPS
from evidence.tasks import TASKS
from hybrid.demo.marked_tables import with_tables
from hybrid.demo.report import table

GAME = "shell_game"
RANDOM = "n random in 1..8"
MOST = "n = 8"
# which answers of a held-out game, in the order of its swaps
ANSWERS = {
    f"1 to {SWAPS} swaps": slice(0, SWAPS),
    f"{SWAPS} swaps": slice(SWAPS - 1, SWAPS),
    f"{SWAPS + 1} to 24 swaps": slice(SWAPS, 24),
}
_PROMPTS = {"1 to 4 swaps": slice(0, 4), f"1 to {SWAPS} swaps": slice(0, SWAPS)}
_MOST_COLUMNS = 6  # of difficulties in one table

Result = dict[str, Any]


def _told(results: list[Result], of: Callable[[Result], float], digits: int = 3) -> str:
    """Mean and standard deviation over the seeds."""
    return mean_and_deviation([of(result) for result in results], digits)


def _arms(results: Results, task: str) -> list[str]:
    """Those that were run, in the task's order."""
    return [arm for arm in TASKS[task].ARMS if arm in results.runs.get(task, {})]


def arms(results: Results, task: str) -> str:
    """Every arm of a task: accuracy with every seed, and by difficulty in the mean."""
    names = _arms(results, task)
    difficulties = _spread(list(results.of(task, names[0])[0]["by_difficulty"])) if names else []
    rows = []
    for arm in names:
        found = results.of(task, arm)
        seeds = " ".join(f"{result['accuracy']:.3f}" for result in found)
        by = [statistics.mean(result["by_difficulty"][d] for result in found) for d in difficulties]
        rows.append([arm, _told(found, lambda r: r["accuracy"]), seeds, *(f"{share:.3f}" for share in by)])
    return table(["arm", "accuracy", "each seed", *difficulties], *rows)


def _spread(difficulties: list[str]) -> list[str]:
    """All, or so many that a table holds them, the hardest among them."""
    every = -(-len(difficulties) // _MOST_COLUMNS)
    return difficulties[::-1][::every][::-1]


def budgets(results: Results, task: str) -> str:
    """What every arm of a task was given."""
    rows = []
    for arm in _arms(results, task):
        found, settings = results.of(task, arm), results.settings_of(task, arm)
        flops = found[0].get("flops_of_a_step")
        rows.append(
            [
                arm,
                f"{found[0]['trained_parameters']:,}",
                f"{settings['steps']:,}",
                "" if flops is None else f"{flops / 1e9:.2f}",
                _told(found, lambda r: r["cpu_seconds"], 0),
            ]
        )
    return table(["arm", "trained parameters", "steps", "GFLOP a step", "CPU seconds"], *rows)


def by_n(results: Results) -> str:
    """Accuracy by the number of recursion steps at inference, of weights that are trained once."""
    rows, columns = [], results.of(GAME, RANDOM)[0]["by_n"]
    for arm in (RANDOM, MOST):
        found = results.of(GAME, arm)
        for title, part in ANSWERS.items():
            shares = [[statistics.mean(result["by_n"][n][part]) for result in found] for n in columns]
            rows.append([arm, title, *map(mean_and_deviation, shares)])
    return table(["trained with", "accuracy after", *(f"n = {n}" for n in columns)], *rows)


def adaptive(results: Results) -> str:
    """Accuracy beside recursion steps, where each token stops by itself; the first row is a fixed n."""
    found = results.of(GAME, RANDOM)
    most = results.settings_of(GAME, RANDOM)["n"]
    rows = [["none: n is fixed", *_adaptive_cells([_fixed(result, most) for result in found])]]
    for rule in found[0]["adaptive"]:
        rows.append([rule, *_adaptive_cells([result["adaptive"][rule] for result in found])])
    columns = [
        f"{title}: {what}" for title in _PROMPTS for what in ("accuracy", "steps", "evaluations of the block")
    ]
    return table(["watched, threshold", *columns], *rows)


def _fixed(result: Result, n: int) -> Result:
    """A fixed n, as the rules of halting tell of theirs."""
    accuracy = result["by_n"][str(n)]
    return {"accuracy": accuracy, "steps": [n] * len(accuracy), "evaluations": [n + 1] * len(accuracy)}


def _adaptive_cells(seeds: list[Result]) -> list[str]:
    cells = []
    for part in _PROMPTS.values():
        for what, digits in (("accuracy", 3), ("steps", 2), ("evaluations", 2)):
            cells.append(mean_and_deviation([statistics.mean(one[what][part]) for one in seeds], digits))
    return cells


def prose(results: Results) -> str:
    """What learning the game cost: the held-out loss of what the base knew."""
    rows = []
    for arm in _arms(results, GAME):
        found = results.of(GAME, arm)
        rows.append([arm, _told(found, lambda r: r["prose"], 2), _told(found, lambda r: r["accuracy"])])
    return table(["arm", "prose, nats per character", "accuracy of the game"], *rows)


def _name(task: str) -> str:
    return task.replace("_", "-")


class Table(NamedTuple):
    """A table, and the task that it tells of."""

    task: str
    make: Callable[[Results], str]


TABLES = {
    **{_name(task): Table(task, partial(arms, task=task)) for task in TASKS},
    **{f"{_name(task)}-budgets": Table(task, partial(budgets, task=task)) for task in TASKS},
    "shell-game-by-n": Table(GAME, by_n),
    "shell-game-adaptive": Table(GAME, adaptive),
    "shell-game-prose": Table(GAME, prose),
}


def rewritten(text: str, results: Results) -> str:
    """The text with every table in it made anew. Raises ValueError as with_tables does."""

    def made(of: Table) -> str:
        return of.make(results) if of.task in results.runs else "Not run yet."

    return with_tables(text, {name: partial(made, of) for name, of in TABLES.items()}, "evidence")


def all_tables(results: Results) -> str:
    """All tables of the tasks that were run, under their names."""
    made = [f"## {name}\n\n{of.make(results)}\n" for name, of in TABLES.items() if of.task in results.runs]
    return "\n".join(made)
