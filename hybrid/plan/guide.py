"""The training guide's four levels and its cost sheet, line by line: claim, computed figure, verdict.

Every figure is computed here, by the planner or by arithmetic on the claim's own numbers; a verdict is a
comparison of the two. `trm-hybrid plan --guide` prints it, docs/guide-checked.md keeps it, a test compares.
Times are the roofline's: the least that a training can take (work.py).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch

from hybrid.bases import KNOWN_BASES, LEVELS, PRESET_BASES
from hybrid.info import count
from hybrid.plan.cards import CARDS
from hybrid.plan.fit import Fit, fit
from hybrid.plan.memory import memory
from hybrid.plan.run import Run
from hybrid.plan.work import BYTES_PER_TOKEN, TOKENS_PER_PARAMETER, Cost, Speed, cost, speed, work
from hybrid.presets import PRESETS

TRUE, NOT_TRUE = "true", "not true"
A100 = CARDS["A100-80GB"]
DOLLARS_PER_HOUR = 3.0  # the cost sheet's
_HOUR, _DAY, _WEEK = 3600.0, 86400.0, 7 * 86400.0
# LLaMA-2-70B's own training: arXiv 2307.09288, table 2
_LLAMA_2_HOURS, _LLAMA_2_TOKENS = 1_720_320, 2e12


@dataclass(frozen=True)
class Claim:
    """A line of the guide or of the cost sheet, and what became of it."""

    says: str
    computed: str
    verdict: str


def guide() -> str:
    """All of it, as Markdown."""
    lines = [
        "# The training guide and its cost sheet, checked",
        "",
        "Written by `trm-hybrid plan --guide`; a test says when it is stale. Parameters are counted from",
        "the modules, memory and operations as `trm-hybrid plan` counts them (base in bfloat16, in float32",
        "where it learns, TRM in float32, AdamW, sequences of 2,048 tokens, batch 1 a card). GB are 10^9",
        "bytes. Days and tokens come from the roofline: the least time, the most tokens, that are possible.",
        f"Text has {BYTES_PER_TOKEN:g} bytes a token. Prices are the cost sheet's.",
    ]
    for title, claims in _SECTIONS.items():
        lines += ["", f"## {title}", "", "| claim | computed | verdict |", "|---|---|---|"]
        lines += [f"| {claim.says} | {claim.computed} | {claim.verdict} |" for claim in claims()]
    return "\n".join(lines)


# What is computed, once


@cache
def _run(level: int, cards: int = 1, card: str = "A100-80GB", phase: int = 1) -> Run:
    if (cards, card, phase) != (1, "A100-80GB", 1):
        run = _run(level).but(cards=cards, card=CARDS[card], phase=phase)
        return run.but(dtype="float32") if phase == 2 else run
    base = PRESET_BASES[LEVELS[level]]
    return Run(base, KNOWN_BASES[base], PRESETS[LEVELS[level]](), CARDS[card], cards, phase)


@cache
def _fit(level: int, cards: int, card: str, phase: int = 1) -> Fit:
    return fit(_run(level, cards, card, phase))


@cache
def _speed(level: int, cards: int, card: str = "A100-80GB") -> Speed:
    """Of phase 1, as it fits; of the claim's number of cards even where more are needed."""
    run = _fit(level, cards, card).run
    assert run is not None, "every level fits some number of cards"
    found = speed(run)
    share = cards / run.cards
    return Speed(found.seconds, found.utilisation, found.source, share * found.tokens_per_second)


@cache
def _parameters(level: int) -> tuple[int, int]:
    """(the base's, the TRMs')"""
    model = _run(level).model()
    trm = sum(p.numel() for p in model.trm_parameters())
    return count(model) - trm, trm


def _cost(level: int, cards: int, tokens: float) -> Cost:
    return cost(_run(level, cards), tokens, _speed(level, cards), DOLLARS_PER_HOUR)


@cache
def _gflop(level: int, phase: int = 1) -> float:
    """10^9 operations for a token, with nothing computed again."""
    parts = work(_run(level, phase=phase)).parts
    return sum(flops.all for name, flops in parts.items() if "again" not in name) / 1e9


