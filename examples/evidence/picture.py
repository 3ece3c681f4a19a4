"""The figure of docs/evidence.md: accuracy by swaps, an arm a line; and by recursion steps at inference."""

import io
import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evidence.results import Results
from evidence.shell_game import SWAPS
from evidence.tables import ANSWERS, GAME, MOST, RANDOM
from hybrid.demo.shell_game import CUPS
from hybrid.saving.files import replace_file

_SHOWN = (
    RANDOM,
    "n = 8",
    "n = 4",
    "n = 2",
    "n = 1",
    "untied, same FLOPs",
    "untied, same parameters",
    "LoRA",
    "full fine-tuning",
)


def draw(results: Results, path: Path) -> None:
    """Write the PNG: lines are means over the seeds, a shade reaches from the worst seed to the best."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen
    by_swaps, by_n = figure.subplots(1, 2, sharey=True)
    by_swaps.set(xlabel="swaps", ylabel="right answers, held-out games", ylim=(0.25, 1.02))
    for arm in _SHOWN:
        seeds = [list(result["by_difficulty"].values()) for result in results.of(GAME, arm)]
        _line(by_swaps, range(1, len(seeds[0]) + 1), seeds, arm)
    by_swaps.axvline(SWAPS, color="grey", linestyle=":")
    by_swaps.text(SWAPS + 0.2, 0.27, "never trained", color="grey")

    by_n.set(xlabel="recursion steps n at inference")
    for arm, style in ((RANDOM, "o-"), (MOST, "s--")):
        found = [result["by_n"] for result in results.of(GAME, arm)]
        steps = [int(n) for n in found[0]]
        for title, part in ANSWERS.items():
            shares = [[statistics.mean(one[str(n)][part]) for n in steps] for one in found]
            _line(by_n, steps, shares, f"{arm}: {title}", style)
    by_n.set_xticks(steps)
    for axes in (by_swaps, by_n):
        axes.axhline(1 / CUPS, color="grey", linestyle="--")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=90)
    replace_file(path, picture.getvalue())


def _line(axes: Any, x: Any, seeds: list[list[float]], label: str, style: str = "-") -> None:
    columns = list(zip(*seeds, strict=True))
    (line,) = axes.plot(x, [statistics.mean(column) for column in columns], style, label=label, markersize=4)
    axes.fill_between(x, list(map(min, columns)), list(map(max, columns)), color=line.get_color(), alpha=0.15)
