"""Counts the calls that reach PyTorch and the bytes that autograd keeps, without a GPU."""

import re
from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from hybrid.plan.kept import nbytes as nbytes
from hybrid.plan.kept import storages_kept as storages_kept
from trm_kernels.runtime.launch import LAUNCHERS

_ROOM = re.compile(r"(new_)?empty(_like|_strided)?")
_VIEWS = ("_unsafe_view", "_reshape_alias")  # which no schema calls so


class Counting(TorchDispatchMode):
    """Counts the calls that reach PyTorch by name, ours among them, and the bytes that it allocates.

    inside_ours   count the PyTorch calls inside our custom ops (products, memory) instead of the ops
                  themselves; runtime/launch.py records their launches
    """

    def __init__(self, inside_ours: bool = False) -> None:
        super().__init__()
        self.inside_ours = inside_ours
        self.calls: Counter[str] = Counter()
        self.bytes = 0
        self._computing: Counter[str] = Counter()

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = op.overloadpacket.__name__
        if self.inside_ours and op.namespace == "trm_kernels":
            with self:
                return LAUNCHERS[name](*args, **(kwargs or {}))
        out = op(*args, **(kwargs or {}))
        self.calls[name] += 1
        if _ROOM.fullmatch(name):
            self.bytes += out.nbytes
        elif not op.is_view and name not in _VIEWS:
            self._computing[name] += 1
        return out

    def computing(self) -> Counter[str]:
        """The calls that compute or move data: PyTorch starts a kernel for each."""
        return self._computing