def _flops_ratio(level: int) -> float:
    """Operations for a token if everything learned, over those of phase 1."""
    return _gflop(level, phase=2) / _gflop(level)


def _tokens_of(gpu_hours: float, level: int) -> float:
    """Tokens that phase 1 of a level trains on in so many hours of an A100, at most."""
    cards = 16
    return gpu_hours * _HOUR * _speed(level, cards).tokens_per_second / cards


def _scratch_hours(parameters: float, tokens: float) -> float:
    """GPU-hours of A100s from nothing, 6 N D operations, at the roofline's share of the peak."""
    return 6 * parameters * tokens / (A100.flops_per_s * A100.products) / _HOUR


# How it is said and judged


def _billions(number: float) -> str:
    return f"{number / 1e9:,.2f} B"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _dollars(number: float) -> str:
    return f"${number:,.0f}"


def _text(tokens: float) -> str:
    return f"{tokens / 1e9:,.2f} G tokens, {tokens * BYTES_PER_TOKEN / 1e9:,.1f} GB of text"


def _is(holds: bool) -> str:
    return TRUE if holds else NOT_TRUE


def _within(value: float, low: float, high: float = float("inf")) -> bool:
    """To the precision of the claims: two figures."""
    return 0.99 * low <= value <= 1.01 * high


def _arithmetic(
    says: str, value: float, claimed: float, shown: Callable[[float], str], only_if: str = ""
) -> Claim:
    holds = abs(value - claimed) <= 0.01 * claimed
    return Claim(says, shown(value), f"true only if {only_if}" if holds and only_if else _is(holds))


# The levels


# the last of each is what docs/planner.md plans with
_HARDWARE = {
    1: ((1, "RTX4090"), (1, "A100-80GB")),
    2: ((2, "A100-40GB"), (1, "A100-80GB")),
    3: ((8, "A100-80GB"),),
    4: ((16, "H100-80GB"),),
}
LEVEL_HARDWARE = {level: named[-1] for level, named in _HARDWARE.items()}
# what the guide says: billions of TRM parameters and in total, GB of memory, GB of data
_SAYS = {
    1: ((1, 2), (8, 9), (16, 18), (1, 10)),
    2: ((3, 5), (16, 18), (32, 36), (10, 100)),
    3: ((15, 20), (85, 90), (170, 180), (100, 1000)),
    4: ((50,), (120,), (240,), (1000,)),
}


def _levels() -> Iterator[Claim]:
    for level, (trm_says, total_says, memory_says, data_says) in _SAYS.items():
        base, trm = _parameters(level)
        name = f"Level {level}"
        yield Claim(
            f"{name}: TRM of {_range(trm_says)} B", _billions(trm), _is(_within(trm / 1e9, *trm_says))
        )
        total = base + trm
        yield Claim(
            f"{name}: total of {_range(total_says)} B",
            _billions(total),
            _is(_within(total / 1e9, *total_says)),
        )
        half = 2.0 * total
        needed = memory(_run(level, *_HARDWARE[level][0])).total
        holds = _within(half / 1e9, *memory_says)
        yield Claim(
            f"{name}: memory of {_range(memory_says)} GB (FP16)",
            f"weights {_gb(half)}; training them in phase 1 with one copy on one card {_gb(needed)}",
            "true only if it is not trained: weights alone"
            if holds
            else f"{NOT_TRUE}: weights alone take less, training more",
        )
        for cards, card in _HARDWARE[level]:
            for phase in (1, 2):
                yield _hardware(name, level, cards, card, phase)
        yield _data(name, level, data_says)


def _range(numbers: tuple[int, ...]) -> str:
    return f"{numbers[0]:,}+" if len(numbers) == 1 else "-".join(f"{n:,}" for n in numbers)


def _hardware(name: str, level: int, cards: int, card: str, phase: int) -> Claim:
    run, found = _run(level, cards, card, phase), _fit(level, cards, card, phase)
    says = f"{name}: {cards}x {card}, phase {phase}"
    taken = f"{_gb(memory(run).total)} a card of {_gb(run.card.memory_bytes)}"
    if found.run is None:
        return Claim(says, taken, f"{NOT_TRUE}: nothing that was tried makes it fit")
    if not found.changes:
        return Claim(says, taken, TRUE)
    taken += f"; changed, {_gb(memory(found.run).total)}"
    changes = "; ".join(found.changes)
    if found.run.cards > cards:
        return Claim(says, taken, f"{NOT_TRUE}: it takes {changes}")
    return Claim(says, taken, f"true only if {changes}")


