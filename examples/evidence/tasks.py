"""What there is to run: a task is a module with three names."""

from collections.abc import Collection
from typing import Any, Protocol

from evidence import reachability, shell_game, sudoku6


class Task(Protocol):
    """A task and its arms, all trained within one budget."""

    @property
    def ARMS(self) -> Collection[str]:
        """The arms' names, as tables show them."""

    def settings(self, arm: str, quick: bool) -> dict[str, Any]:
        """All that decides what a run computes but the seed, as JSON has it: a run of other settings is made
        anew. Among it "steps", those of the optimiser.

        quick   a shorter run of the same, for which no claim is made
        """

    def run(self, seed: int, arm: str, quick: bool) -> dict[str, Any]:
        """Train and measure one arm, on one thread. What came of it, as JSON has it; every task gives

        accuracy             on what was held out, from 0 to 1
        by_difficulty        the same by difficulty, in words that a table can show: {"1": 0.9, ...}
        trained_parameters   how many
        cpu_seconds          of this process while it trained
        """


TASKS: dict[str, Task] = {"shell_game": shell_game, "reachability": reachability, "sudoku6": sudoku6}
