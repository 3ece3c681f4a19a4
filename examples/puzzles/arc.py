"""ARC-AGI and ARC-1D in the layout of the TRM paper's code: tokens, variants, and the way back from them

Tokens     0 pads, 1 marks the row below a grid and the column right of it, c + 2 is colour c.
Variants   a grid is turned or mirrored and its colours 1 to 9 are exchanged; 0 stays. Each variant of a task
           is a kind of its own, with a row in the puzzle embedding; its name says how it was made:
           TASK|||t3|||0724...
Places     an example to train on lies anywhere in the grid, but for one of each variant; one that is tested
           lies at the top left.

Source     dataset/build_arc_dataset.py and evaluators/arc.py of
           github.com/SamsungSAILMontreal/TinyRecursiveModels.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from puzzles.dihedral import KEEP_THE_SHAPE, turned, turned_back
from puzzles.layout import Example, Puzzle, write
from puzzles.packages import Task

Grid = NDArray[np.uint8]  # [rows, columns] colours
Pairs = dict[str, list[tuple[Grid, Grid]]]  # a task's examples, "train" and "test"
VOCABULARY = 12
TESTS = "test_puzzles.json"
_SEPARATOR = "|||"
_TRIES = 5  # times as many variants are drawn as are wanted: a symmetric task has fewer


class Variant(NamedTuple):
    """How a task is changed."""

    way: int  # of dihedral.py
    colours: tuple[int, ...]  # what each of the ten becomes

    def name(self, task: str) -> str:
        return f"{task}{_SEPARATOR}t{self.way}{_SEPARATOR}{''.join(map(str, self.colours))}"

    def of(self, grid: Grid) -> Grid:
        return turned(np.array(self.colours, np.uint8)[grid], self.way)

    def back(self, grid: Grid) -> Grid:
        """The grid that `of` changed into this one."""
        return np.argsort(self.colours).astype(np.uint8)[turned_back(grid, self.way)]


AS_IT_IS = Variant(0, tuple(range(10)))


def parsed(name: str) -> tuple[str, Variant]:
    """(task, variant) of a kind's name. Errors: ValueError for another name."""
    task, *how = name.split(_SEPARATOR)
    if not how:
        return task, AS_IT_IS
    try:
        way, colours = how
        variant = Variant(int(way.removeprefix("t")), tuple(map(int, colours)))
        if not 0 <= variant.way < 8 or sorted(variant.colours) != list(range(10)):
            raise ValueError(name)
    except ValueError as error:
        raise ValueError(f"expected a name like TASK|||t0|||0123456789, got {name!r}.") from error
    return task, variant


def drawn_variant(random: np.random.Generator, is_square: bool) -> Variant:
    way = random.choice(8 if is_square else KEEP_THE_SHAPE)
    return Variant(int(way), (0, *(1 + random.permutation(9)).tolist()))


def placed(grid: Grid, size: tuple[int, int], at: tuple[int, int] = (0, 0)) -> Grid:
    """[*size] tokens of a grid whose first cell lies `at`."""
    tokens, (top, left) = np.zeros(size, np.uint8), at
    bottom, right = top + grid.shape[0], left + grid.shape[1]
    tokens[top:bottom, left:right] = grid + 2
    if bottom < size[0]:
        tokens[bottom, left:right] = 1
    if right < size[1]:
        tokens[top:bottom, right] = 1
    return tokens


def found(tokens: NDArray[Any]) -> Grid:
    """The largest grid at the top left of [rows, columns] tokens; what is outside of it does not matter."""
    is_colour = (tokens >= 2) & (tokens < VOCABULARY)
    wide = np.minimum.accumulate(np.cumprod(is_colour, axis=1).sum(1))
    rows = 1 + int((wide * np.arange(1, len(wide) + 1)).argmax())
    columns = int(wide[rows - 1])
    return (tokens[: rows if columns else 0, :columns] - 2).astype(np.uint8)


def tokens_of(
    pairs: Iterable[tuple[Grid, Grid]], size: tuple[int, int], random: np.random.Generator | None
) -> list[Example]:
    """Pairs at the top left or, with `random`, anywhere, all but one; input and output of a pair alike."""
    pairs = list(pairs)
    stays = None if random is None else random.integers(len(pairs))
    examples = []
    for i, pair in enumerate(pairs):
        at = (0, 0)
        if random is not None and i != stays:
            room = [size[axis] - max(grid.shape[axis] for grid in pair) for axis in (0, 1)]
            at = (int(random.integers(room[0] + 1)), int(random.integers(room[1] + 1)))
        given, wanted = (placed(grid, size, at) for grid in pair)
        examples.append((given, wanted))
    return examples


