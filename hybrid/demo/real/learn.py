"""One way to learn the game, from the frozen base to what it answers then; in a process of its own."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hybrid.data.blocks import TokenBlocks
from hybrid.demo.real import base as real_base
from hybrid.demo.real.adapters import with_lora, with_recursion
from hybrid.demo.real.game import Game
from hybrid.demo.real.questions import AskedText, Questions
from hybrid.demo.real.training import Known, Model, TrainingPlan, train
from hybrid.demo.texts import split_sources
from hybrid.model.hybrid_model import HybridModel
from hybrid.model.injection_points import decoder_layers
from hybrid.training.evaluate import text_loss
from hybrid.training.processes import seed_everything

BASE, STATES, HYBRID = "base", "states.safetensors", "hybrid"
RECURSION, LORA, NOTHING_LEARNED = "recursion", "LoRA", "nothing"
_ROW = 128  # tokens of ordinary text in a row
_TOGETHER = 20  # texts that are gone on with in one batch
_PROMPT = "The capital of France is"


@dataclass(frozen=True)
class RealEffort:
    """How much is done.

    game                    its longest texts are those that are trained on
    games, kept             texts to train on; rows of ordinary text that are to stay as they are
    steps, lora_steps       of the two trainings, which take about the same time
    questions, rows         held-out texts for each question at the end; rows of each ordinary text
    """

    game: Game
    games: int
    kept: int
    steps: int
    lora_steps: int
    questions: int
    rows: int


@dataclass(frozen=True)
class Learned:
    """What came of it.

    parameters, steps, seconds   what learned, for how long (seconds of CPU time)
    said         for each question at the end: (the text, the right answer, what `generate` went on with)
    by_n         by recursion steps at inference: the share of right answers
    losses       of ordinary text that was held out, nats per token
    goes_on      how an ordinary text goes on
    checks       what was compared bit by bit -> whether it was equal
    """

    learns: str
    parameters: int
    steps: int
    seconds: float
    said: dict[str, list[tuple[str, str, str]]]
    by_n: dict[int, float]
    losses: dict[str, float]
    goes_on: str
    checks: dict[str, bool]

    @property
    def right(self) -> float:
        """The share of right answers."""
        return share_of_right([answer for answers in self.said.values() for answer in answers])


def share_of_right(answers: list[tuple[str, str, str]]) -> float:
    return sum(right == said for _, right, said in answers) / len(answers)


def learn(folder: Path, learns: str, effort: RealEffort, seed: int) -> Learned:
    """Train on the hidden states in `folder`, and measure. The recursion's hybrid is saved there."""
    torch.set_num_threads(1)
    base = real_base.load(folder / BASE)
    tokenizer = real_base.load_tokenizer(folder / BASE)
    seed_everything(seed)
    model = _model(learns, base, seed)
    result = {"steps": 0, "cpu_seconds": 0.0}
    if learns != NOTHING_LEARNED:
        result = _train(model, folder, learns, effort, seed)
    checks: dict[str, bool] = {}
    texts = held_out(effort)
    said = {closing: _said(model.whole, tokenizer, some) for closing, some in texts.items()}
    by_n = {}
    if learns == RECURSION:
        by_n = {n: _right_with(model.whole, tokenizer, texts, n) for n in (1, 2, 4, 8, 12)}
        checks = _checks(model.whole, base, folder, tokenizer(_PROMPT, return_tensors="pt")["input_ids"])
    return Learned(
        learns,
        sum(p.numel() for p in model.trained().values()),
        int(result["steps"]),
        result["cpu_seconds"],
        said,
        by_n,
        {name: text_loss(model.whole, rows, 4).per_token for name, rows in ordinary(tokenizer, effort.rows)},
        _go_on(model.whole, tokenizer),
        checks,
    )


def held_out(effort: RealEffort) -> dict[str, list[AskedText]]:
    """Texts that training never sees, by the question at their end, the last of which is new as well."""
    game = effort.game
    return {
        closing: [game.text(i, True, game.most, closing) for i in range(effort.questions)]
        for closing in (*game.closings, game.new_closing)
    }


