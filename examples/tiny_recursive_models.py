"""A Tiny Recursive Model that learns Sudoku: `python examples/tiny_recursive_models.py --puzzle 4x4`

The puzzles are those of sudoku.py, the model and its training those of puzzles/, which has mazes and ARC too.

Tokens are the paper's: 0 pads and never occurs here, 1 is a blank, d + 1 the digit d.

Source   "Less is More: Recursive Reasoning with Tiny Networks", arXiv 2510.04871.
"""

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import puzzle_folder
import torch
from puzzles.model import PuzzleModel, Sizes, load, save
from puzzles.settings import Settings, depth_at
from puzzles.training import Batch, Training
from safetensors import SafetensorError
from sudoku import sudoku
from torch import Tensor

HELD_OUT = 500  # puzzles


@dataclass(frozen=True)
class SudokuSettings(Settings):
    """Those of 9x9 are the paper's, but for the steps."""

    box: tuple[int, int] = (3, 3)  # rows and columns of a box, which has as many cells as a grid has rows
    puzzles: int = 50_000  # to train on
    givens: tuple[int, int] = (33, 45)  # fewest and most


PUZZLES = {
    "4x4": SudokuSettings(
        box=(2, 2),
        hidden_size=64,
        num_heads=4,
        prefix=1,
        n=2,
        cycles=2,
        supervision_steps=4,
        steps=300,
        batch_size=32,
        learning_rate=2e-3,
        embedding_rate=0.2,
        warmup_steps=100,
        ema=0.98,
        average_embeddings=True,
        puzzles=20_000,
        givens=(4, 6),
    ),
    "9x9": SudokuSettings(),
}


def make_model(settings: SudokuSettings) -> PuzzleModel:
    """With a token for each digit, and one kind of puzzle."""
    side = math.prod(settings.box)
    return PuzzleModel(Sizes(side * side, side + 2), settings)


def batch_of(puzzles: Tensor, solutions: Tensor) -> Batch:
    """Digits [B, cells], 0 a blank, as tokens."""
    return Batch(puzzles + 1, solutions + 1, puzzles.new_zeros(len(puzzles)))


class Trained(NamedTuple):
    """What came of a training."""

    losses: list[float]  # of every step
    average: PuzzleModel  # with the average of the weights
    operations: int  # floating-point, of the products of all forwards and backwards


