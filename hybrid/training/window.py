"""The numbers of the steps since the last line of metrics.jsonl, and the clock of training alone."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hybrid.training.checkpoints import Progress


class Clock:
    """Seconds of training, without those of evaluating and saving."""

    def __init__(self) -> None:
        self.tokens = self.steps = 0
        self._began = 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        since = time.perf_counter()
        yield
        self._began += time.perf_counter() - since

    def tokens_per_second(self) -> float:
        return self.tokens / (time.perf_counter() - self._began) if self.tokens else 0.0

    def seconds_per_step(self) -> float:
        return (time.perf_counter() - self._began) / self.steps


class Window:
    """The steps since the last metrics line; their numbers stay on the device until they are asked for."""

    def __init__(self, progress: Progress, device: torch.device) -> None:
        self.loss_sum = torch.tensor(progress.loss_sum, device=device)
        self.grad_norm = torch.tensor(progress.grad_norm, device=device)
        self.steps = progress.counted
        self.skipped = progress.skipped
        self.skipped_in_row = progress.skipped_in_row
        self.clock = Clock()

    def add(self, loss: Tensor, grad_norm: Tensor, tokens: int, is_good: bool) -> None:
        """A step that was taken, or was not: such a one has no numbers."""
        if is_good:
            self.loss_sum += loss
            self.grad_norm = torch.maximum(self.grad_norm, grad_norm.float())
            self.steps += 1
            self.skipped_in_row = 0
        else:
            self.skipped += 1
            self.skipped_in_row += 1
        self.clock.steps += 1
        self.clock.tokens += tokens

    def loss(self) -> float:
        """The mean of the steps that were taken."""
        return self.loss_sum.item() / self.steps

    def close(self) -> None:
        """Begin the next window."""
        self.loss_sum.zero_()
        self.grad_norm.zero_()
        self.steps = self.skipped = 0

    def progress(
        self,
        step: int,
        before: dict[str, float],
        place: dict[str, Any] | None,
        keep_place: dict[str, Any] | None,
    ) -> Progress:
        return Progress(
            step=step,
            loss_sum=self.loss_sum.item(),
            grad_norm=self.grad_norm.item(),
            counted=self.steps,
            skipped=self.skipped,
            skipped_in_row=self.skipped_in_row,
            held_out_before=before,
            place=place,
            keep_place=keep_place,
        )