def ordinary(tokenizer: Any, rows: int) -> list[tuple[str, TokenBlocks]]:
    """Held-out texts: of the kind that is kept, and of another."""
    return [
        ("help texts", _blocks(tokenizer, prose()[1], "the last tenth of pydoc_data.topics", rows)),
        ("Python sources", _blocks(tokenizer, _sources(), "sources of the standard library", rows)),
    ]


def prose() -> tuple[str, str]:
    """(what may be kept, what is held out) of the texts of Python's own help()."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def _sources() -> str:
    return "\n".join(Path(file).read_text("utf-8") for file in split_sources(500_000, 60_000)[1])


def _blocks(tokenizer: Any, text: str, name: str, rows: int) -> TokenBlocks:
    ids = tokenizer(text[: rows * _ROW * 8], add_special_tokens=False).input_ids
    return TokenBlocks(torch.tensor(ids[: rows * _ROW]), _ROW, name)


def _model(learns: str, base: Any, seed: int) -> Model:
    if learns == NOTHING_LEARNED:
        return Model(base, base, len(decoder_layers(base)))
    return with_lora(base) if learns == LORA else with_recursion(base, seed)


def _train(model: Model, folder: Path, learns: str, effort: RealEffort, seed: int) -> dict[str, float]:
    states = load_file(folder / STATES)
    layer, last = f"h{model.layer}", f"h{len(decoder_layers(model.base))}"
    steps = effort.steps if learns == RECURSION else effort.lora_steps
    rate = 2e-3 if learns == RECURSION else 1e-3
    plan = TrainingPlan(steps=steps, learning_rate=rate, kept=2, seed=seed)
    known = Known(Questions(states["ids"], states["asked"]), model.layer, states[layer])
    kept = states["kept ids"], states[f"kept {layer}"], states[f"kept {last}"]
    began, every = time.perf_counter(), max(1, steps // 5)

    def on_step(step: int, loss: float) -> None:
        if step % every == 0:
            seconds = time.perf_counter() - began
            print(f"   {learns}: step {step} of {steps}, loss {loss:.3f}, {seconds:.0f} s", flush=True)

    return train(model, known, plan, kept, on_step)


@torch.no_grad()
def _generate(model: Any, tokenizer: Any, prompts: list[str], tokens: int) -> list[str]:
    """What comes after each prompt, greedily."""
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    ids: Tensor = model.eval().generate(**given, max_new_tokens=tokens, do_sample=False)
    return [str(one) for one in tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :])]


def _said(model: Any, tokenizer: Any, texts: list[AskedText]) -> list[tuple[str, str, str]]:
    found = []
    for first in range(0, len(texts), _TOGETHER):
        some = texts[first : first + _TOGETHER]
        said = _generate(model, tokenizer, [text.prompt for text in some], tokens=1)
        found += [
            (text.prompt, str(text.answers[-1]).strip(), one.strip())
            for text, one in zip(some, said, strict=True)
        ]
    return found


def _right_with(model: HybridModel, tokenizer: Any, texts: dict[str, list[AskedText]], n: int) -> float:
    before = model.config.num_recursion_steps
    model.config.num_recursion_steps = n
    try:
        first = next(iter(texts.values()))
        return share_of_right(_said(model, tokenizer, first))
    finally:
        model.config.num_recursion_steps = before


def _go_on(model: Any, tokenizer: Any) -> str:
    return _PROMPT + _generate(model, tokenizer, [_PROMPT], tokens=24)[0]


@torch.no_grad()
def _checks(hybrid: HybridModel, base: Any, folder: Path, ids: Tensor) -> dict[str, bool]:
    """Save it; what is loaded again is the same, and with the injection off it is its base."""
    hybrid.save_pretrained(folder / HYBRID)
    again = AutoModelForCausalLM.from_pretrained(folder / HYBRID).eval()
    plain = real_base.load(folder / BASE)
    with hybrid.disable_injection():
        off = hybrid(ids).logits
    return {
        "the hybrid with the injection off and its base": torch.equal(off, plain(ids).logits),
        "the hybrid and the same saved and loaded again": torch.equal(hybrid(ids).logits, again(ids).logits),
    }
