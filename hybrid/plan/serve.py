"""What serving a hybrid takes of one card: keys and values, requests that fit, the least time a token.

A token's keys and values are those of each layer of the language model, and of each evaluation of each layer
of each TRM. A layer with a sliding window keeps no more tokens than that.

A decoding step computes one token for each request. It reads the weights once for all requests, and each
request's keys and values. The least time is that traffic at the card's bandwidth or the products at its peak,
whichever is longer: no launch, no activation and no sampling is in it. A TRM's weights are read again in each
evaluation, unless a cache of the card holds them; both times are told.

Not counted: activations, pages that are not full, and what a server keeps free.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hybrid.model.injection import Injection, trm_evaluations
from hybrid.model.trm_names import is_trm_key
from hybrid.plan.memory import CUDA_BYTES
from hybrid.plan.run import Run

AT_ONCE = (1, 4, 16)  # requests, for which times are told; and as many as fit


@dataclass(frozen=True)
class Step:
    """One decoding step of so many requests, all of them full.

    seconds          at least; the TRMs' weights are read once
    seconds_reread   at least, where they are read in each evaluation
    seconds_base     of the language model alone
    """

    requests: int
    seconds: float
    seconds_reread: float
    seconds_base: float


@dataclass(frozen=True)
class Serving:
    """Bytes on one card.

    base_weights, trm_weights           all of them in the dtype that is computed in
    base_token, trm_token               keys and values of one token, where no window is full
    request, request_base               keys and values of one whole sequence, with and without the TRMs'
    requests, requests_base             that fit beside the weights
    """

    base_weights: float
    trm_weights: float
    base_token: float
    trm_token: float
    request: float
    request_base: float
    requests: int
    requests_base: int
    steps: tuple[Step, ...]


def serving(run: Run) -> Serving:
    """What serving `run.base` with its TRMs takes of `run.card`, for sequences of `run.sequence_length`."""
    itemsize = run.compute_dtype.itemsize
    of_base, of_trm = (
        itemsize * sum(p.numel() for n, p in run.parameters() if is_trm_key(n) == is_trm)
        for is_trm in (False, True)
    )
    base_token, base_request = _base_keys(run)
    spec = run.config.recursion_spec
    evaluations = trm_evaluations(run.config, spec, None) * len(run.config.injection_layers)
    width = run.config.trm_hidden_size // spec.num_heads
    trm_token = float(2 * evaluations * spec.num_key_value_heads * width * itemsize)
    request = base_request + trm_token * run.sequence_length
    room = run.card.memory_bytes - CUDA_BYTES - of_base
    fit, fit_base = max(0, int((room - of_trm) // request)), max(0, int(room // base_request))
    counts = [count for count in AT_ONCE if count < fit] + [fit] * (fit > 0)
    found = Serving(of_base, of_trm, base_token, trm_token, request, base_request, fit, fit_base, ())
    steps = tuple(_step(run, found, count) for count in counts)
    return Serving(**{**vars(found), "steps": steps})


def _base_keys(run: Run) -> tuple[float, float]:
    """(bytes of one token, of a whole sequence) in the language model's layers."""
    base = run.base.get_text_config(decoder=True)
    heads = getattr(base, "num_key_value_heads", None) or base.num_attention_heads
    width = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    of_layer = 2.0 * heads * width * run.compute_dtype.itemsize
    window = getattr(base, "sliding_window", None)
    types = getattr(base, "layer_types", None)
    if types is None:
        types = ["full_attention" if window is None else "sliding_attention"] * base.num_hidden_layers
    tokens = run.sequence_length
    kept = sum(min(tokens, window) if t == "sliding_attention" and window else tokens for t in types)
    return of_layer * base.num_hidden_layers, of_layer * kept


def _step(run: Run, found: Serving, requests: int) -> Step:
    card, spec = run.card, run.config.recursion_spec
    itemsize = run.compute_dtype.itemsize
    recursions = [m.recursion for m in run.model().modules() if isinstance(m, Injection)]
    of_f = itemsize * sum(p.numel() for trm in recursions for p in trm.layers.parameters())
    times = spec.num_cycles * (spec.num_recursion_steps + 1)
    peak = card.float32_flops_per_s if itemsize == 4 else card.flops_per_s
    # two operations for each weight that a token meets; the embeddings are looked up
    embeddings = next(run.model().get_input_embeddings().parameters()).numel() * itemsize
    is_tied = getattr(run.base.get_text_config(decoder=True), "tie_word_embeddings", False)
    met = found.base_weights - (0 if is_tied else embeddings)

    def seconds(weights: float, keys: float, products: float) -> float:
        return max((weights + requests * keys) / card.bytes_per_s, requests * 2 * products / itemsize / peak)

    trm_met = found.trm_weights + (times - 1) * of_f
    return Step(
        requests,
        seconds(met + found.trm_weights, found.request, met + trm_met),
        seconds(met + trm_met, found.request, met + trm_met),
        seconds(met, found.request_base, met),
    )


def as_json(found: Serving) -> dict[str, Any]:
    """The same figures, unrounded: bytes and seconds."""
    return asdict(found)


def lines(run: Run, found: Serving) -> Iterator[str]:
    """The table."""
    n = run.config.num_recursion_steps
    yield f"{run.base_name} with a TRM of width {run.config.trm_hidden_size}, n = {n}"
    dtype = str(run.compute_dtype).removeprefix("torch.")
    yield f"served on one {run.card.name} in {dtype}, sequences of {run.sequence_length:,} tokens"
    yield ""
    yield f"GB (10^9 bytes){'base':>25}{'TRM':>12}{'both':>12}"
    yield _row("weights", found.base_weights, found.trm_weights)
    trm_request = found.request - found.request_base
    yield _row("keys and values of a sequence", found.request_base, trm_request)
    kinds = (found.base_token, found.trm_token, found.base_token + found.trm_token)
    yield f"{'  bytes of them a token':<28}" + "".join(f"{size:>12,.0f}" for size in kinds)
    yield ""
    yield f"requests that fit: {found.requests:,}; of the base alone: {found.requests_base:,}"
    if not found.steps:
        return
    yield ""
    yield "least ms a token, requests      base     both   both, TRM read every time   tokens/s at most"
    for step in found.steps:
        ms = [1e3 * s for s in (step.seconds_base, step.seconds, step.seconds_reread)]
        rate = step.requests / step.seconds
        yield f"  {step.requests:>6,} at once{ms[0]:>20.2f}{ms[1]:>9.2f}{ms[2]:>27.2f}{rate:>19,.0f}"


def _row(what: str, base: float, trm: float) -> str:
    return f"  {what:<26}" + "".join(f"{size / 1e9:>12.3f}" for size in (base, trm, base + trm))
