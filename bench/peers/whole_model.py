"""W3 and W4 whole: a level-1 hybrid on LLaMA-2-7B's shape, next to its base alone. The weights are random.

    training   a phase-1 step: forward, loss, gradients of the TRMs' parameters; the base is frozen
    decoding   one more token after a prompt of about 2048; each further call has one more token in the cache

The cost of the hybrid is its difference to the base alone, which is the same model with its injections off.
Ours uses the kernels. Eager is the reference with SDPA for its attention. The logits of the two must agree.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from bench.measure.run import Budget, difference, in_short, within
from bench.measure.store import Store
from bench.measure.timing import Run, Timer, card_state, peak_bytes, ratios, spread
from hybrid import HybridConfig, HybridModel
from hybrid.bases import KNOWN_BASES
from hybrid.model.cache_name import as_argument
from hybrid.model.injection import Injection
from hybrid.presets import PresetConfigs
from trm_kernels.runtime.backend import backend

PEERS = ("base alone", "ours", "eager")
LIMIT = 0.05  # relative difference of logits, bfloat16 through 32 layers of random weights
_TINY = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
)


def build(device: str, is_tiny: bool) -> HybridModel:
    """A frozen base and a TRM whose W_out is random; a fresh W_out is zero and adds nothing."""
    torch.manual_seed(0)
    base_config = _TINY if is_tiny else KNOWN_BASES["llama-2-7b"]
    config = PresetConfigs.llama_2_7b_level1()
    if is_tiny:
        config = HybridConfig(
            injection_layers=[1, 2], trm_hidden_size=32, trm_num_heads=2, trm_input_norm=False
        )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(base_config)
            model = HybridModel(llm_model=base, config=config)
    finally:
        torch.set_default_dtype(before)
    for injection in (m for m in model.modules() if isinstance(m, Injection)):
        torch.nn.init.normal_(injection.out_proj.weight, std=0.5 * injection.out_proj.weight.shape[1] ** -0.5)
    return model.freeze_base()


@contextmanager
def as_peer(model: HybridModel, peer: str) -> Iterator[None]:
    """In the block the model computes as `peer` does."""
    before = model.config.trm_attention
    if peer == "base alone":
        with model.disable_injection():
            yield
        return
    try:
        model.config.trm_attention = "sdpa" if peer == "eager" else "auto"
        with backend("reference" if peer == "eager" else "triton"):
            yield
    finally:
        model.config.trm_attention = before


def _ids(model: HybridModel, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), generator=generator)
    return ids.to(model.device)


def training(model: HybridModel, peer: str, batch: int, tokens: int) -> Run:
    """A training step. Returns the loss; `logits` below returns the logits."""
    ids = _ids(model, batch, tokens)
    trained = [p for p in model.trm_parameters() if p.requires_grad]

    def step() -> Any:
        with as_peer(model, peer):
            if peer == "base alone":  # nothing to train: its forward only
                with torch.no_grad():
                    return model(ids, labels=ids, use_cache=False).loss
            loss = model(ids, labels=ids, use_cache=False).loss
            return torch.autograd.grad(loss, trained, allow_unused=True)

    return step


def decoding(model: HybridModel, peer: str, batch: int, context: int) -> Run:
    """Decode one more token at every call."""
    ids = _ids(model, batch, context)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), as_peer(model, peer):
        for part in ids[:, :-1].split(512, dim=1):
            model(part, use_cache=True, logits_to_keep=1, **as_argument(cache))

    def step() -> Any:
        with torch.no_grad(), as_peer(model, peer):
            return model(ids[:, -1:], use_cache=True, **as_argument(cache)).logits

    return step


def _logits(model: HybridModel, peer: str, tokens: int) -> Tensor:
    with torch.no_grad(), as_peer(model, peer):
        logits: Tensor = model(_ids(model, 1, tokens), use_cache=False).logits
    return logits


def measure(store: Store, device: str, kind: str, batch: int, budget: Budget, is_tiny: bool) -> None:
    """Measure every peer that is missing in `store`. kind: "W3" or "W4"."""
    if all(store.is_done(peer) for peer in PEERS):
        return
    timer, model = Timer(device), build(device, is_tiny)
    tokens = 12 if is_tiny else 2048
    make: Callable[..., Run] = training if kind == "W3" else decoding
    title = {"W3": "phase-1 training step", "W4": "decoding one token"}[kind]
    store.set_facts(
        workload=f"{kind}, whole model, batch {batch}",
        title=f"level 1 on LLaMA-2-7B's shape, {title}; base alone: forward only",
        batch=batch,
        tokens=tokens,
    )
    for peer in PEERS:
        if store.is_done(peer):
            continue
        store.start(peer)
        try:
            with within(budget.limit):
                store.finish(peer, **_measure_one(model, peer, make, batch, tokens, timer, budget))
        except Exception as error:
            store.finish(peer, state="failed", why=in_short(error))
        if timer.on_gpu:
            torch.cuda.empty_cache()


def _measure_one(
    model: HybridModel,
    peer: str,
    make: Callable[..., Run],
    batch: int,
    tokens: int,
    timer: Timer,
    budget: Budget,
) -> dict[str, Any]:
    run = make(model, peer, batch, tokens)
    first = timer.once(run)
    if peer == "ours":
        apart = difference(*(_logits(model, either, min(tokens, 256)) for either in ("ours", "eager")))
        if not apart <= LIMIT:
            return {"state": "wrong", "why": f"logits are {apart:.1e} from eager's, allowed {LIMIT}"}
    runs = {"it": run}
    if peer == "eager":
        try:
            runs["ours"] = make(model, "ours", batch, tokens)
            runs["ours"]()
        except Exception:  # ours' own record says why
            runs.pop("ours", None)
    times = timer.interleaved(runs, budget.seconds, budget.rounds)
    facts: dict[str, Any] = {"warm": spread(times["it"])}
    if "ours" in runs:
        facts["warm"] |= {"ours": spread(times["ours"]), "ours_faster": ratios(times["it"], times["ours"])}
    peak = peak_bytes(run, "cuda" if timer.on_gpu else "cpu")
    facts |= {"first_call_s": first, "peak_bytes": peak, "card": card_state() if timer.on_gpu else {}}
    return {"state": "ok", **facts}
