"""Mazes of reasoning-gym in the layout of the TRM paper's code: the answer has the shortest path marked

Tokens are the paper's: 0 pads and never occurs, 1 wall, 2 floor, 3 start, 4 goal, 5 path. Only mazes with one
shortest path are taken, so that an answer is right or wrong; and none of the test is among those to train on,
however turned.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puzzles.dihedral import turned
from puzzles.layout import Example, Puzzle, Tokens, write
from puzzles.packages import items

WALL, FLOOR, START, GOAL, PATH = 1, 2, 3, 4, 5
VOCABULARY = 6
_IN_VAIN = 5000  # mazes in a row that have several shortest paths, or were there before


def steps_from(maze: Tokens, start: tuple[int, int]) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
    """(steps from `start` [rows, columns], -1 where no path leads; the cells in the order of their steps)."""
    steps = np.full(maze.shape, -1)
    steps[start], reached = 0, [start]
    for row, column in reached:  # it grows while it is read
        for cell in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            inside = 0 <= cell[0] < maze.shape[0] and 0 <= cell[1] < maze.shape[1]
            if inside and maze[cell] != WALL and steps[cell] < 0:
                steps[cell] = steps[row, column] + 1
                reached.append(cell)
    return steps, reached


def solved(maze: Tokens) -> Tokens | None:
    """The maze with its shortest path marked; None where there is none, or more than one."""
    (start,), (goal,) = (list(zip(*np.where(maze == end), strict=True)) for end in (START, GOAL))
    steps, _ = steps_from(maze, start)
    back, _ = steps_from(maze, goal)
    if steps[goal] < 0:
        return None
    on_a_path = (steps >= 0) & (back >= 0) & (steps + back == steps[goal])
    if on_a_path.sum() != steps[goal] + 1:  # a step that can be made in two cells is in two paths
        return None
    return np.where(on_a_path & (maze == FLOOR), PATH, maze).astype(np.uint8)


def tokens_of(about: Any) -> Tokens:
    """[side, side] tokens of a maze's metadata: every maze there has letters of its own."""
    meaning = {about["wall"]: WALL, about["path"]: FLOOR, about["start"]: START, about["goal"]: GOAL}
    return np.array([[meaning[letter] for letter in row] for row in about["grid"]], np.uint8)


def unlike(maze: Tokens) -> bytes:
    """The same for a maze however turned, and for no other."""
    return min(np.ascontiguousarray(turned(maze, way)).tobytes() for way in range(8))


def drawn(count: int, make_item: Callable[[int], Any]) -> list[Example]:
    """`count` mazes, none like another. Errors: ValueError where there are not as many."""
    mazes: dict[bytes, Example] = {}
    item = last = 0
    while len(mazes) < count:
        maze = tokens_of(make_item(item)["metadata"])
        answer, item = solved(maze), item + 1
        if answer is not None and (key := unlike(maze)) not in mazes:
            mazes[key], last = (maze, answer), item
        elif item - last > _IN_VAIN:
            raise ValueError(f"expected {count} mazes with one shortest path, got {len(mazes)}.")
    return list(mazes.values())


def make(folder: Path, train: int, test: int, side: int, shortest: int, seed: int) -> None:
    """Write both splits, mazes to train on in all eight directions. Paths have `shortest` steps or more."""
    settings = {"min_grid_size": side, "max_grid_size": side, "min_dist": shortest, "max_dist": side * side}
    try:
        mazes = drawn(train + test, items("maze", seed, **settings))
    except RuntimeError as error:  # reasoning-gym's own, in a maze that is too small for its path
        raise ValueError(
            f"expected a side that has paths of {shortest} steps, got {side}: {error}"
        ) from error

    def group(example: Example, ways: int) -> list[Puzzle]:
        given, wanted = example
        return [Puzzle(0, [(turned(given, way), turned(wanted, way))]) for way in range(ways)]

    for split, part, ways in (("train", mazes[:train], 8), ("test", mazes[train:], 1)):
        write(folder, split, [group(example, ways) for example in part], VOCABULARY)
