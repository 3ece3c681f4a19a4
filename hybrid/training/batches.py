"""Which items each process trains on in each step.

All items have one order, a function of the data and the seed; step s takes those from s * items_per_step on.
So a run goes on exactly with another number of processes, as long as a step has as many items as before.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hybrid.data.collate import IGNORED, collate
from hybrid.data.stream import StreamPlace, TokenStream

_FINGERPRINT_ITEMS = 64


class Batch(NamedTuple):
    """B items in one forward.

    inputs   what a model is given, by its arguments' names
    rows     which row of a stream's text, or item of a data set, each of them is
    lengths  tokens of each, without what pads it
    """

    inputs: dict[str, Tensor]
    rows: list[int]
    lengths: list[int]


@dataclass(frozen=True)
class Share:
    """What one process has of a step: `accumulate` batches of `batch_size` items.

    rank, processes   which process, of how many
    items             of a step, over all processes, where it is not as many as fill the batches
    """

    rank: int
    processes: int
    batch_size: int
    accumulate: int
    items: int | None = None

    @property
    def items_per_step(self) -> int:
        return self.processes * self.batch_size * self.accumulate if self.items is None else self.items

    def has(self, number: int) -> bool:
        """Whether item `number` of a step is this process's: items go around."""
        return number % self.processes == self.rank

    def split(self, ratio: float) -> tuple["Share", "Share"]:
        """(the rest, `ratio` of the items of a step), each in batches of its own.

        Errors: ValueError when one of them would have no item.
        """
        items = self.items_per_step
        of_ratio = round(ratio * items)
        if not 0 < of_ratio < items:
            raise ValueError(
                f"train: expected keep_ratio to be a share of the {items} items of a step that leaves both "
                f"at least one, got {ratio}, {of_ratio} of {items}."
            )
        # the last process begins the second part, so that none is without an item
        last_first = replace(self, rank=self.processes - 1 - self.rank, items=of_ratio)
        return replace(self, items=items - of_ratio), last_first


def shares_of(share: Share, keep_ratio: float | None, is_split: bool) -> tuple[Share, Share | None]:
    """A step's items: (of the data, of what is kept).

    is_split   the model is, among the processes

    Errors: ValueError where a process would have other items than the others, of a model that is split.
    """
    if keep_ratio is None:
        return share, None
    both = share.split(keep_ratio)
    if is_split and any(part.items_per_step % share.processes for part in both):
        raise ValueError(
            "train: expected keep_ratio to give every process as many items, as all have to call a split "
            f"model equally, got {both[1].items_per_step} of {share.items_per_step} items for "
            f"{share.processes} processes."
        )
    return both


@dataclass(frozen=True)
class LengthCurriculum:
    """Short items first: in step s, counted from 0, as many tokens as `at(s)` says, then all.

    An item is cut to its first so many tokens. One in which no label is left then, because it is answered at
    its end only, is passed over: the next that fits takes its place, and it comes again in the next pass.

    first   tokens in step 0
    last    tokens up to which this grows, evenly
    steps   in which it does

    Errors: ValueError, with what was expected and what came.
    """

    first: int
    last: int
    steps: int

    def __post_init__(self) -> None:
        if not (2 <= self.first <= self.last and self.steps >= 1):
            raise ValueError(
                f"LengthCurriculum: expected a first length in 2..{self.last} tokens and at least 1 step, "
                f"got {self.first} and {self.steps}."
            )

    def at(self, step: int) -> int | None:
        """Tokens of an item in `step`; None: all of them."""
        if step >= self.steps:
            return None
        return self.first + (self.last - self.first) * step // self.steps


def batches(
    data: Dataset | TokenStream,
    seed: int,
    share: Share,
    steps: range,
    place: dict[str, Any] | None,
    curriculum: LengthCurriculum | None = None,
) -> Iterator[tuple[list[Batch], dict[str, Any]]]:
    """(this process's batches of a step, where the data is after it), for each of `steps`.

    place   where the data is before the first of them, as it came from here; None: no item was passed over

    Errors: ValueError when a curriculum passes over everything.
    """
    if isinstance(data, TokenStream):
        items = _streamed(data, place)
    else:
        items = _shuffled(data, seed, steps.start * share.items_per_step, place)
    for step in steps:
        length = None if curriculum is None else curriculum.at(step)
        mine, rows = [], []
        of_step = items if length is None else _cut(items, length)
        for number in range(share.items_per_step):
            make, row, place = next(of_step)
            if share.has(number):
                mine.append(make())
                rows.append(row)
        assert place is not None, "a step has items"
        parts = [slice(i, i + share.batch_size) for i in range(0, len(mine), share.batch_size)]
        lengths = [len(item["input_ids"]) for item in mine]
        yield [Batch(collate(mine[part]), rows[part], lengths[part]) for part in parts], place


# (makes the item, which row of the text or item of the data it is, where the data is after it)
Item = tuple[Callable[[], dict[str, Tensor]], int, dict[str, Any]]


def _streamed(data: TokenStream, place: dict[str, Any] | None) -> Iterator[Item]:
    for row, after in data.rows(None if place is None else StreamPlace(**place)):
        yield partial(row.item, data.separate), row.number, asdict(after)


def _shuffled(data: Dataset, seed: int, start: int, place: dict[str, Any] | None) -> Iterator[Item]:
    """Items from `place`, or else number `start` on: a new shuffle for every pass; item p is a function of
    (seed, p) alone.
    """
    items = count(data)
    this_pass, first = divmod(start, items) if place is None else (place["passes"], place["taken"])
    while True:
        number = random.Random(f"{seed}:{this_pass}").getrandbits(63)
        order = torch.randperm(items, generator=torch.Generator().manual_seed(number))
        for taken, index in enumerate(order[first:], start=first + 1):
            index = int(index)
            yield partial(data.__getitem__, index), index, {"passes": this_pass, "taken": taken}
        this_pass, first = this_pass + 1, 0


def _cut(items: Iterator[Item], length: int) -> Iterator[Item]:
    """The first `length` tokens of each item in which a label is left."""
    last_pass = None  # in which one has to be left
    for make, row, place in items:
        item = {name: t[:length] for name, t in make().items()}
        if (item["labels"][1:] != IGNORED).any():
            yield partial(dict, item), row, place
            last_pass = None
        elif last_pass is None:
            last_pass = place["passes"] + 1
        elif place["passes"] > last_pass:
            raise ValueError(
                f"data: expected items with a label in their first {length} tokens (the curriculum's), got "
                "none in a whole pass."
            )


def count(data: Dataset) -> int:
    return len(cast(Any, data))  # torch's Dataset does not promise a length


def describe_items(data: Dataset) -> dict[str, Any]:
    """What tells data from other data. Errors: ValueError when there is no item."""
    items = count(data)
    if not items:
        raise ValueError("train: expected data with at least one item, got none.")
    digest = hashlib.sha256()
    for index in range(0, items, max(1, items // _FINGERPRINT_ITEMS)):
        for name, tensor in sorted(data[index].items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
    return {
        "items": items,
        "tokens": len(data[0]["input_ids"]),
        "sha256 of a sample": digest.hexdigest(),
    }
