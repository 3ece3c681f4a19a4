"""A plan: everything about a run, as a table for people and as JSON for programs."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybrid.info import count, count_trained, parts
from hybrid.plan.fit import Fit, fit
from hybrid.plan.memory import Memory, memory, saved_by_policy, units
from hybrid.plan.run import Run
from hybrid.plan.work import (
    BYTES_PER_TOKEN,
    TOKENS_PER_PARAMETER,
    Cost,
    Speed,
    Work,
    cached_bytes,
    cost,
    from_scratch,
    speed,
    work,
)


@dataclass(frozen=True)
class Wishes:
    """What is asked about a run.

    tokens        of text to train on; None: no days and no money
    utilisation   share of the card's peak; None: measured (`results`) or by the roofline
    price         dollars per GPU-hour; None: the card's
    card_price    dollars per card; None: the card's
    results       a folder of measurements, from which the share of the peak may come; None: not read
    """

    tokens: float | None = None
    utilisation: float | None = None
    price: float | None = None
    card_price: float | None = None
    results: Path | None = None


@dataclass(frozen=True)
class Plan:
    """A run, what it needs as given, and the run that fits. Work and time describe the run that fits."""

    run: Run
    memory: Memory
    saved: dict[str, tuple[int, int]]
    fit: Fit
    fitted: Memory | None
    work: Work
    speed: Speed
    cost: Cost | None
    scratch: Cost


def plan(run: Run, wishes: Wishes) -> Plan:
    """Everything about a run; where it does not fit, time and money are of the run that does.

    Errors: ValueError for tokens, prices and utilisations that there cannot be.
    """
    for name in ("tokens", "price", "card_price", "utilisation"):
        value = getattr(wishes, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"plan: expected {name.replace('_', ' ')} above 0, got {value:g}.")
    if wishes.utilisation is not None and wishes.utilisation > 1:
        raise ValueError(f"plan: expected a utilisation of at most 1, got {wishes.utilisation:g}.")
    found = fit(run)
    fitting = found.run or run
    fast = speed(fitting, wishes.utilisation, wishes.results)
    prices = wishes.price, wishes.card_price
    return Plan(
        run=run,
        memory=memory(run),
        saved=saved_by_policy(run),
        fit=found,
        fitted=None if found.run is None else memory(found.run),
        work=work(fitting),
        speed=fast,
        cost=None if wishes.tokens is None else cost(fitting, wishes.tokens, fast, *prices),
        scratch=from_scratch(fitting, fast, *prices),
    )


def as_json(made: Plan) -> dict[str, Any]:
    """The same figures, unrounded: bytes, operations, seconds, dollars."""
    model = made.run.model()
    return {
        "run": described(made.run),
        "parameters": {
            **{part.name: part.parameters for part in parts(model)},
            "total": count(model),
            "trained": count_trained(model),
        },
        "memory": _memory(made.memory),
        "saved_activations": {
            save: {"plain": plain, "gradient_checkpointing": checkpointed}
            for save, (plain, checkpointed) in made.saved.items()
        },
        "largest_fsdp_unit_parameters": _largest_unit(made.run)[1],
        "fits": made.memory.fits,
        "changes": None if made.fit.run is None else list(made.fit.changes),
        "fitting_run": None if made.fit.run is None else described(made.fit.run),
        "fitting_memory": None if made.fitted is None else _memory(made.fitted),
        "flops_per_token": {
            **{name: flops.all for name, flops in made.work.parts.items()},
            "total": made.work.total.all,
            "everything_trained": _everything(made).all,
        },
        "speed": asdict(made.speed),
        "cost": None if made.cost is None else asdict(made.cost),
        "cached_hidden_states_bytes": cached_bytes(made.fit.run or made.run, made.cost.tokens)
        if made.cost
        else None,
        "from_scratch": asdict(made.scratch),
    }


def described(run: Run) -> dict[str, Any]:
    """What was planned, in plain values."""
    return {
        "base": run.base_name,
        "injection_layers": run.config.injection_layers,
        "trm_hidden_size": run.config.trm_hidden_size,
        "trm_save": run.config.trm_save,
        "cards": f"{run.cards}x{run.card.name}",
        **{
            name: getattr(run, name)
            for name in (
                "phase",
                "sequence_length",
                "batch_size",
                "accumulation",
                "shards",
                "dtype",
                "lora",
                "checkpointing",
            )
        },
    }


def _memory(found: Memory) -> dict[str, Any]:
    return {
        "bytes": found.rows,
        "total": found.total,
        "headroom": found.headroom,
        "capacity": found.capacity,
        "trm_save": found.save,
    }


def _everything(made: Plan) -> Any:
    """Operations for a token if the whole model learned."""
    run = made.fit.run or made.run
    return work(run.but(phase=2, lora=None, dtype="bfloat16")).total


def _largest_unit(run: Run) -> tuple[str, int]:
    sizes = {name: sum(p.numel() for p in unit) for name, unit in units(run).items() if name != "root"}
    name = max(sizes, key=sizes.__getitem__)
    return name, sizes[name]


# For people


def lines(made: Plan) -> Iterator[str]:
    """The table."""
    run, model = made.run, made.run.model()
    yield f"{run.base_name} with a TRM of width {run.config.trm_hidden_size} after layers " + ", ".join(
        map(str, run.config.injection_layers)
    )
    yield how(run)
    yield ""
    yield "parameters"
    by_kind: dict[str, int] = {}
    for part in parts(model):
        kind = "base" if part.name == "base" else f"TRM, {part.name.partition(': ')[2]}"
        by_kind[kind] = by_kind.get(kind, 0) + part.parameters
    by_kind |= {"total": count(model), "trained": count_trained(model)}
    for name, parameters in by_kind.items():
        yield f"  {name:<38}{parameters:>17,}"
    yield ""
    yield "GB (10^9 bytes) on each card"
    yield from _memory_lines(made.memory)
    yield ""
    yield f"GB of saved activations by trm_save{'':<9}{'plain':>9}  with gradient checkpointing"
    for save, (plain, checkpointed) in made.saved.items():
        yield f"  {save:<38}{plain / 1e9:>13.2f}{checkpointed / 1e9:>15.2f}"
    name, parameters = _largest_unit(run)
    yield f"  largest FSDP unit: {name}, {parameters:,} parameters"
    yield ""
    yield from _fit_lines(made)
    yield ""
    yield from _work_lines(made)


def how(run: Run) -> str:
    """Phase, cards, batch, in one line."""
    rounding = " with stochastic rounding" if run.trains_base and run.dtype == "bfloat16" else ""
    said = [
        f"phase {run.phase}{'' if run.lora is None else f' with LoRA of rank {run.lora}'}",
        f"{run.cards} x {run.card.name}{'' if run.shards == 1 else f' in shards of {run.shards}'}",
        f"batch {run.batch_size} x {run.sequence_length:,} tokens a card"
        + ("" if run.accumulation == 1 else f", {run.accumulation} times a step"),
        f"base in {run.dtype}{rounding}",
    ]
    return ", ".join([*said, *(["gradient checkpointing"] if run.checkpointing else [])])


def _memory_lines(found: Memory) -> Iterator[str]:
    for name, size in found.rows.items():
        note = f" (trm_save {found.save})" if name == "saved activations" else ""
        yield f"  {name + note:<38}{size / 1e9:>13.2f}"
    yield f"  {'total':<38}{found.total / 1e9:>13.2f}"
    yield f"  {'the card has':<38}{found.capacity / 1e9:>13.2f}"
    yield f"  {'headroom':<38}{found.headroom / 1e9:>13.2f}"


def _fit_lines(made: Plan) -> Iterator[str]:
    if made.memory.fits:
        yield "it fits"
    elif made.fit.run is None or made.fitted is None:
        yield "it does not fit, and nothing that was tried makes it fit"
    else:
        yield f"it does not fit. It fits with: {'; '.join(made.fit.changes)}"
        yield f"then: {how(made.fit.run)}; GB on each card:"
        yield from _memory_lines(made.fitted)


def _work_lines(made: Plan) -> Iterator[str]:
    run, of_step = made.fit.run or made.run, made.speed
    yield "GFLOP for a token" + ("" if made.memory.fits or made.fit.run is None else ", with the changes")
    for name, flops in made.work.parts.items():
        yield f"  {name:<38}{flops.all / 1e9:>13.2f}"
    total, everything = made.work.total.all, _everything(made).all
    yield f"  {'total':<38}{total / 1e9:>13.2f}"
    yield f"  {'if everything learned':<38}{everything / 1e9:>13.2f}  {everything / total:.2f} times as much"
    yield ""
    least = ", the least that it can take" if of_step.source == "roofline" else ""
    yield f"time, at {of_step.utilisation:.0%} of the peak ({of_step.source}{least})"
    yield f"  {'seconds a step':<38}{of_step.seconds:>13.3f}  {run.tokens_of_step:,} tokens"
    yield f"  {'tokens a second':<38}{of_step.tokens_per_second:>13,.0f}"
    if made.cost is None:
        yield "  Pass --tokens or --gigabytes to estimate time and cost."
    else:
        yield ""
        yield from _cost_lines(f"cost of {made.cost.tokens / 1e9:,.4g} G tokens", made.cost, run)
        if cached := cached_bytes(run, made.cost.tokens):
            yield f"  {'GB on disk, --cache-hidden-states':<38}{cached / 1e9:>13,.1f}  if all in one pass"
    yield ""
    tokens = f"{TOKENS_PER_PARAMETER} tokens for each, {made.scratch.tokens / 1e9:,.0f} G tokens"
    yield from _cost_lines(f"from scratch: as many parameters, {tokens}", made.scratch, run)


def _cost_lines(title: str, of: Cost, run: Run) -> Iterator[str]:
    yield title
    yield f"  {'days':<38}{of.days:>13,.1f}"
    yield f"  {'GPU-hours':<38}{of.gpu_hours:>13,.0f}"
    hourly = of.cloud_dollars / of.gpu_hours
    yield f"  {'dollars, rented':<38}{of.cloud_dollars:>13,.0f}  at {hourly:.2f} a GPU-hour"
    bought = f"for {run.cards} card{'s' * (run.cards > 1)}, and power for {of.power_dollars:,.0f}"
    yield f"  {'dollars, bought':<38}{of.cards_dollars:>13,.0f}  {bought}"


def text_tokens(gigabytes: float, bytes_per_token: float = BYTES_PER_TOKEN) -> float:
    """Tokens of so much text. Errors: ValueError for tokens without bytes."""
    if not bytes_per_token > 0:
        raise ValueError(f"plan: expected bytes per token above 0, got {bytes_per_token:g}.")
    return gigabytes * 1e9 / bytes_per_token
