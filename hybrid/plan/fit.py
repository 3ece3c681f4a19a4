"""The smallest change that makes a training fit: from harmless to costly, then taken back where it can be.

Harmless changes come first: another policy of the TRMs costs a forward of them, gradient checkpointing one of
what learns, a smaller batch with accumulation almost nothing at first. Shards cost traffic between cards.
Weights of bfloat16 learn with noise; LoRA and an 8-bit base change what is trained. More cards cost money.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce

from hybrid.config import HybridConfig, trm_fields
from hybrid.plan.memory import fits
from hybrid.plan.run import Run

LORA_RANK = 16
MOST_CARDS = 4096


@dataclass(frozen=True)
class Change:
    """One thing done otherwise."""

    says: str
    make: Callable[[Run], Run]


@dataclass(frozen=True)
class Fit:
    """changes   none where it fits as it is
    run       with the changes; None: nothing that is tried makes it fit"""

    changes: tuple[str, ...]
    run: Run | None


def fit(run: Run) -> Fit:
    """What has to change."""
    if fits(run):
        return Fit((), run)
    taken: list[Change] = []
    for change in _ladder(run):
        # a later rung of a kind stands in for the earlier one
        taken = [c for c in taken if c.says.split()[0] != change.says.split()[0]] + [change]
        if fits(_with(run, taken)):
            break
    else:
        return Fit((), None)
    for change in sorted(taken[:-1], key=taken.index, reverse=True):
        fewer = [c for c in taken if c is not change]
        if fits(_with(run, fewer)):
            taken = fewer
    return Fit(tuple(c.says for c in taken), _with(run, taken))


def _with(run: Run, changes: list[Change]) -> Run:
    return reduce(lambda r, change: change.make(r), changes, run)


def _ladder(run: Run) -> Iterator[Change]:
    if run.config.trm_save != "step":
        yield Change("trm_save step", _set_save)
    if not run.checkpointing:
        yield Change("gradient checkpointing", lambda r: r.but(checkpointing=True))
    parts = 2
    while run.batch_size % parts == 0:
        yield Change(
            f"batch {run.batch_size // parts} with accumulation {run.accumulation * parts}", _divide(parts)
        )
        parts *= 2
    for shards in range(run.shards + 1, run.cards + 1):
        if run.cards % shards == 0:
            yield Change(f"shards: {shards}", _set_shards(shards))
    if run.trains_base and run.dtype == "float32":
        yield Change(
            "bfloat16 weights with stochastic rounding",
            lambda r: r.but(dtype="bfloat16") if r.trains_base else r,
        )
    if run.trains_base:
        yield Change(
            f"lora_rank {LORA_RANK} in place of the base",
            lambda r: r.but(lora=LORA_RANK, dtype="bfloat16"),
        )
    if run.dtype != "int8":
        yield Change("int8 base", lambda r: r.but(dtype="int8") if not r.trains_base else r)
    cards = run.cards
    while (cards := 2 * cards) <= MOST_CARDS:
        yield Change(f"cards: {cards}, all of them shards", _set_cards(cards))


def _set_save(run: Run) -> Run:
    fields = {name: getattr(run.config, name) for name in trm_fields()}
    return run.but(config=HybridConfig(**fields | {"trm_save": "step"}))


def _divide(parts: int) -> Callable[[Run], Run]:
    return lambda r: r.but(batch_size=r.batch_size // parts, accumulation=r.accumulation * parts)


def _set_shards(shards: int) -> Callable[[Run], Run]:
    return lambda r: r.but(shards=shards)


def _set_cards(cards: int) -> Callable[[Run], Run]:
    return lambda r: r.but(cards=cards, shards=cards)
