"""What reaches PyTorch, and what autograd keeps."""

import re
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# of these PyTorch starts no kernel
_VIEWS = re.compile(
    r"(_unsafe_)?view|expand|(un)?squeeze|t|transpose|permute|split(_with_sizes)?|unbind|slice|select|alias|detach"
)
_ROOM = re.compile(r"(new_)?empty(_like|_strided)?")


class Counting(TorchDispatchMode):
    """Counts the calls that reach PyTorch by name, ours among them, and the bytes that it allocates."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        self.calls[name] += 1
        if _ROOM.fullmatch(name):
            self.bytes += out.nbytes
        return out

    def computing(self):
        """The calls that compute or move something."""
        return Counter(
            {
                name: n
                for name, n in self.calls.items()
                if not (_VIEWS.fullmatch(name) or _ROOM.fullmatch(name))
            }
        )


def storages_kept(run, own):
    """One tensor for each storage that autograd holds after `run`, besides those of the tensors in `own`."""
    known = {t.untyped_storage()._cdata for t in own}
    kept = {}

    def pack(t):
        if t.untyped_storage()._cdata not in known:
            kept[t.untyped_storage()._cdata] = t  # held, so that its address is not given to another
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _ = run()
    return list(kept.values())


def nbytes(tensors):
    """Bytes of the whole storages of these tensors."""
    return sum(t.untyped_storage().nbytes() for t in tensors)
