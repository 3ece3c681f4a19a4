"""What ARC counts: two answers to a test, chosen by the votes of all variants of the task

Every variant's answer is changed back into the task's own directions and colours. Equal answers are counted.
More votes come first, and of as many votes the higher mean of q: how sure the model is. pass@K asks
whether one of the first K is right. A task with several tests counts as the share of them; tasks count alike.

Source   arXiv 2510.04871, appendix, hyper-parameters: "the most common answer"; its evaluators/arc.py
         for the rest, as a fork has it (github.com/alphaXiv/TinyRecursiveModels, commit 19dfeaca).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puzzles.arc import Grid, found, parsed
from puzzles.packages import Task

_Key = tuple[tuple[int, ...], bytes]


class Votes:
    """Answers by task and test: `add` them, then ask for the `ranked`, or for `pass_at`."""

    def __init__(self, names: Sequence[str], size: tuple[int, int]) -> None:
        """`names` of kinds, as identifiers.json has them; `size` (rows, columns) of the model's grids."""
        self._names, self._size = names, size
        self._answers: dict[tuple[str, _Key], dict[_Key, list[float]]] = defaultdict(
            lambda: defaultdict(list)
        )
        self._grids: dict[_Key, Grid] = {}

    def add(self, kind: int, given: NDArray[Any], answer: NDArray[Any], q: float) -> None:
        """The answer to an input, both [cells] tokens, of a kind of puzzle."""
        task, variant = parsed(self._names[kind])
        test, grid = (variant.back(found(tokens.reshape(self._size))) for tokens in (given, answer))
        self._answers[task, _key(test)][_key(grid)].append(q)
        self._grids[_key(grid)] = grid

    def ranked(self, task: str, given: Grid) -> list[tuple[Grid, int]]:
        """(answer, votes) to a test of a task, the best first."""
        answers = self._answers.get((task, _key(given)), {})
        order = sorted(answers, key=lambda key: (len(answers[key]), np.mean(answers[key])), reverse=True)
        return [(self._grids[key], len(answers[key])) for key in order]

    def pass_at(self, most: int, tasks: Mapping[str, Task]) -> float:
        """The share of tests that one of the first `most` answers is right for; tasks count alike."""
        return float(np.mean([np.mean(list(self._right(most, *one))) for one in tasks.items()]))

    def _right(self, most: int, name: str, task: Task) -> Iterable[bool]:
        for pair in task["test"]:
            given, wanted = (np.array(pair[what], np.uint8) for what in ("input", "output"))
            yield any(np.array_equal(grid, wanted) for grid, _ in self.ranked(name, given)[:most])


def _key(grid: Grid) -> _Key:
    return grid.shape, grid.tobytes()
