"""The figure of docs/evidence-real.md: accuracy by recursion steps at inference, and without recursion."""

import io
import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evidence_real.results import Lines
from evidence_real.tasks import TASKS
from hybrid.saving.files import replace_file

RECURSION = "n random in 1..12, text kept"
_BESIDE = {
    "n = 1, text kept": "tab:red",
    "LoRA on the last layer": "tab:green",
    "LoRA on all layers, 3,000 steps": "tab:purple",
}
_TASKS = ("words", "permutations of five")


def draw(lines: Lines, path: Path) -> None:
    """Write the PNG: lines are means over the seeds, a shade reaches from the worst seed to the best."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen
    for axes, task in zip(figure.subplots(1, 2, sharey=True), _TASKS, strict=True):
        axes.set(title=task, xlabel="recursion steps n at inference", ylim=(0, 1.03))
        _recursion(axes, lines, task)
        for arm, color in _BESIDE.items():
            found = [statistics.mean(one["by_moves"][: TASKS[task].most]) for one in _of(lines, task, arm)]
            if found:
                label = f"{arm}: move 1 to {TASKS[task].most} ({_seeds(found)})"
                axes.axhline(statistics.mean(found), linestyle="--", color=color, label=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("right answers, held-out games")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=90)
    replace_file(path, picture.getvalue())


def _recursion(axes: Any, lines: Lines, task: str) -> None:
    most, found = TASKS[task].most, [one["by_n"] for one in _of(lines, task, RECURSION)]
    if not found:
        return
    steps = [int(n) for n in found[0]]
    for moves, style in ((slice(most), "o-"), (slice(most, None), "s--")):
        columns = [[statistics.mean(one[str(n)]["by_moves"][moves]) for one in found] for n in steps]
        title = f"move {1 if moves.start is None else most + 1} to {moves.stop or TASKS[task].longer}"
        label = f"{RECURSION}: {title} ({_seeds(found)})"
        (line,) = axes.plot(steps, [statistics.mean(c) for c in columns], style, label=label, markersize=4)
        axes.fill_between(
            steps, list(map(min, columns)), list(map(max, columns)), color=line.get_color(), alpha=0.15
        )
    axes.set_xticks(steps)


def _of(lines: Lines, task: str, arm: str) -> list[dict[str, Any]]:
    return list(lines.of(task, arm).values())


def _seeds(found: list[Any]) -> str:
    return f"{len(found)} seed{'s' if len(found) > 1 else ''}"
