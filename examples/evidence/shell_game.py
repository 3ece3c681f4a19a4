"""The shell game: a frozen language model learns to say where the ball is, by recursion or by something else.

The game, its held-out part and the language model are those of `trm-hybrid demo` (hybrid/demo): three cups,
up to 16 swaps, a tenth of all beginnings never trained on; a LLaMA of 106 k parameters, pre-trained here on
prose, counting and the game's format. All arms train on the same games in the same order. Each model answers
held-out games of 24 swaps: the first 16 answers are the accuracy, the others are beyond what is trained on.

The hybrids are HybridModel as it is; LoRA is peft's, on every linear layer; an untied stack stands in the
place of the hybrid's recursion.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import Subset
from transformers import LlamaForCausalLM

from evidence.training import count_flops, train, trained
from evidence.untied import UntiedStack
from hybrid import HybridConfig, HybridModel
from hybrid.data.blocks import TokenBlocks
from hybrid.demo.base import LanguageModel, make_base
from hybrid.demo.pretraining import Pretraining
from hybrid.demo.shell_game import ShellGame, accuracy_by_swaps, adaptive_by_swaps
from hybrid.demo.texts import english_prose
from hybrid.model.halting import Halting
from hybrid.training.evaluate import IGNORED, text_loss
from hybrid.training.processes import seed_everything

SWAPS = 16  # the most in training
_LONGER = 24  # swaps, in the held-out games
_N = (1, 2, 4, 6, 8, 12, 16)  # recursion steps at inference
_ROW = 64  # characters in a row of prose
_HALTING = tuple(
    Halting(threshold, watch=watch) for watch in ("answer", "latent") for threshold in (0.1, 0.2, 0.4)
)
_HELD_OUT_SEED = 1_000_000
_GROWING = 0.7  # share of the steps in which a curriculum's longest game grows


@dataclass(frozen=True)
class Settings:
    """An arm.

    trains         "recursion", "untied" (a stack in its place), "LoRA", "all" (full fine-tuning) or, of the
                   base as it is, "nothing"
    n              recursion steps; of a stack, one fewer than its layers
    sampling       HybridConfig's recursion_sampling
    width, intermediate_size   of a layer of the recursion or the stack
    rank           LoRA's
    swaps          the most in a training game
    answers        "every" swap is asked for, or only the "last" of a game of 1..swaps, drawn
    curriculum     these lengths are drawn from 1..1 first, up to 1..swaps after 7/10 of the steps
    prose_rows     rows of the base's prose in each step, for it not to be forgotten
    other_n        whether it is also measured with other n; if n is drawn, with tokens that stop as well
    steps, batch_size, learning_rate   of the training; games in a step
    base_steps     of the language model's own training
    games, rows    held-out games, and rows of prose, to measure on
    """

    trains: str = "recursion"
    n: int = 8
    sampling: str = "fixed"
    width: int = 64
    intermediate_size: int = 168
    rank: int = 24
    swaps: int = SWAPS
    answers: str = "every"
    curriculum: bool = False
    prose_rows: int = 0
    other_n: bool = False
    steps: int = 1450
    batch_size: int = 32
    learning_rate: float = 2e-3
    base_steps: int = 400
    games: int = 512
    rows: int = 256


_RANDOM = Settings(sampling="uniform")
_LAST = replace(_RANDOM, answers="last", swaps=8, steps=1300)
_ARMS: dict[str, Settings] = {
    "frozen base": Settings("nothing", steps=0),
    **{f"n = {n}": Settings(n=n, other_n=n == 8) for n in (1, 2, 4, 8)},
    "n random in 1..8": replace(_RANDOM, other_n=True),
    "LoRA": Settings("LoRA"),
    "full fine-tuning": Settings("all"),
    "untied, same FLOPs": Settings("untied"),
    "untied, same parameters": Settings("untied", width=24, intermediate_size=52),
    "n random, prose mixed in": replace(_RANDOM, prose_rows=2),
    "LoRA, prose mixed in": Settings("LoRA", prose_rows=2),
    "n random, last answer only": _LAST,
    "n random, last answer only, curriculum": replace(_LAST, curriculum=True),
}
ARMS = tuple(_ARMS)


def settings(arm: str, quick: bool) -> dict[str, Any]:
    """All of an arm's settings; a quick run has half the steps."""
    return asdict(_settings(arm, quick))


