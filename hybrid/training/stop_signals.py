"""SIGINT, SIGTERM, SIGHUP while a run trains: the step is finished and saved, then the signal ends it.

Ctrl-C, a scheduler that takes a machine back, a closed terminal and `kill` send them. A second one ends the
process at once. Where a launcher started several processes it passes on what it got, so that one signal may
come twice: what comes within _SAME_SECONDS of the first is the same there.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

import torch
from accelerate import PartialState

NOTED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_SAME_SECONDS = 2.0


class StopSignals:
    """Notes the signals while a block runs; as a context manager.

    In a thread other than the main one, where Python allows no handlers, and for a signal that the caller
    ignores (nohup), everything stays as it is. At the end the handlers are again those that were there.
    """

    def __init__(self, processes: PartialState) -> None:
        self._processes = processes
        self._before: dict[int, Any] = {}
        self._came = 0  # which signal
        self._since = 0.0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in NOTED:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._came:
            self._came, self._since = number, time.monotonic()
            if self._processes.is_main_process:
                name = signal.Signals(number).name
                told = f"\n{name}: the step is finished and saved first; a second one ends the run at once\n"
                with suppress(OSError):
                    os.write(2, told.encode())  # print may be what was interrupted
        elif self._processes.num_processes == 1 or time.monotonic() - self._since > _SAME_SECONDS:
            # Python's own handler of Ctrl-C raises KeyboardInterrupt, which lets the caller clear up
            signal.signal(number, self._before[number] if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self) -> int:
        """The signal that came to any process, the same on all; 0: none. Every process asks."""
        if self._processes.num_processes == 1:
            return self._came
        came = torch.tensor(self._came, device=self._processes.device)
        torch.distributed.all_reduce(came, torch.distributed.ReduceOp.MAX)
        return int(came)


def end_by(number: int) -> NoReturn:
    """End this process as the signal would have; a handler of the caller's own gets it first."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.raise_signal(number)
    raise SystemExit(128 + number)
