"""Sudoku of 6x6 with the classic TRM: is a puzzle solved better by recursion, and by deep supervision?

The puzzles are those of examples/sudoku.py, boxes 2 x 3, 14 to 22 of 36 cells given; singles solve each, so
its solution is the only one. About one solution in eight is held out. The model and its supervision steps are
those of examples/tiny_recursive_models.py, at width 64, with an MLP over the cells; the optimiser and its
schedule are those of every other task here. Difficulty is the number of givens; what is scored is the blanks.

All arms but the untied one have the same weights, and all take the same number of optimiser steps, 300 of 16
puzzles each, from the same start: a pilot had learned by then most of what singles tell. So an arm of more
evaluations is given more CPU time, not less; the table of budgets says how much. With deep supervision a step
goes on with the puzzles of the step before, up to four times, so that it meets fewer puzzles. This is the
paper's schedule with n = 2 and 2 cycles in place of 6 and 3, which would cost about three times as much.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from puzzles.model import PuzzleModel
from puzzles.training import Batch, first_carry, refill, supervise
from sudoku import sudoku
from tiny_recursive_models import SudokuSettings, batch_of, evaluate, make_model
from torch import Tensor, nn

from evidence.training import train, trained
from hybrid.training.processes import seed_everything
from trm_kernels import TRM, add_rms_norm, swiglu_mlp
from trm_kernels.recursion.weights import SwiGLUWeights

BOX = (2, 3)
_HELD_OUT_SEED = 1_000_000
_BINS = ((14, 16), (17, 19), (20, 22))  # givens
_AT_INFERENCE = (1, 2, 4, 8)  # supervision steps
_EPS = 1e-5  # of the norms, the TRM's default


@dataclass(frozen=True)
class Settings:
    """An arm.

    n, cycles           updates of z in a cycle, and of y in a supervision step; gradients of the last cycle
    supervision_steps   at most, for one puzzle
    untied              two layers with weights of their own, each evaluated once, in the recursion's place
    width               of the model
    steps, batch_size, learning_rate   of the training; puzzles in a step
    puzzles, held_out   how many are drawn to train on, and to measure on
    givens              fewest and most
    """

    n: int = 1
    cycles: int = 1
    supervision_steps: int = 1
    untied: bool = False
    width: int = 64
    steps: int = 300
    batch_size: int = 16
    learning_rate: float = 2e-3
    puzzles: int = 10_000
    held_out: int = 512
    givens: tuple[int, int] = (_BINS[0][0], _BINS[-1][1])


_ARMS = {
    "n = 1": Settings(),
    "n = 2": Settings(n=2),
    "n = 2, 2 cycles, deep supervision": Settings(n=2, cycles=2, supervision_steps=4),
    "untied, same parameters": Settings(untied=True),
}
ARMS = tuple(_ARMS)


def settings(arm: str, quick: bool) -> dict[str, Any]:
    """All of an arm's settings."""
    return asdict(_settings(arm, quick))


def run(seed: int, arm: str, quick: bool) -> dict[str, Any]:
    """Train one arm and measure it.

    accuracy                of the blanks of held-out puzzles, after as many supervision steps as in training
    by_difficulty           the same by the number of givens, fewest first
    whole_grids             the share of puzzles without a mistake
    by_supervision_steps    by their number at inference: accuracy, whole_grids
    trained_parameters, cpu_seconds
    """
    chosen = _settings(arm, quick)
    seed_everything(seed)
    model = _model(chosen)
    cpu_seconds = train(model, _loss(model, chosen, seed), chosen.steps, chosen.learning_rate)
    model.eval()
    held_out = _puzzles(chosen.held_out, chosen.givens, _HELD_OUT_SEED, held_out=True)
    at = chosen.supervision_steps
    shares = evaluate(model, *held_out, supervision_steps=max(_AT_INFERENCE))
    by_difficulty = {
        name: evaluate(model, *part, supervision_steps=at)[-1][1]
        for name, part in by_givens(*held_out).items()
    }
    return {
        "accuracy": shares[at - 1][1],
        "by_difficulty": by_difficulty,
        "whole_grids": shares[at - 1][0],
        "by_supervision_steps": {
            str(steps): {"accuracy": shares[steps - 1][1], "whole_grids": shares[steps - 1][0]}
            for steps in _AT_INFERENCE
        },
        "trained_parameters": sum(p.numel() for p in trained(model)),
        "cpu_seconds": cpu_seconds,
    }


def by_givens(puzzles: Tensor, solutions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The puzzles and solutions, [count, 36] each, by how many cells are given."""
    number = (puzzles > 0).sum(-1)
    chosen = {f"{low} to {high} givens": (number >= low) & (number <= high) for low, high in _BINS}
    return {name: (puzzles[rows], solutions[rows]) for name, rows in chosen.items()}


def _settings(arm: str, quick: bool) -> Settings:
    return replace(_ARMS[arm], steps=max(1, _ARMS[arm].steps // 10)) if quick else _ARMS[arm]


@lru_cache(maxsize=2)
def _puzzles(count: int, givens: tuple[int, int], seed: int, held_out: bool) -> tuple[Tensor, Tensor]:
    return sudoku(count, BOX, givens, seed, held_out)


def _loss(model: PuzzleModel, chosen: Settings, seed: int) -> Callable[[int], Tensor]:
    """The loss of a step, which is one supervision step; rows that have halted get a new puzzle."""
    puzzles, solutions = _puzzles(chosen.puzzles, chosen.givens, seed, held_out=False)
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Batch:
        rows = torch.randint(len(puzzles), (chosen.batch_size,), generator=generator)
        return batch_of(puzzles[rows], solutions[rows])

    carry = first_carry(model, draw())

    def loss_of(step: int) -> Tensor:
        nonlocal carry
        filled = refill(model, carry, draw())
        loss, carry = supervise(model, filled, chosen.supervision_steps, cells_loss=cross_entropy)
        return loss

    return loss_of


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over all cells, for logits [B, cells, V] and labels [B, cells]."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


# Models


def _model(chosen: Settings) -> PuzzleModel:
    model = make_model(
        SudokuSettings(box=BOX, hidden_size=chosen.width, prefix=1, n=chosen.n, cycles=chosen.cycles)
    )
    model.has_sparse_gradients = False  # AdamW takes none
    if chosen.untied:
        model.trm = UntiedLayers(chosen.width, seq_len=1 + math.prod(BOX) ** 2)
    return model


class UntiedLayers(TRM):
    """z = f_1(z + y + x), y = f_2(y + z): the two layers of a TRM with mlp_t, each evaluated once."""

    def __init__(self, width: int, seq_len: int) -> None:
        super().__init__(width, 1, num_layers=2, num_recursion_steps=1, mlp_t=True, seq_len=seq_len)

    def forward(  # type: ignore[override]
        self, x: Tensor, y: Tensor | None = None, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(y, z), each [B, T, D] as x."""
        y = self.y_init.expand_as(x) if y is None else y
        z = self.z_init.expand_as(x) if z is None else z
        first, second = self.layers
        z = _evaluate(first, z + (y + x))
        return _evaluate(second, y + z), z


def _evaluate(layer: nn.Module, v: Tensor) -> Tensor:
    """One layer's answer [B, T, D]: tokens are mixed, then channels; each norm is over what is mixed."""
    mixer, mlp = layer(v.dtype)
    return _mlp(_mlp(v.mT, mixer).mT, mlp)


def _mlp(v: Tensor, weights: SwiGLUWeights) -> Tensor:
    return add_rms_norm(v, swiglu_mlp(v, weights.gate_up_proj, weights.down_proj), _EPS)