def _data(name: str, level: int, gigabytes: tuple[int, ...]) -> Claim:
    cards, card = _HARDWARE[level][-1]
    days = [
        size * 1e9 / BYTES_PER_TOKEN / _speed(level, cards, card).tokens_per_second / 86400
        for size in gigabytes
    ]
    shown = " to ".join(f"{d:,.1f}" for d in days)
    month = 28
    verdict = (
        TRUE
        if days[-1] <= month
        else NOT_TRUE
        if days[0] > month
        else f"true only if less than {month} days of it"
    )
    return Claim(
        f"{name}: {_range(gigabytes)} GB of text, in 1-4 weeks",
        f"{shown} days on {cards}x {card} at least",
        verdict,
    )


def _training() -> Iterator[Claim]:
    for level in LEVELS:
        ratio = _flops_ratio(level)
        yield Claim(
            f"Level {level}: training only the TRM is much faster",
            f"phase 2 takes {ratio:.2f} times phase 1's operations for a token",
            f"true only if fewer tokens are meant: a frozen base saves {1 - 1 / ratio:.0%} of a token's work",
        )
    for level in LEVELS:
        token, plain = _gflop(level), 6 * sum(_parameters(level)) / 1e9
        yield Claim(
            f"Level {level}: ... and much cheaper than training as many parameters from scratch",
            f"{token:,.0f} GFLOP for a token of phase 1; 6 a parameter are {plain:,.0f}",
            f"true only if fewer tokens are meant: a token costs {token / plain:.2f} times as much",
        )
    eps, half = 1e-8, torch.float16
    rounded = torch.tensor(eps, dtype=half).item()
    yield Claim(
        "Phase 2: AdamW on all parameters, loaded in float16",
        f"AdamW's eps of {eps:g} is {rounded:g} in float16: a zero moment divides by zero",
        _is(rounded > 0) + "; float32 or bfloat16 weights train",
    )


# The costs


def _from_scratch() -> Iterator[Claim]:
    base = _parameters(3)[0]
    hours = 1000 * 24 * 90
    rate = A100.flops_per_s * A100.products
    tokens = hours * _HOUR * rate / (6 * base)
    theirs = _LLAMA_2_TOKENS * 6 * base / (_LLAMA_2_HOURS * _HOUR * A100.flops_per_s)
    yield _arithmetic("1,000 A100s at $15,000: $15,000,000", 1000 * A100.dollars, 15e6, _dollars)
    yield _arithmetic("with servers, about $20,000,000", 15e6 + 5e6, 20e6, _dollars)
    yield _arithmetic("1,000 GPUs x 400 W = 400 kW", 1000 * A100.watts / 1e3, 400, lambda kw: f"{kw:,.0f} kW")
    yield _arithmetic("power: $350,000 a year", 400 * 24 * 365 * 0.10, 350e3, _dollars)
    yield _arithmetic("1,000 GPUs x 24 h x 90 d = 2,160,000 GPU-hours", hours, 2.16e6, lambda h: f"{h:,.0f}")
    yield Claim(
        "3-6 months on 1,000 A100s train a 70B",
        f"90 days are at most {tokens / 1e12:.1f} T tokens; LLaMA-2-70B took {_LLAMA_2_HOURS:,} GPU-hours "
        f"for {_LLAMA_2_TOKENS / 1e12:g} T, {theirs:.0%} of the peak",
        _is(hours >= _LLAMA_2_HOURS),
    )
    low, high = 3 * hours, 5 * hours
    claimed = low == 6.48e6 and high == 10.8e6
    yield Claim("$3-5 an hour: $6,480,000-10,800,000", f"{_dollars(low)} to {_dollars(high)}", _is(claimed))
    people_and_data = 2e6 + 1e6 + 0.5e6 + 0.3e6
    total_low, total_high = low + people_and_data, 20e6 + 350e3 + 200e3 + people_and_data
    alone = DOLLARS_PER_HOUR * _scratch_hours(base, TOKENS_PER_PARAMETER * base)
    yield Claim(
        "in total $10-50 million",
        f"the sheet's own lines: {_dollars(total_low)} rented, {_dollars(total_high)} bought. Computing "
        f"alone: {_dollars(alone)} at least for {TOKENS_PER_PARAMETER} tokens a parameter, "
        f"{_dollars(DOLLARS_PER_HOUR * _LLAMA_2_HOURS)} for LLaMA-2's hours",
        "true only if people, data and bought machines count"
        if _within(total_low, 10e6, 50e6) and _within(total_high, 10e6, 50e6)
        else NOT_TRUE,
    )


