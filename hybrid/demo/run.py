"""The demonstration from beginning to end: pre-train, freeze, attach, train, measure, save, reload, report.

Everything it needs is in this package and in Python itself. It trains as `trm-hybrid train` does.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hybrid.data.blocks import TokenBlocks
from hybrid.demo import report
from hybrid.demo.base import LanguageModel, make_base, make_tokenizer
from hybrid.demo.pretraining import Pretraining
from hybrid.demo.report import Findings, GameResult, TextResult
from hybrid.demo.shell_game import ShellGame, accuracy_by_swaps, answers
from hybrid.demo.texts import english_prose, python_sources
from hybrid.info import count, count_trained
from hybrid.model.hybrid_model import HybridModel
from hybrid.presets import PresetConfigs
from hybrid.training import phases, run_folder
from hybrid.training.loop import TrainResult, train
from hybrid.training.processes import seed_everything, this_process
from hybrid.training.settings import TrainSettings
from trm_kernels.runtime.backend import describe

_ROW = 64  # characters in a row of text
_BATCH_SIZE = 32  # games, or rows to pre-train on
_TEXT_BATCH_SIZE = 16  # rows of Python sources
_SWAPS = 16
_HELD_OUT_SEED = 1_000_000  # of the held-out games: the same in every run
_STEPS_AT_INFERENCE = (1, 2, 4, 8, 12)
_GAMES_SHOWN = 3
_ROWS_COMPARED = 8
_PROMPT = "def __init__(self"
_SAMPLE = 160  # characters


@dataclass(frozen=True)
class _Effort:
    """How much is done.

    base_steps, game_steps, text_steps   of the three trainings
    games, rows                          held-out games, and rows of each text, to measure on
    """

    base_steps: int
    game_steps: int
    text_steps: int
    games: int
    rows: int


_FULL = _Effort(base_steps=400, game_steps=1450, text_steps=500, games=1024, rows=384)
_QUICK = _Effort(base_steps=30, game_steps=40, text_steps=20, games=128, rows=32)


def run(output: Path | str, seed: int = 0, quick: bool = False) -> int:
    """Write the models, report.md and its pictures into `output`; 1 if what must be equal is not, else 0.

    seed    of everything random; the same seed gives the same report on the same machine
    quick   the same path with few steps, for tests

    Errors: ValueError when `output` cannot be written to; nothing is computed then.
    """
    run_folder.make_folder(Path(output), "demo")
    with _one_thread():
        return _Demo(Path(output), seed, quick).go()


class _Demo:
    """One run: what its parts share."""

    def __init__(self, output: Path, seed: int, quick: bool) -> None:
        self.output, self.seed, self.quick = output, seed, quick
        self.effort = _QUICK if quick else _FULL
        self.tokenizer = make_tokenizer()
        rows = self.effort.rows
        self.prose, held_out_prose = english_prose(_ROW)
        self.sources, held_out_sources = python_sources(
            self.tokenizer, _ROW, self.effort.text_steps * _TEXT_BATCH_SIZE, rows
        )
        self.held_out_prose, self.held_out_sources = (
            _first(held_out_prose, rows),
            _first(held_out_sources, rows),
        )
        self.compared = torch.stack([held_out_prose[i]["input_ids"] for i in range(_ROWS_COMPARED)])
        self.checks: dict[str, bool] = {}

    def go(self) -> int:
        began, cpu_began = time.perf_counter(), time.process_time()
        _say(describe(this_process().device))
        base = self.pretrain()
        hybrid = self.fresh_hybrid()
        findings = Findings(
            seed=self.seed,
            quick=self.quick,
            base_parameters=count(base),
            trm_parameters=count_trained(hybrid),
            game=self.play(base, hybrid),
            text=self.adapt(base, self.fresh_hybrid()),
            checks=self.checks,
        )
        report.write(findings, self.output)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        _say(f"\n{self.output / report.REPORT} is written. {seconds:.0f} s, {cpu_seconds:.0f} s of CPU time.")
        return 0 if all(self.checks.values()) else 1

    def pretrain(self) -> LlamaForCausalLM:
        """The language model, trained and saved beside its tokenizer."""
        steps = self.effort.base_steps
        seed_everything(self.seed)
        model = make_base()
        _say(f"\n1. A language model of {count(model):,} parameters learns English prose")
        data = Pretraining(self.prose, ShellGame(steps * _BATCH_SIZE, _SWAPS, self.seed), self.seed)
        self.train("base", model, data, {"prose": self.held_out_prose}, steps, _BATCH_SIZE, 4e-3)
        model.save_pretrained(self.output / "base")
        self.tokenizer.save_pretrained(self.output / "base")
        return self.load("base")

    def fresh_hybrid(self) -> HybridModel:
        """The saved base with an untrained TRM, ready for phase 1."""
        seed_everything(self.seed)
        config = PresetConfigs.tiny()
        config.recursion_seed = self.seed
        model = HybridModel(llm_model=self.load("base"), config=config)
        phases.enter(model, 1)
        return model

    def play(self, base: LlamaForCausalLM, hybrid: HybridModel) -> GameResult:
        """Part 1: following the ball."""
        effort, most = self.effort, hybrid.config.num_recursion_steps
        _say(
            f"\n2. The base is frozen. A TRM of {count_trained(hybrid):,} parameters learns to follow a ball"
        )
        self.check("a fresh hybrid and its base", hybrid, base)
        held_out = ShellGame(effort.games, _SWAPS, _HELD_OUT_SEED, held_out=True)
        texts = {"game": held_out, "prose": self.held_out_prose}
        games = ShellGame(effort.game_steps * _BATCH_SIZE, _SWAPS, self.seed)
        losses = self.train("game", hybrid, games, texts, effort.game_steps, _BATCH_SIZE, 2e-3)
        self.check_after("game", hybrid, base)
        result = GameResult(
            steps=most,
            base=accuracy_by_swaps(base, held_out),
            hybrid={n: accuracy_by_swaps(hybrid, held_out, n) for n in _STEPS_AT_INFERENCE},
            prose_before=losses.held_out_before["prose"],
            prose_after=losses.held_out_after["prose"],
            examples=[
                (*held_out.game(i), answers(base, *held_out.game(i)), answers(hybrid, *held_out.game(i)))
                for i in range(_GAMES_SHOWN)
            ],
        )
        _say(
            f"\n{report.swaps_table(result)}\n\n{report.steps_table(result)}\n\n{report.games_shown(result)}"
        )
        return result

    def adapt(self, base: LlamaForCausalLM, hybrid: HybridModel) -> TextResult:
        """Part 2: real text."""
        _say("\n3. The same frozen base. A fresh TRM learns from the sources of Python's standard library")
        texts = {"Python sources": self.held_out_sources, "prose": self.held_out_prose}
        losses = self.train(
            "text", hybrid, self.sources, texts, self.effort.text_steps, _TEXT_BATCH_SIZE, 2e-3
        )
        self.check_after("text", hybrid, base)
        result = TextResult(
            before=losses.held_out_before,
            after=losses.held_out_after,
            prompt=_PROMPT,
            base=self.write(base),
            hybrid=self.write(hybrid),
        )
        _say(f"\n{report.losses_table(result)}\n\n{report.samples_shown(result)}")
        return result

    def train(
        self,
        name: str,
        model: LanguageModel,
        data: Dataset,
        held_out: Mapping[str, Dataset],
        steps: int,
        batch_size: int,
        learning_rate: float,
    ) -> TrainResult:
        """Train in training/<name>; what an earlier run left there is removed."""
        folder = self.output / "training" / name
        if (folder / run_folder.RUN).is_file():
            shutil.rmtree(folder)
        settings = TrainSettings(
            output_dir=folder,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=min(50, steps // 4),
            seed=self.seed,
            log_every=max(1, steps // 5),
        )
        result = train(model, data, settings, held_out, tokenizer=self.tokenizer)
        model.cpu().eval()  # accelerate took it to a GPU if there is one; at this size the CPU is as good
        return result

    def load(self, name: str) -> LanguageModel:
        return AutoModelForCausalLM.from_pretrained(self.output / name)

    def check_after(self, name: str, hybrid: HybridModel, base: LlamaForCausalLM) -> None:
        """What must hold after a training: the base is as it was, and a saved hybrid comes back as it is."""
        with hybrid.disable_injection():
            self.check(f"the {name} hybrid with the injection off and its base", hybrid, base)
        hybrid.save_pretrained(self.output / name)
        self.check(f"the {name} hybrid and the same saved and loaded again", hybrid, self.load(name))

    def check(self, what: str, one: LanguageModel, other: LanguageModel) -> None:
        """Compare logits and generated tokens on held-out prose, bit by bit."""
        checks = {
            f"{what}: logits": torch.equal(_logits(one, self.compared), _logits(other, self.compared)),
            f"{what}: generate()": torch.equal(_greedy(one, self.compared), _greedy(other, self.compared)),
        }
        _say(report.checks_shown(checks))
        self.checks |= checks

    def write(self, model: LanguageModel) -> str:
        """What the model goes on to write after the prompt, sampled."""
        seed_everything(self.seed)
        prompt = self.tokenizer(_PROMPT, return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=_SAMPLE, do_sample=True, temperature=0.7)
        return str(self.tokenizer.decode(ids[0], skip_special_tokens=True))


def _first(data: TokenBlocks, rows: int) -> Dataset:
    return Subset(data, range(min(rows, len(data))))


@torch.no_grad()
def _logits(model: LanguageModel, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits


def _greedy(model: LanguageModel, ids: Tensor) -> Tensor:
    return model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread is fastest at these sizes; the number is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _say(text: str) -> None:
    print(text, flush=True)
