"""Which items each process trains on in each step.

All items have one order, a function of the data and the seed; step s takes those from s * items_per_step on.
So a run goes on exactly with another number of processes, as long as a step has as many items as before.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hybrid.collate import collate
from hybrid.data import StreamPlace, TokenStream

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Share:
    """What one process has of a step: `accumulate` batches of `batch_size` items.

    rank, processes   which process, of how many
    """

    rank: int
    processes: int
    batch_size: int
    accumulate: int

    @property
    def items_per_step(self) -> int:
        return self.processes * self.batch_size * self.accumulate

    def has(self, number: int) -> bool:
        """Whether item `number` of a step is this process's: batches go around."""
        return number // self.batch_size % self.processes == self.rank


def batches(
    data: Dataset | TokenStream, seed: int, share: Share, steps: range, place: dict[str, Any] | None
) -> Iterator[tuple[list[Batch], dict[str, Any] | None]]:
    """(this process's batches of a step, where the data is after it), for each of `steps`.

    place   where a stream is before the first of them, as it came from here; None: its beginning
    """
    if isinstance(data, TokenStream):
        items = _streamed(data, place)
    else:
        items = _shuffled(data, seed, steps.start * share.items_per_step)
    for _ in steps:
        mine = []
        for number in range(share.items_per_step):
            make, place = next(items)
            if share.has(number):
                mine.append(make())
        yield (
            [collate(mine[i : i + share.batch_size]) for i in range(0, len(mine), share.batch_size)],
            place,
        )


def _streamed(data: TokenStream, place: dict[str, Any] | None) -> Iterator[tuple[Callable[[], Batch], Any]]:
    for row, after in data.rows(None if place is None else StreamPlace(**place)):
        yield partial(row.item, data.separate), asdict(after)


def _shuffled(data: Dataset, seed: int, start: int) -> Iterator[tuple[Callable[[], Batch], None]]:
    """Items from number `start` on: a new shuffle for every pass; item p is a function of (seed, p) alone."""
    items = count(data)
    this_pass, first = divmod(start, items)
    while True:
        number = random.Random(f"{seed}:{this_pass}").getrandbits(63)
        order = torch.randperm(items, generator=torch.Generator().manual_seed(number))
        for index in order[first:]:
            yield partial(data.__getitem__, int(index)), None
        this_pass, first = this_pass + 1, 0


def count(data: Dataset) -> int:
    return len(cast(Any, data))  # torch's Dataset does not promise a length