def variants(
    task: Task, count: int, size: tuple[int, int], random: np.random.Generator
) -> list[tuple[Variant, Pairs]]:
    """A task as it is, and in `count` other variants, or as many as differ."""

    def changed(variant: Variant) -> Pairs:
        return {
            part: [
                (
                    variant.of(np.array(pair["input"], np.uint8)),
                    variant.of(np.array(pair["output"], np.uint8)),
                )
                for pair in task[part]
            ]
            for part in ("train", "test")
        }

    kept, seen = [(AS_IT_IS, changed(AS_IT_IS))], set()
    seen.add(_content(kept[0][1]))
    for _ in range(_TRIES * count):
        if len(kept) > count:
            break
        variant = drawn_variant(random, is_square=size[0] == size[1])
        pairs = changed(variant)
        if (content := _content(pairs)) not in seen:
            seen.add(content)
            kept.append((variant, pairs))
    return kept


def _content(pairs: Pairs) -> frozenset[Any]:
    """All pairs, whatever their order."""
    return frozenset(
        tuple((grid.shape, grid.tobytes()) for grid in pair) for part in pairs.values() for pair in part
    )


def fits(task: Task, size: tuple[int, int]) -> bool:
    grids = [np.array(grid) for part in task.values() for pair in part for grid in pair.values()]
    return all(grid.shape[0] <= size[0] and grid.shape[1] <= size[1] for grid in grids)


def tasks_in(folder: Path) -> dict[str, Task]:
    """What is tested, {name: {"test": [{"input": grid, "output": grid}]}}. Errors: ValueError for others."""
    file = folder / TESTS
    try:
        tasks = json.loads(file.read_text())
        for name, task in tasks.items():
            for pair in task["test"]:
                for what in ("input", "output"):
                    if not is_grid(pair[what]):
                        raise ValueError(f"{what} of {name}, {pair[what]!r:.60}")
            if not task["test"]:
                raise ValueError(f"{name} without a test")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: expected tasks, each with tests of colours 0..9, got {error!r}."
        ) from error
    return dict(tasks)


def is_grid(rows: Any) -> bool:
    """Whether these are rows of as many colours."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        return False
    return all(
        len(row) == len(rows[0]) and all(type(cell) is int and 0 <= cell < 10 for cell in row) for row in rows
    )


def make(
    folder: Path,
    learned: Mapping[str, Task],
    tested: Mapping[str, Task],
    augmentations: int,
    size: tuple[int, int],
    seed: int,
    together: int | None = None,
) -> None:
    """Write both splits: to train on are all pairs of `learned` and those of `tested` that show the rule.

    together   pairs of a task that are drawn into a batch together; None for all, as in the paper's code

    Errors: ValueError where there is nothing to train on or to test, for names in both.
    """
    if both := learned.keys() & tested.keys():
        raise ValueError(f"expected tasks to be learned or tested, got both of {', '.join(sorted(both))}.")
    random = np.random.default_rng(seed)
    names, to_train_on, test = ["<blank>"], [], []
    for task, parts in {**learned, **tested}.items():
        shown: list[list[Puzzle]] = []
        asked: list[Puzzle] = []
        for variant, pairs in variants(parts, augmentations, size, random):
            kind = len(names)
            names.append(task if variant == AS_IT_IS and not shown else variant.name(task))
            is_tested = task in tested
            rule = pairs["train"] if is_tested else pairs["train"] + pairs["test"]
            examples, step = tokens_of(rule, size, random), together or len(rule)
            shown.append([Puzzle(kind, examples[i : i + step]) for i in range(0, len(rule), step)])
            if is_tested:
                asked.append(Puzzle(kind, tokens_of(pairs["test"], size, None)))
        to_train_on += [list(group) for group in zip(*shown, strict=True)]
        test += [asked] if asked else []
    for split, groups in (("train", to_train_on), ("test", test)):
        write(folder, split, groups, VOCABULARY, names)
    (folder / TESTS).write_text(json.dumps(dict(tested)))
