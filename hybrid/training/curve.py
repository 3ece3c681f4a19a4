"""The training curve as a picture."""

import io
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hybrid.saving.files import replace_file


def draw(metrics: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG of the training loss and every held-out loss, in nats per token, over the steps.

    metrics   the lines of metrics.jsonl
    """
    figure = Figure(figsize=(7, 4))
    FigureCanvasAgg(figure)  # draws without a screen, and without touching pyplot's global figures
    figure.subplots_adjust(left=0.12, right=0.97, top=0.88, bottom=0.13)  # a layout draws all of it once more
    axes = figure.add_subplot(xlabel="step")
    axes.set_title("loss, nats per token", loc="left", fontsize="medium")
    axes.ticklabel_format(useOffset=False)
    lines = [line for line in metrics if "loss" in line]
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], label="training", alpha=0.6)
    held_out = [line for line in metrics if "held_out" in line]
    for name in held_out[0]["held_out"] if held_out else ():
        axes.plot(
            [line["step"] for line in held_out],
            [line["held_out"][name] for line in held_out],
            "o-",
            label=name,
        )
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    replace_file(path, picture.getvalue())
