"""Metrics to accelerate's trackers (TensorBoard, Weights & Biases, ...), beside metrics.jsonl."""

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

_PROJECT = "trm-hybrid"


def check(names: Sequence[str]) -> None:
    """Errors: ValueError for a tracker whose package is not installed: accelerate would leave it out."""
    users_own = LOGGER_TYPE_TO_CLASS.keys() - set(LoggerType.list())
    available = sorted({str(name) for name in get_available_trackers()} | users_own)
    for name in names:
        if name not in available:
            raise ValueError(
                "report_to: expected trackers whose packages are installed "
                f"({', '.join(available) or 'none'}), got {name}."
            )


def start(accelerator: Accelerator, settings: dict[str, Any]) -> None:
    """Open the run of each tracker, with those settings that are numbers or text."""
    plain = {name: value for name, value in settings.items() if isinstance(value, bool | int | float | str)}
    accelerator.init_trackers(_PROJECT, config=plain)


def report(accelerator: Accelerator, line: dict[str, Any]) -> None:
    """A line of metrics.jsonl; {"held_out": {"new": 1.0}} is called held_out/new."""
    numbers: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            numbers |= {f"{name}/{part}": number for part, number in value.items()}
        elif name != "step" and isinstance(value, int | float):
            numbers[name] = value
    accelerator.log(numbers, step=line["step"])
