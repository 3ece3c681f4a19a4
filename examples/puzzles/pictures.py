"""Pictures of a run: its losses, and a page of solved and of failed puzzles"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from numpy.typing import NDArray

Shown = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]  # input, answer, solution; [rows, columns] tokens
# of ARC: what pads, what ends a grid, and the ten colours as people know them
_COLOURS = [
    "#f2f2f2",
    "#d9d9d9",
    "#000000",
    "#0074d9",
    "#ff4136",
    "#2ecc40",
    "#ffdc00",
    "#aaaaaa",
    "#f012be",
] + ["#ff851b", "#7fdbff", "#870c25"]
_MAZE = ["#f2f2f2", "#333333", "#ffffff", "#2ecc40", "#ff4136", "#0074d9"]
_SUDOKU = ["#f2f2f2", "#ffffff"] + ["#ffffff"] * 9
TITLES = ("puzzle", "answer", "solution")


def losses(file: Path, steps: Sequence[int], values: Sequence[float]) -> None:
    """The loss by step."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(steps, values, linewidth=1)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    _write(figure, file)


def page(file: Path, what: str, solved: Sequence[Shown], failed: Sequence[Shown]) -> None:
    """Solved puzzles, then failed ones: puzzle, answer, solution. `what` is arc, maze or sudoku."""
    rows = [("solved", shown) for shown in solved] + [("failed", shown) for shown in failed]
    figure, axes = plt.subplots(
        max(1, len(rows)), 3, figsize=(6, 2 * max(1, len(rows))), layout="constrained", squeeze=False
    )
    for line, (said, shown) in zip(axes, rows, strict=False):
        for place, title, tokens in zip(line, TITLES, shown, strict=True):
            _draw(place, what, tokens)
            place.set_title(f"{said}: {title}" if title == "puzzle" else title, fontsize=8)
        if what != "arc":
            for row, column in np.argwhere(shown[1] != shown[2]):
                square = plt.Rectangle(
                    (column - 0.5, row - 0.5), 1, 1, fill=False, color="#ff851b", linewidth=2
                )
                line[1].add_patch(square)  # where the answer is wrong
    for place in axes.ravel():
        place.set(xticks=[], yticks=[])
    _write(figure, file)


def _draw(place: Axes, what: str, tokens: NDArray[Any]) -> None:
    colours = {"arc": _COLOURS, "maze": _MAZE, "sudoku": _SUDOKU}[what]
    place.imshow(tokens, cmap=ListedColormap(colours), vmin=0, vmax=len(colours) - 1)
    if what == "sudoku":
        for (row, column), token in np.ndenumerate(tokens):
            place.text(column, row, str(token - 1) if token > 1 else "", ha="center", va="center", fontsize=7)


def _write(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=120)
    plt.close(figure)