def _injection() -> Iterator[Claim]:
    base, trm = _parameters(3)
    cards = 16
    ratio = _flops_ratio(3)
    of_phase_1 = 2 * _WEEK / _HOUR * cards
    yield Claim(
        "70 B + 15 B = 85 B, of which 15 B train",
        f"{_billions(base)} + {_billions(trm)} = {_billions(base + trm)}",
        _is(_within((base + trm) / 1e9, 85, 85) and _within(trm / 1e9, 15, 16)),
    )
    for number in (8, 16):
        yield _hardware("8-16 A100s", 3, number, "A100-80GB", 1)
    yield _arithmetic("16 x $15,000 = $240,000", cards * A100.dollars, 240e3, _dollars)
    yield _arithmetic("16 GPUs x 24 h x 21 d = 8,064 GPU-hours", cards * 24 * 21, 8064, lambda h: f"{h:,.0f}")
    phases = cards * 24 * 28
    yield Claim(
        "those 21 days are phase 1 (weeks 1-2) and phase 2 (weeks 3-4)",
        f"four weeks are 28 days, {phases:,} GPU-hours, {_dollars(3 * phases)}",
        _is(phases == 8064),
    )
    yield _arithmetic("8,064 h x $3 = $24,192", DOLLARS_PER_HOUR * 8064, 24192, _dollars)
    days = [_cost(3, cards, size * 1e9 / BYTES_PER_TOKEN).days for size in (100, 1000)]
    yield Claim(
        "1-4 weeks, with level 3's 100 GB-1 TB of text",
        f"phase 1 on {cards} A100s: {days[0]:,.0f} to {days[1]:,.0f} days at least; three weeks are at most "
        f"{_text(_tokens_of(8064, 3))}",
        _is(days[0] <= 28),
    )
    price = DOLLARS_PER_HOUR * of_phase_1
    yield Claim(
        "phase 1 (weeks 1-2): $5,000-15,000",
        f"16 GPUs for two weeks {_dollars(price)}; 8 GPUs {_dollars(price / 2)}",
        TRUE if price <= 15000 else "true only if on 8 to 14 GPUs" if price / 2 <= 15000 else NOT_TRUE,
    )
    yield Claim(
        "phase 1 is cheap because the base stays frozen",
        f"a token takes 1/{ratio:.2f} of the operations of training everything",
        "true only if fewer tokens are meant" if ratio < 2 else TRUE,
    )
    yield _hardware("phase 2 on the same cards", 3, cards, "A100-80GB", 2)
    yield Claim(
        "phase 2 (weeks 3-4): $10,000-25,000",
        f"16 GPUs for two weeks {_dollars(price)}",
        f"true only if {'; '.join(_fit(3, cards, 'A100-80GB', 2).changes) or 'it is run for two weeks'}"
        if 10000 <= price <= 25000
        else NOT_TRUE,
    )
    whole = DOLLARS_PER_HOUR * phases
    yield Claim(
        "in total $10,000-100,000",
        f"four weeks rented {_dollars(whole)}; the cards bought {_dollars(cards * A100.dollars)}",
        "true only if rented, and four weeks suffice" if 10e3 <= whole <= 100e3 else NOT_TRUE,
    )
    from_nothing = DOLLARS_PER_HOUR * _scratch_hours(base + trm, _tokens_of(8064, 3))
    yield Claim(
        "85 B capabilities at 1% of the traditional cost",
        f"$24,192 are {24192 / 10e6:.2%} of $10 million, and {_text(_tokens_of(8064, 3))}; "
        f"as many parameters from nothing on as many tokens: {_dollars(from_nothing)}",
        "true only if those tokens suffice; what a hybrid of 85 B can do is not computed here",
    )