def train(model: PuzzleModel, puzzles: Tensor, solutions: Tensor, settings: Settings) -> Trained:
    """Deep supervision, from a shallow recursion to the whole one if there is a curriculum."""

    def draw() -> Batch:
        rows = torch.randint(len(puzzles), (settings.batch_size,)).to(puzzles.device)
        return batch_of(puzzles[rows].long(), solutions[rows].long())

    training = Training(model, settings, draw())
    began, every = time.perf_counter(), max(1, settings.steps // 10)
    for step in range(1, settings.steps + 1):
        training.advance(draw())
        if step % every == 0:
            recent, seconds = torch.stack(training.losses[-every:]).mean(), time.perf_counter() - began
            at = "x".join(map(str, depth_at(settings, step - 1)))
            print(f"step {step}/{settings.steps}  {at}  loss {recent:.3f}  {seconds:.0f} s", flush=True)
    return Trained([float(loss) for loss in training.losses], training.average, training.counted.operations)


@torch.no_grad()
def evaluate(
    model: PuzzleModel, puzzles: Tensor, solutions: Tensor, supervision_steps: int
) -> list[list[float]]:
    """After each supervision step the shares of whole grids right, of blanks right, of grids said to be."""
    shares, blank, (tokens, labels, kinds) = [], puzzles == 0, batch_of(puzzles, solutions)
    for y, _ in model.trm.supervision_steps(model.embed(tokens, kinds), supervision_steps):
        logits, q = model.read(y)
        right = logits.argmax(-1) == labels
        shares.append([t.float().mean().item() for t in (right.all(-1), right[blank], q > 0)])
    return shares


def show(shares: list[list[float]]) -> None:
    """What `evaluate` found on the held-out puzzles, as a table: after 1, 2, 4, ... supervision steps."""
    shown = [2**i for i in range(len(shares).bit_length())]
    print(f"\n| {'supervision steps at inference':>30} |" + "".join(f" {step:6d} |" for step in shown))
    print(f"| {'-' * 29}: |" + " -----: |" * len(shown))
    for i, name in enumerate(("whole grid right", "blanks right", "says that it is right")):
        print(f"| {name:>30} |" + "".join(f" {shares[step - 1][i]:6.1%} |" for step in shown))


# Command line


def puzzles_of(settings: SudokuSettings, seed: int, data: Path | None) -> list[tuple[Tensor, Tensor]]:
    """(puzzles, solutions) to train on and held out: of a folder, or made on the spot."""
    if data is None:
        to_train_on = sudoku(settings.puzzles, settings.box, settings.givens, seed)
        return [to_train_on, sudoku(HELD_OUT, settings.box, settings.givens, seed, held_out=True)]
    to_train_on, test = (
        puzzle_folder.read(data, split, math.prod(settings.box)) for split in ("train", "test")
    )
    chosen = torch.randperm(len(test[0]), generator=torch.Generator().manual_seed(seed))[:HELD_OUT]
    return [to_train_on, (test[0][chosen].long(), test[1][chosen].long())]


def run(
    settings: SudokuSettings,
    seed: int,
    checkpoint: Path | None = None,
    saved: Path | None = None,
    data: Path | None = None,
) -> None:
    """Test, train, test the average of the weights, save it. Without steps it tests a checkpoint."""
    began = time.perf_counter()
    depth_at(settings, 0)  # what is wrong with a curriculum is said before puzzles are made
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(settings)
    if checkpoint is not None:
        load(model, checkpoint)
    model.to(device)
    to_train_on, held_out = puzzles_of(settings, seed, data)
    for name, (puzzles, solutions) in {"to train on": to_train_on, "held out": held_out}.items():
        print(f"{len(puzzles):,} puzzles {name}, with {len(solutions.unique(dim=0)):,} solutions")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device.type}", flush=True)
    to_train_on, held_out = ((a.to(device), b.to(device)) for a, b in (to_train_on, held_out))
    before, *_ = evaluate(model, *held_out, supervision_steps=1)
    print(f"step 0: {before[0]:.1%} of the held-out grids are right", flush=True)
    before_training = time.process_time()
    trained = train(model, *to_train_on, settings)
    in_training = time.process_time() - before_training
    show(evaluate(trained.average, *held_out, settings.supervision_steps))
    if saved is not None:
        save(trained.average, saved)
    print(f"\ntraining: {trained.operations / 1e9:,.0f} billion operations, {in_training:.0f} s of CPU time")
    print(f"{time.perf_counter() - began:.0f} s, {time.process_time():.0f} s of CPU time")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A Tiny Recursive Model that learns Sudoku.")
    parser.add_argument("--puzzle", choices=PUZZLES, default="4x4")
    for name in ("hidden_size", "n", "cycles", "steps", "batch_size"):
        defaults = ", ".join(
            f"{getattr(settings, name):,} for {puzzle}" for puzzle, settings in PUZZLES.items()
        )
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, metavar="NUMBER", help=f"default {defaults}"
        )
    parser.add_argument("--mlp-t", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--recursion-curriculum",
        metavar="FIRST:STEPS",
        help="begin at n FIRST, or at n and T FIRSTxT, and have all after STEPS steps; default all at once",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, metavar="FILE.safetensors", help="write the weights there")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE.safetensors", help="begin with these weights"
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="puzzles in the paper's layout, see puzzle_folder.py"
    )
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    settings = PUZZLES[given.pop("puzzle")]
    files = {"checkpoint": given.pop("checkpoint", None), "saved": given.pop("save", None)}
    files["data"] = given.pop("data", None)
    seed = given.pop("seed")
    try:
        if given.get("batch_size", 1) < 1 or given.get("steps", 0) < 0:
            raise ValueError("expected --batch-size of at least 1 and --steps of at least 0.")
        run(replace(settings, **given), seed, **files)
    except (ValueError, OSError, SafetensorError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
