"""The training run: its loop, folder, checkpoints and processes."""

from typing import TYPE_CHECKING

from hybrid.lazy import names_of

if TYPE_CHECKING:
    from hybrid.training.loop import TrainResult, train
    from hybrid.training.settings import TrainSettings

_WHERE = {
    "TrainResult": "hybrid.training.loop",
    "TrainSettings": "hybrid.training.settings",
    "train": "hybrid.training.loop",
}

__all__ = ["TrainResult", "TrainSettings", "train"]

__getattr__, __dir__ = names_of(__name__, _WHERE)
