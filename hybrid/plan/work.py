"""Operations for a token, seconds for a step, then days, hours and money for a text.

A product of a matrix with a vector is two operations for each of its elements; attention is causal, so half
of all pairs. Backward is as much as forward for the gradients that pass through, and as much again for
matrices that learn; attention's is 2.5 times its forward. Below the first point that learns there is no
backward. What a policy or gradient checkpointing computes again is counted.

Seconds come from a share of the card's peak, whose source is said:

    given      by --utilisation
    measured   the injections of level 1 (W3) on this card, from a file of `python -m bench.gpu` (--results)
    roofline   products and attention at the shares in cards.py, and AdamW's traffic at 90% of the bandwidth

Not counted: pointwise passes, communication between cards, loading data. So the roofline's seconds are the
least that it can take, not a forecast: LLaMA-2-70B itself was trained at 43% of its A100s' peak (1,720,320
GPU-hours for 2 T tokens, arXiv 2307.09288, table 2).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from hybrid.bases import KNOWN_BASES
from hybrid.info import count
from hybrid.model.injection import Injection
from hybrid.model.injection_points import decoder_layers
from hybrid.model.trm_names import is_trm_key
from hybrid.plan.memory import memory
from hybrid.plan.run import Run
from hybrid.presets import PresetConfigs
from trm_kernels.recursion.saved_bytes import POLICIES

TOKENS_PER_PARAMETER = 20  # from scratch: Hoffmann et al., 2022, arXiv 2203.15556
BYTES_PER_TOKEN = 4.0  # of English text, assumed
DOLLARS_PER_KWH = 0.10  # the cost sheet's
_BANDWIDTH_SHARE = 0.9
_HOURS = 3600.0


class Flops(NamedTuple):
    """Operations: in products of matrices, and in attention."""

    products: float = 0.0
    attention: float = 0.0

    def __add__(self, other: tuple[float, ...]) -> Self:  # type: ignore[override]
        return type(self)(self.products + other[0], self.attention + other[1])

    def times(self, products: float, attention: float | None = None) -> Self:
        return type(self)(
            self.products * products, self.attention * (products if attention is None else attention)
        )

    @property
    def all(self) -> float:
        return self.products + self.attention


@dataclass(frozen=True)
class Work:
    """Operations for one token of a training step, by part."""

    parts: dict[str, Flops]

    @property
    def total(self) -> Flops:
        return sum(self.parts.values(), start=Flops())


@dataclass(frozen=True)
class Speed:
    """How fast, and how that is known.

    seconds       of an optimizer step
    utilisation   operations over peak times seconds
    source        "given", "measured: FILE" or "roofline"
    """

    seconds: float
    utilisation: float
    source: str
    tokens_per_second: float


@dataclass(frozen=True)
class Cost:
    """Of training on so many tokens."""

    tokens: float
    days: float
    gpu_hours: float
    cloud_dollars: float
    cards_dollars: float
    power_dollars: float


def work(run: Run) -> Work:
    """Operations for one token. With recursion_sampling "uniform", of the mean number of steps."""
    model, config, S = run.model(), run.config, run.sequence_length
    text_config = run.base.get_text_config(decoder=True)
    heads = text_config.num_attention_heads
    head_width = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    attended = 0.5 * 4 * S * heads * head_width
    layers, adapters, answers = [], 0.0, config.supervised_answers
    for i, layer in enumerate(decoder_layers(model.llm_model)):
        rows = answers if i >= config.injection_layers[-1] else 1  # for one that comes in
        own = {n: p for n, p in layer.named_parameters() if not is_trm_key(n) and p.ndim > 1}
        adapters += 2.0 * rows * sum(p.numel() for n, p in own.items() if "lora_" in n)
        products = 2.0 * sum(p.numel() for n, p in own.items() if "lora_" not in n)
        layers.append(Flops(products, attended).times(rows))
    head = Flops(2.0 * text_config.vocab_size * text_config.hidden_size).times(answers)
    first = 0 if run.phase == 2 else config.injection_layers[0]
    above = sum(layers[first:], start=Flops())
    parts = {
        "base, forward": sum(layers, start=head),
        "base, backward": head + above.times(1, 2.5),
    }
    if run.trains_base:
        parts["base, gradients of weights"] = head + sum(layers, start=Flops()).times(1, 0)
    if run.lora is not None:
        parts["LoRA"] = Flops(3 * adapters)
    forward, backward, again = _trm(run, memory(run).save)
    if run.phase == 1:  # nothing below the first TRM learns: no gradient for what it reads
        first_in = next(m for m in model.modules() if isinstance(m, Injection)).in_proj
        backward += (-2.0 * first_in.weight.numel(), 0.0)
    parts |= {"TRM, forward": forward, "TRM, backward": backward}
    if run.checkpointing:
        parts["computed again: base"] = above
        parts["computed again: TRM"] = forward + again
    elif again.all:
        parts["computed again: TRM"] = again
    return Work(parts)


def _trm(run: Run, save: str) -> tuple[Flops, Flops, Flops]:
    """(forward, backward, what the policy computes again) of all points."""
    config = run.config
    n = config.num_recursion_steps
    steps = (n + 1) / 2 if config.recursion_sampling == "uniform" else n
    cycles = config.num_cycles
    with_gradient = (cycles if config.grad_cycles is None else config.grad_cycles) * (steps + 1)
    forward = backward = again = Flops()
    for injection in (m for m in run.model().modules() if isinstance(m, Injection)):
        layers = injection.recursion.layers
        of_layer = [2.0 * sum(p.numel() for p in layer.parameters()) for layer in layers]
        last_product = [
            2.0 * injection.get_parameter(f"recursion.layers.{i}.mlp.down_proj.weight").numel()
            for i in range(len(layers))
        ]
        f = Flops(sum(of_layer), len(layers) * 0.5 * 4 * run.sequence_length * config.trm_hidden_size)
        answers = config.supervised_answers if injection.is_last else 1
        around = 2.0 * (injection.in_proj.weight.numel() + answers * injection.out_proj.weight.numel())
        forward += f.times(cycles * (steps + 1)) + (around, 0.0)
        backward += f.times(2 * with_gradient, 2.5 * with_gradient) + (2 * around, 0.0)
        if (size := POLICIES[save].computes_again) is not None:
            left_out = sum(last_product) if size == "layer" else last_product[-1]
            again += f.times(with_gradient) + (-left_out * with_gradient, 0.0)
    return forward, backward, again


# From operations to seconds


def speed(run: Run, utilisation: float | None = None, results: Path | None = None) -> Speed:
    """Of an optimizer step on all cards.

    results   a folder with a folder a card, of files that `python -m bench.gpu` wrote; None: none is read

    Raises:
        ValueError: `results` is no folder.
    """
    if results is not None and not results.is_dir():
        raise ValueError(f"plan: expected a folder of measurements, got {results}.")
    flops = work(run).total
    tokens = run.tokens_of_card * run.accumulation
    peak = run.card.float32_flops_per_s if run.compute_dtype.itemsize == 4 else run.card.flops_per_s
    source = "given"
    if utilisation is None and results is not None and run.compute_dtype.itemsize < 4:
        utilisation, source = _measured(run, results)
    if utilisation is not None:
        seconds = tokens * flops.all / (peak * utilisation)
    else:
        source = "roofline"
        card = run.card
        rate = peak * card.products
        seconds = tokens * (flops.products / rate + flops.attention / (rate * card.attention))
        seconds += _optimizer_bytes(run) / (card.bytes_per_s * _BANDWIDTH_SHARE)
    return Speed(seconds, tokens * flops.all / (peak * seconds), source, run.tokens_of_step / seconds)


def _optimizer_bytes(run: Run) -> float:
    """AdamW reads weight, gradient and both moments, and writes all but the gradient."""
    trained = (p for _, p in run.parameters() if p.requires_grad)
    return sum(7 * p.numel() * p.element_size() for p in trained) / run.shards


def _measured(run: Run, results: Path) -> tuple[float | None, str]:
    """(the share of its peak that a card reached with ours at W3, the file), or (None, "")."""
    for path in sorted(results.glob("*/*.json")):
        stage = json.loads(path.read_text()).get("stages", {}).get("W3", {"facts": {}, "records": {}})
        facts, record = stage["facts"], stage["records"].get("ours", {})
        if "warm" not in record or _plain(run.card.name).split("-")[0] not in _plain(facts.get("device", "")):
            continue
        level_1 = Run("llama-2-7b", KNOWN_BASES["llama-2-7b"], PresetConfigs.llama_2_7b_level1(), run.card)
        forward, backward, _ = _trm(level_1, "all")
        flops = (forward + backward).all * facts["batch"] * facts["tokens"]
        share = flops / (record["warm"]["ms"] / 1e3 * run.card.flops_per_s)
        return share, f"measured: {path.parent.name}/{path.name}"
    return None, ""


# From seconds to money


def cost(
    run: Run,
    tokens: float,
    of_step: Speed,
    dollars_per_hour: float | None = None,
    dollars_per_card: float | None = None,
) -> Cost:
    """Of training on `tokens` tokens; prices default to the card's."""
    return _cost(run, tokens, tokens / of_step.tokens_per_second, dollars_per_hour, dollars_per_card)


