"""Where the tensors of a list lie, as numbers that a kernel reads: a kernel's signature has no lists.

A kernel is given the first tensor of each list, and of every other its distance to the first, in steps of 16
bytes: so Triton knows that the others are as well aligned as the first. The table depends on the addresses
alone; it is copied to the device when one of them is new, as when a cache makes room, and not once a call.
A captured CUDA graph reads its tables whenever it is replayed, so they are kept for good.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from trm_kernels.runtime.launch import is_recording
from trm_kernels.runtime.optional_triton import tl, triton

_STEP = 16  # bytes


@triton.jit
def of_list(first_ptr, distances_ptr, index):
    """The pointer to a tensor of a list, `index` being the place of its distance; of no list, None."""
    ptr = first_ptr
    if first_ptr is not None:
        ELEMENTS: tl.constexpr = 128 // first_ptr.dtype.element_ty.primitive_bitwidth
        ptr += tl.load(distances_ptr + index) * ELEMENTS
    return ptr


def distances(lists: Sequence[Sequence[Tensor]]) -> Tensor:
    """The table of some lists of tensors, one list after the other, [tensors] int64 on their device."""
    device = lists[0][0].device
    if is_recording():
        return torch.empty(sum(map(len, lists)), dtype=torch.int64, device=device)
    found: list[int] = []
    for tensors in filter(None, lists):
        first = tensors[0].data_ptr()
        assert all((t.data_ptr() - first) % _STEP == 0 for t in tensors), "checked by the caller"
        found += ((t.data_ptr() - first) // _STEP for t in tensors)
    return _table(device, tuple(found)).on_this_stream()


def are_in_step(tensors: Sequence[Tensor]) -> bool:
    """Whether `distances` can say where they lie; assumed of tensors without memory (recorded, traced)."""
    if not tensors or is_recording() or torch.compiler.is_compiling():
        return True
    return all((t.data_ptr() - tensors[0].data_ptr()) % _STEP == 0 for t in tensors)


class _Table:
    """Distances on the device, and the stream that copied them there."""

    def __init__(self, device: torch.device, found: tuple[int, ...]) -> None:
        self.distances = torch.tensor(found, dtype=torch.int64).to(device)
        if device.type == "cuda":
            self.stream = torch.cuda.current_stream(device)
            self.copied = self.stream.record_event()

    def on_this_stream(self) -> Tensor:
        """The distances, for a launch on the current stream; whichever it is, they are there by then."""
        device = self.distances.device
        if device.type != "cuda":
            return self.distances
        if torch.cuda.is_current_stream_capturing():  # torch.cuda.graph waits for all streams beforehand
            _in_graphs.add(self)
        elif (stream := torch.cuda.current_stream(device)) != self.stream:
            stream.wait_event(self.copied)
            self.distances.record_stream(stream)
        return self.distances


_in_graphs: set[_Table] = set()


@lru_cache(maxsize=1024)
def _table(device: torch.device, found: tuple[int, ...]) -> _Table:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "trm_recursion: the regime 'one_launch' expected weights and caches that lie where they lay in a "
            "call before the CUDA graph is captured, got others. Weights that are cast for the call do not: "
            "keep them in the dtype that is computed in."
        )
    return _Table(device, found)