def run(seed: int, arm: str, quick: bool) -> dict[str, Any]:
    """Train one arm and measure it.

    accuracy             of the answers in held-out games, up to as many swaps as in training
    by_difficulty        after 1, 2, ... 24 swaps
    prose                held-out loss of the base's prose, nats per character
    trained_parameters, cpu_seconds
    flops_of_a_step      in the mean
    by_n                 by n at inference, the accuracy after 1, 2, ... 24 swaps
    adaptive             by a rule of halting, accuracy, steps and evaluations after 1, 2, ... 24 swaps
    """
    model, loss_of, chosen = prepared(arm, seed, quick)
    cpu_seconds = flops = 0.0
    if chosen.trains != "nothing":
        flops = count_flops(loss_of, chosen.steps)
        cpu_seconds = train(model, loss_of, chosen.steps, chosen.learning_rate)
    held_out = ShellGame(chosen.games, _LONGER, _HELD_OUT_SEED, held_out=True)
    by_swaps = accuracy_by_swaps(model, held_out)
    result = {
        "accuracy": _mean(by_swaps[: chosen.swaps]),
        "by_difficulty": {str(swaps): share for swaps, share in enumerate(by_swaps, start=1)},
        "prose": text_loss(model, Subset(_prose()[1], range(chosen.rows)), batch_size=64).per_token,
        "trained_parameters": sum(p.numel() for p in trained(model)),
        "flops_of_a_step": flops,
        "cpu_seconds": cpu_seconds,
    }
    if chosen.other_n:
        result["by_n"] = {str(n): accuracy_by_swaps(model, held_out, n) for n in _N}
    if chosen.other_n and chosen.sampling == "uniform":
        result["adaptive"] = {
            f"{halting.watch}, {halting.threshold}": asdict(adaptive_by_swaps(model, held_out, halting))
            for halting in _HALTING
        }
    return result


def prepared(arm: str, seed: int, quick: bool) -> tuple[LanguageModel, Callable[[int], Tensor], Settings]:
    """(model, the loss of a step, settings) of an arm that is not trained yet."""
    chosen = _settings(arm, quick)
    model = _model(chosen, seed)
    return model, _loss(model, chosen, seed), chosen


def held_out_accuracy(model: LanguageModel, chosen: Settings) -> float:
    """Of the answers in held-out games, up to as many swaps as in training."""
    games = ShellGame(chosen.games, chosen.swaps, _HELD_OUT_SEED, held_out=True)
    return _mean(accuracy_by_swaps(model, games))