def cached_bytes(run: Run, tokens: float) -> float | None:
    """On disk, of the base's hidden states at the first point of so many tokens; None: nothing to cache."""
    if run.phase == 2 or run.config.injection_layers[0] == 0:
        return None
    return tokens * run.base.get_text_config(decoder=True).hidden_size * run.compute_dtype.itemsize


def from_scratch(
    run: Run,
    of_step: Speed,
    dollars_per_hour: float | None = None,
    dollars_per_card: float | None = None,
) -> Cost:
    """Of training as many parameters from nothing: 6 N D operations, D = 20 N, on these cards, as fast."""
    parameters = count(run.but(lora=None, dtype="bfloat16").model())
    tokens = TOKENS_PER_PARAMETER * parameters
    rate = run.cards * run.card.flops_per_s * of_step.utilisation
    return _cost(run, tokens, 6 * parameters * tokens / rate, dollars_per_hour, dollars_per_card)


def _cost(
    run: Run, tokens: float, seconds: float, dollars_per_hour: float | None, dollars_per_card: float | None
) -> Cost:
    hours = run.cards * seconds / _HOURS
    hourly = run.card.dollars_per_hour if dollars_per_hour is None else dollars_per_hour
    price = run.card.dollars if dollars_per_card is None else dollars_per_card
    return Cost(
        tokens=tokens,
        days=seconds / (24 * _HOURS),
        gpu_hours=hours,
        cloud_dollars=hours * hourly,
        cards_dollars=run.cards * price,
        power_dollars=hours * run.card.watts / 1e3 * DOLLARS_PER_KWH,
    )


def _plain(name: str) -> str:
    return name.upper().replace(" ", "")
