"""What reaches PyTorch, and what autograd keeps: counted, without a GPU."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trm_kernels.launch import LAUNCHERS

_ROOM = re.compile(r"(new_)?empty(_like|_strided)?")
_VIEWS = ("_unsafe_view", "_reshape_alias")  # which no schema calls so


class Counting(TorchDispatchMode):
    """Counts the calls that reach PyTorch by name, ours among them, and the bytes that it allocates.

    inside_ours   count what our custom ops ask of PyTorch (products, memory) in place of the ops themselves;
                  their launches are the launch door's to record
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
        """The calls that compute or move something: of these PyTorch starts a kernel."""
        return self._computing


def storages_kept(run: Callable[[], Any], own: Iterable[Tensor]) -> list[Tensor]:
    """One tensor for each storage that autograd holds after `run`, besides those of the tensors in `own`."""
    known = {t.untyped_storage()._cdata for t in own}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in known:
            kept[t.untyped_storage()._cdata] = t  # held, so that its address is not given to another
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _ = run()
    return list(kept.values())


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the whole storages of these tensors."""
    return sum(t.untyped_storage().nbytes() for t in tensors)