def _settings(arm: str, quick: bool) -> Settings:
    chosen = _ARMS[arm]
    return replace(chosen, steps=chosen.steps // 2) if quick else chosen


# Models


def _model(chosen: Settings, seed: int) -> LanguageModel:
    """The base, what requires gradients within it being what the arm trains."""
    base = copy.deepcopy(pretrained_base(chosen.base_steps)).requires_grad_(False)
    seed_everything(seed)
    if chosen.trains == "nothing":
        return base
    if chosen.trains == "all":
        return base.requires_grad_(True)
    if chosen.trains == "LoRA":
        adapters = LoraConfig(r=chosen.rank, lora_alpha=2 * chosen.rank, target_modules="all-linear")
        return get_peft_model(base, adapters)
    config = HybridConfig(
        injection_layers=[1],
        trm_input_norm=False,  # as when these runs were published
        trm_hidden_size=chosen.width,
        trm_num_heads=4,
        trm_num_layers=1,
        trm_intermediate_size=chosen.intermediate_size,
        trm_attention="sdpa",  # the fastest on a CPU
        num_recursion_steps=chosen.n,
        recursion_sampling=chosen.sampling,
        recursion_seed=seed,
    )
    model = HybridModel(llm_model=base, config=config)
    if chosen.trains == "untied":
        injection = base.model.layers[0].trm
        injection.recursion = UntiedStack(
            chosen.width,
            config.trm_num_heads,
            chosen.intermediate_size,
            chosen.n,
            config.trm_rms_norm_eps,
            config.trm_attention,
        )
    return model.freeze_base()


@lru_cache(maxsize=1)
def pretrained_base(steps: int) -> LlamaForCausalLM:
    """The language model, pre-trained as in the demonstration; the same for every arm and seed."""
    batch_size = 32
    seed_everything(0)
    model = make_base()
    rows = Pretraining(_prose()[0], ShellGame(steps * batch_size, SWAPS, seed=0), seed=0)
    order = torch.randperm(len(rows)).tolist()

    def loss_of(step: int) -> Tensor:
        batch = _stack([rows[i] for i in order[step * batch_size : (step + 1) * batch_size]])
        loss: Tensor = model(**batch, use_cache=False).loss
        return loss

    train(model, loss_of, steps, learning_rate=4e-3)
    return model.eval()


# What is trained on


def _loss(model: LanguageModel, chosen: Settings, seed: int) -> Callable[[int], Tensor]:
    """The loss of a step: the mean over all its answers, and the characters of its prose."""
    games = _games(seed)
    prose = _prose()[0]
    order = torch.randperm(len(prose), generator=torch.Generator().manual_seed(seed)).tolist()

    def loss_of(step: int) -> Tensor:
        rows = slice(step * chosen.batch_size, (step + 1) * chosen.batch_size)
        parts = [{name: t[rows] for name, t in games.items()}]
        if chosen.answers == "last":
            parts = [_last_only(parts[0], _longest(chosen, step), torch.Generator().manual_seed(step))]
        if chosen.prose_rows:
            first = step * chosen.prose_rows
            parts.append(_stack([prose[order[(first + i) % len(order)]] for i in range(chosen.prose_rows)]))
        n = {"num_recursion_steps": model.draw_recursion_steps(step)} if chosen.sampling == "uniform" else {}
        counts = [int((part["labels"] != IGNORED)[:, 1:].sum()) for part in parts]
        losses = [model(**part, **n, use_cache=False).loss for part in parts]
        weighted = [loss * count for loss, count in zip(losses, counts, strict=True)]
        return torch.stack(weighted).sum() / sum(counts)

    return loss_of


def _longest(chosen: Settings, step: int) -> int:
    """The most swaps that a game of a step has, where only the last is asked for."""
    if not chosen.curriculum:
        return chosen.swaps
    return min(chosen.swaps, 1 + int(chosen.swaps * step / (_GROWING * chosen.steps)))


def _last_only(games: dict[str, Tensor], longest: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The beginnings of games, each of a length drawn from 1..longest, with its last answer alone.

    A row is as long as the longest: what comes after an answer is seen by no token before it.
    """
    labels = games["labels"][:, : longest + 2]
    swaps = torch.randint(1, longest + 1, (len(labels), 1), generator=generator)
    # the answer after a swap stands beside the token after that swap
    is_last = torch.arange(labels.shape[1]) == swaps + 1
    return {
        "input_ids": games["input_ids"][:, : longest + 2],
        "labels": torch.where(is_last, labels, IGNORED),
    }


@lru_cache(maxsize=1)
def _games(seed: int) -> dict[str, Tensor]:
    """The games of all trainings with this seed, [games, swaps + 2] each; the longest training sees all."""
    count = max(chosen.steps * chosen.batch_size for chosen in _ARMS.values())
    games = ShellGame(count, SWAPS, seed)
    return _stack([games[i] for i in range(count)])


@lru_cache(maxsize=1)
def _prose() -> tuple[TokenBlocks, TokenBlocks]:
    return english_prose(_ROW)


def _stack(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
