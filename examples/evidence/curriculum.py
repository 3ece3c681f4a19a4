"""What a shallow recursion first saves: `PYTHONPATH=examples python -m evidence.curriculum shell-game`

Each seed is trained with and without the curriculum. Held-out accuracy is measured along the way. Operations
are those of the products, forward and backward; CPU seconds are those of training alone. What counts is how
many of both it took until an accuracy was reached, and how it ended.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import mean
from typing import NamedTuple

import tiny_recursive_models as tiny
import torch
from puzzles.training import Batch, Training
from torch import Tensor

from evidence import shell_game
from evidence.training import count_flops, train
from trm_kernels import Depth, RecursionCurriculum


class Point(NamedTuple):
    """Where a training stood before a step."""

    operations: float
    cpu_seconds: float
    accuracy: float


class Track:
    """Measures now and then; the time for that is not the training's."""

    def __init__(self, every: int, accuracy: Callable[[], float]) -> None:
        self.points: list[Point] = []
        self._every, self._accuracy = every, accuracy
        self._began, self._measuring = time.process_time(), 0.0

    def at(self, step: int, operations: float, is_last: bool = False) -> None:
        if step % self._every and not is_last:
            return
        now = time.process_time()
        spent = now - self._began - self._measuring
        self.points.append(Point(operations, spent, self._accuracy()))
        self._measuring += time.process_time() - now


def on_the_shell_game(seed: int, text: str | None, every: int, quick: bool) -> list[Point]:
    """The arm "n = 8" of `make evidence`; `text` is FIRST:STEPS, n alone."""
    model, loss_of, chosen = shell_game.prepared("n = 8", seed, quick)
    last = Depth(chosen.n, 1)
    curriculum = None if text is None else RecursionCurriculum.from_text(text, last)
    operations_of: dict[Depth, float] = {}
    total = 0.0

    def accuracy() -> float:
        model.training_depth = None
        found = shell_game.held_out_accuracy(model, chosen)
        model.train()
        return found

    def of_step(step: int) -> Tensor:
        nonlocal total
        depth = last if curriculum is None else curriculum.at(step)
        track.at(step, total)
        model.training_depth = depth
        total += operations_of[depth]
        return loss_of(step)

    model.train()  # the depth is that of training forwards
    for step in range(chosen.steps):
        depth = last if curriculum is None else curriculum.at(step)
        if depth not in operations_of:
            model.training_depth = depth
            operations_of[depth] = count_flops(loss_of, 1)
    track = Track(every, accuracy)
    train(model, of_step, chosen.steps, chosen.learning_rate)
    track.at(chosen.steps, total, is_last=True)
    return track.points


def on_sudoku(seed: int, text: str | None, every: int, quick: bool) -> list[Point]:
    """4x4 of tiny_recursive_models.py; `text` is FIRSTxT:STEPS. Accuracy is that of whole grids."""
    settings = replace(tiny.PUZZLES["4x4"], recursion_curriculum=text)
    if quick:
        settings = replace(settings, steps=settings.steps // 2)
    torch.manual_seed(seed)
    model = tiny.make_model(settings)
    (puzzles, solutions), held_out = tiny.puzzles_of(settings, seed, None)

    def draw() -> Batch:
        rows = torch.randint(len(puzzles), (settings.batch_size,))
        return tiny.batch_of(puzzles[rows].long(), solutions[rows].long())

    def accuracy() -> float:
        return tiny.evaluate(training.average, *held_out, settings.supervision_steps)[-1][0]

    training = Training(model, settings, draw())
    track = Track(every, accuracy)
    for step in range(settings.steps):
        track.at(step, training.counted.operations)
        training.advance(draw())
    track.at(settings.steps, training.counted.operations, is_last=True)
    return track.points


GAMES = {"shell-game": on_the_shell_game, "sudoku": on_sudoku}


def until(points: list[Point], accuracy: float) -> Point | None:
    """The first point with this accuracy, or None."""
    return next((point for point in points if point.accuracy >= accuracy), None)


def _said(name: str, points: list[Point], accuracy: float) -> str:
    reached, end = until(points, accuracy), points[-1]
    if reached is None:
        to = f"{accuracy:.0%} not reached"
    else:
        to = f"{accuracy:.0%} after {reached.operations / 1e9:,.0f} billion, {reached.cpu_seconds:.0f} s"
    whole = f"{end.accuracy:.1%} after {end.operations / 1e9:,.0f} billion, {end.cpu_seconds:.0f} s"
    return f"{name:>10}: {to}; in the end {whole}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evidence.curriculum", description=__doc__)
    parser.add_argument("game", choices=GAMES)
    parser.add_argument("--curriculum", required=True, metavar="FIRST:STEPS")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--accuracy", type=float, default=0.95, help="to be reached; default 0.95")
    parser.add_argument("--every", type=int, default=20, help="steps between two measurements; default 20")
    parser.add_argument("--quick", action="store_true", help="half the steps")
    given = parser.parse_args(arguments)
    both: list[tuple[Point, Point]] = []
    try:
        for seed in given.seeds:
            reached = []
            for name, text in (("curriculum", given.curriculum), ("without", None)):
                points = GAMES[given.game](seed, text, given.every, given.quick)
                print(f"seed {seed} {_said(name, points, given.accuracy)}", flush=True)
                reached.append(until(points, given.accuracy))
            if reached[0] is not None and reached[1] is not None:
                both.append((reached[0], reached[1]))
    except ValueError as error:
        parser.error(str(error))
    if both:
        fewer = mean(b.operations for _, b in both) / mean(a.operations for a, _ in both)
        faster = mean(b.cpu_seconds for _, b in both) / mean(a.cpu_seconds for a, _ in both)
        print(
            f"to {given.accuracy:.0%}, {len(both)} of {len(given.seeds)} seeds: {fewer:.2f} times fewer "
            f"operations, {faster:.2f} times fewer CPU seconds"
        )


if __name__ == "__main__":
    main()