def _scenarios() -> Iterator[Claim]:
    for who, dollars in (("academic researcher", 5e3), ("startup", 25e3), ("enterprise", 100e3)):
        hours = dollars / DOLLARS_PER_HOUR
        yield Claim(
            f"{who}: an 85 B hybrid for {_dollars(dollars)}",
            f"{hours:,.0f} GPU-hours, at most {_text(_tokens_of(hours, 3))}",
            "true only if so much text suffices: level 3 asks for 100 GB",
        )
    hours, days = 100e3 / DOLLARS_PER_HOUR, 30
    yield Claim(
        "enterprise: $100,000, in one month",
        f"{hours / 24 / days:,.0f} A100s for {days} days",
        "true only if on so many cards",
    )


def _level_2_example() -> Iterator[Claim]:
    base, trm = _parameters(2)
    total = base + trm
    hours = _scratch_hours(total, TOKENS_PER_PARAMETER * total)
    yield _arithmetic("16 B from scratch: 200 x $15,000 = $3,000,000", 200 * A100.dollars, 3e6, _dollars)
    yield _arithmetic("200 GPUs x 2,000 h x $3 = $1,200,000", 200 * 2000 * 3, 1.2e6, _dollars)
    yield Claim(
        "16 B from scratch takes those 400,000 GPU-hours",
        f"{hours:,.0f} at least for {TOKENS_PER_PARAMETER} tokens a parameter; 400,000 are at most "
        f"{400e3 / hours * TOKENS_PER_PARAMETER * total / 1e12:.1f} T tokens",
        "true only if trained on some trillions of tokens" if hours < 400e3 else TRUE,
    )
    yield Claim("2-3 months", f"2,000 h are {2000 / 24:.0f} days", _is(60 <= 2000 / 24 <= 92))
    yield Claim(
        "LLaMA-2-13B + 3 B of TRM", f"{_billions(base)} + {_billions(trm)}", _is(_within(trm / 1e9, 3, 3.5))
    )
    yield _hardware("4 A100s", 2, 4, "A100-80GB", 1)
    yield _arithmetic("4 x $15,000 = $60,000", 4 * A100.dollars, 60e3, _dollars)
    yield _arithmetic("4 GPUs x 168 h x $3 = $2,016", 4 * 168 * 3, 2016, _dollars)
    tokens = _WEEK * _speed(2, 4).tokens_per_second
    least = 10e9 / BYTES_PER_TOKEN
    yield Claim(
        "one week, with level 2's 10-100 GB of text",
        f"at most {_text(tokens)}",
        TRUE
        if tokens >= 10 * least
        else "true only if no more text than that"
        if tokens >= least
        else NOT_TRUE,
    )
    saved = 1 - 2016 / 1.2e6
    yield Claim(
        "99.8% cost reduction",
        f"{saved:.1%} by the sheet's own figures; a token costs 1/{_flops_ratio(2):.2f} of training all",
        "true only if a week's tokens are compared with trillions" if round(saved, 3) == 0.998 else NOT_TRUE,
    )
    faster = 2000 / 168
    yield Claim("12x faster", f"{faster:.1f} times", _is(round(faster) == 12) + " of the sheet's own figures")


def _not_computed() -> Iterator[Claim]:
    for says in (
        "you get 85 B total capability with minimal training",
        "fast convergence: the TRM learns to enhance, not replace",
        "smaller data sets suffice",
        "risk: low (the base already works)",
    ):
        yield Claim(says, "nothing here computes it", "not shown by anybody at this size")


_SECTIONS: dict[str, Callable[[], Iterator[Claim]]] = {
    "The four levels": _levels,
    "Training strategy": _training,
    "Cost sheet: from scratch": _from_scratch,
    "Cost sheet: TRM injection, level 3": _injection,
    "Cost sheet: three scenarios": _scenarios,
    "Cost sheet: level 2 as an example": _level_2_example,
    "What no planner computes": _not_computed,
}
