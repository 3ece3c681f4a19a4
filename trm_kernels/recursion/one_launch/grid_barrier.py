"""A barrier for all programs of one cooperative launch, and the counters it counts on.

Program 0 adds 2^31 - (N - 1) to the counter, each of the other N - 1 programs adds 1, in whatever order they
arrive, and each waits until the counter's sign is no longer the one it found. Why that is a barrier:

- All N together add 2^31, modulo 2^32. So after a whole barrier the sign has flipped and the other 31 bits
  are what they were: 0, if they were 0 at the start. Nothing has to be reset, not even between
  launches.
- The sign does not flip before the last program arrives. Without program 0 the lower bits count at most to N
  - 1, far from 2^31. With it they stand at 2^31 minus the number of programs that are still missing, which
  is a carry short for as long as one is.
- No program misses the flip. For the sign to flip back, all N would have to arrive at the next barrier, and
  the one that is still waiting at this one cannot.
- What was written before is seen after. Within a program all threads pass a block-wide barrier before one of
  them arrives, and another after it has seen the flip. The arrival releases and the poll acquires, for the
  whole GPU: by an atomic addition of 0, which becomes a load that acquires. A volatile load would order
  nothing.

After b barriers the counter is 0 if b is even and -2^31 if it is odd.

All N programs have to run at once. A cooperative launch sees to that: the driver refuses a grid that does not
fit instead of starting a part of it.
"""

import torch
from torch import Tensor

from trm_kernels.recursion.one_launch.cooperative import Impossible
from trm_kernels.runtime.optional_triton import tl, triton


@triton.jit
def grid_barrier(counter_ptr):
    """Wait until all programs have come here. counter_ptr: int32, see above."""
    tl.debug_barrier()
    others = tl.num_programs(0) - 1
    arrival = tl.where(tl.program_id(0) == 0, -2147483648 - others, 1).to(tl.int32)
    before = tl.atomic_add(counter_ptr, arrival, sem="acq_rel", scope="gpu")
    now = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while (before ^ now) >= 0:  # while the signs agree
        now = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


class Counters:
    """The counters of one device, int32 and zero: one for each stream, one for each captured launch.

    Launches of one stream follow each other and may share a counter; those of two streams may run at
    once, and so may two graphs that were captured on one stream. All are allocated together, outside of
    any graph's memory: a counter has to keep its value from one replay to the next. There are so many
    that it does not matter when the first is given again.
    """

    STREAMS, CAPTURED = 1024, 3072
    _APART = 32  # elements from one to the next: a cache line each

    def __init__(self, device: torch.device) -> None:
        count = self.STREAMS + self.CAPTURED
        self._all = torch.zeros(count, self._APART, dtype=torch.int32, device=device)
        self._of_stream: dict[int, int] = {}
        self._captured = 0

    def take(self, stream: int, is_capturing: bool) -> Tensor:
        """The counter of a stream; a fresh one for a launch that is being captured into a graph."""
        if is_capturing:
            i = self.STREAMS + self._captured % self.CAPTURED
            self._captured += 1
        else:
            i = self._of_stream.setdefault(stream, len(self._of_stream) % self.STREAMS)
        return self._all[i, 0]


_counters: dict[torch.device, Counters] = {}


def counter_for(device: torch.device) -> Tensor:
    """The counter for a launch on the current stream of `device`.

    Errors: Impossible where the first launch of all is one that is being captured.
    """
    stream, is_capturing = 0, False
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        is_capturing = torch.cuda.is_current_stream_capturing()
    if device not in _counters:
        if is_capturing:
            raise Impossible(
                "it expected a call before a CUDA graph is captured, since its counters have to lie outside "
                "of the graph's memory"
            )
        _counters[device] = Counters(device)
        if device.type == "cuda":  # other streams do not wait for this one, which sets them to zero
            torch.cuda.current_stream(device).synchronize()
    return _counters[device].take(stream, is_capturing)
