"""What belongs to the call in progress: one value a thread, which hooks and traced code can read.

`torch.compile` cannot trace a ContextVar. While it traces, the value is a plain attribute: a trace has the
process to itself.
"""

from contextvars import ContextVar, Token
from typing import Any

import torch


class CallInProgress:
    """A ContextVar that may be used in traced code; None where no call is in progress."""

    def __init__(self, name: str) -> None:
        self._of_thread: ContextVar[Any] = ContextVar(name, default=None)
        self._of_trace: Any = None
        self._is_traced = False

    def get(self) -> Any:
        return self._of_trace if self._is_traced else self._of_thread.get()

    def set(self, value: Any) -> Token[Any] | None:
        """What `reset` takes."""
        if torch.compiler.is_compiling():
            self._of_trace, self._is_traced = value, True
            return None
        return self._of_thread.set(value)

    def reset(self, before: Token[Any] | None) -> None:
        if self._is_traced or before is None:
            self._of_trace, self._is_traced = None, False
        else:
            self._of_thread.reset(before)
