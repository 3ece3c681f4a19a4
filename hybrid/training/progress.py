"""What a training run shows: a bar where there is a terminal, a line now and then where there is none."""

import sys
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingDisplay:
    """Loss, tokens/s and time left, as a context manager.

    steps   in all
    done    already, before this run
    shown   False shows nothing: all processes but the main one
    """

    def __init__(self, steps: int, done: int, shown: bool) -> None:
        self._steps = steps
        self._shown = shown
        self._bar = None
        if shown and sys.stdout.isatty():
            self._bar = Progress(
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
            )
            self._task = self._bar.add_task("training", total=steps, completed=done, numbers="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def numbers(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """What metrics.jsonl gets: the loss in nats per token, the speed, the time left."""
        numbers = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, numbers=numbers)
        elif self._shown:
            minutes, seconds = divmod(round(seconds_left), 60)
            print(f"step {step}/{self._steps}  {numbers}  {minutes}:{seconds:02d} left", flush=True)

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        elif self._shown:
            print(line, flush=True)
