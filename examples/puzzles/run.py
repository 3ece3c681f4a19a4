"""A run in a folder: trained, killed, gone on with; what is lost are the steps since its last state

    RUN/run.json              the data's folder and digest, the seed and all settings
    RUN/state.safetensors     all that a step reads, and the losses so far
    RUN/weights.safetensors   the average of the weights, under the names of the TRM paper's code
    RUN/losses.png

What is drawn in a step is a function of the seed and the step's number, so that a run that goes on has the
numbers of one that was never stopped.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from puzzles import pictures
from puzzles.layout import Split
from puzzles.model import PuzzleModel, Sizes, load, save, step_of
from puzzles.settings import Settings, depth_at
from puzzles.training import Training

STATE, WEIGHTS, ABOUT = "state.safetensors", "weights.safetensors", "run.json"
_MAY_CHANGE = ("steps", "data")  # a run may be made longer, and its data moved


@dataclass(frozen=True)
class Run:
    """What makes a run what it is."""

    data: Path  # absolute, as `checkpoint`
    digest: str  # of what is trained on, see Split.digest
    puzzles: str  # see Split.kind
    settings: Settings
    seed: int = 0
    checkpoint: Path | None = None  # weights to begin with

    def as_json(self) -> dict[str, Any]:
        begins = None if self.checkpoint is None else str(self.checkpoint)
        about: dict[str, Any] = {"data": str(self.data), "digest": self.digest, "puzzles": self.puzzles}
        about |= {"seed": self.seed, "checkpoint": begins}
        return about | asdict(self.settings)

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Errors: ValueError for a folder without a run."""
        try:
            about = json.loads((folder / ABOUT).read_text())
            data, digest, puzzles, seed, begins = (
                about.pop(name) for name in ("data", "digest", "puzzles", "seed", "checkpoint")
            )
            return cls(Path(data), digest, puzzles, Settings(**about), seed, begins and Path(begins))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder}: expected a run (python -m puzzles train), got {error!r}.") from error


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_model(split: Split, settings: Settings) -> PuzzleModel:
    """A new model for these puzzles. Errors: ValueError for one that is too large for the memory."""
    sizes = Sizes(*(split.about[name] for name in ("seq_len", "vocab_size", "num_puzzle_identifiers")))
    try:
        return PuzzleModel(sizes, settings)
    except (RuntimeError, MemoryError, OverflowError) as error:  # PyTorch's allocator raises the first
        raise ValueError(
            f"expected a model that fits into memory, got {sizes} of width {settings.hidden_size}."
        ) from error


def trained_model(folder: Path, split: Split) -> PuzzleModel:
    """The average of a run's weights. Errors: ValueError, OSError where there are none, or none that fit."""
    model = make_model(split, Run.read(folder).settings)
    load(model, folder / WEIGHTS)
    return model.to(device()).eval()


def train(run: Run, split: Split, folder: Path, save_every: int) -> None:
    """Begins, or goes on from the last state. The folder is written to when nothing is left to be refused.

    Errors: ValueError for a folder with another run, settings that make none, weights that do not fit.
    """
    _check(run, folder)
    training = _ready(run, split, folder)
    _claim(run, folder)
    if (folder / STATE).exists():
        print(f"goes on after step {training.step}", flush=True)
        if step_of(folder / WEIGHTS) != training.step:  # it was killed between the two files
            _write_weights(training, folder)
    elif run.settings.steps == 0:  # a checkpoint that is only to be tested
        _write(training, folder)
    began, cpu, first = time.perf_counter(), time.process_time(), training.step
    while training.step < run.settings.steps:
        random = np.random.default_rng([run.seed, training.step])
        rows = split.draw(run.settings.batch_size, random)
        generator = torch.Generator().manual_seed(int(random.integers(1 << 62)))
        training.advance(split.batch(rows).to(device()), generator)
        if training.step % save_every == 0 or training.step == run.settings.steps:
            _write(training, folder)
            recent = torch.stack(training.losses[-save_every:]).mean()
            said = f"step {training.step}/{run.settings.steps}  loss {recent:.3f}"
            print(f"{said}  {time.perf_counter() - began:.0f} s", flush=True)
    done, spent = training.step - first, time.process_time() - cpu
    operations = training.counted.operations / 1e9
    print(f"{done} steps in {spent:.0f} s of CPU time, {operations:,.0f} billion operations in all")


def _ready(run: Run, split: Split, folder: Path) -> Training:
    """Where the run begins, or where its last state was."""
    depth_at(run.settings, 0)  # says what is wrong with a curriculum
    torch.manual_seed(run.seed)
    model, is_begun = make_model(split, run.settings), (folder / STATE).exists()
    if run.checkpoint is not None and not is_begun:
        load(model, run.checkpoint)
    model.to(device())
    sizes = np.resize(np.arange(len(split.inputs)), run.settings.batch_size)  # a folder may have fewer
    training = Training(model, run.settings, split.batch(sizes).to(device()))
    if is_begun:
        training.load(folder / STATE)
    return training


def _write(training: Training, folder: Path) -> None:
    """The state last: in a run that was killed, weights may be of a later step, but never of an earlier."""
    _write_weights(training, folder)
    training.save(folder / STATE)


def _write_weights(training: Training, folder: Path) -> None:
    save(training.average, folder / WEIGHTS, training.step)
    losses = [float(loss) for loss in training.losses]
    pictures.losses(folder / "losses.png", range(1, len(losses) + 1), losses)


def _check(run: Run, folder: Path) -> None:
    """Errors: ValueError for a folder with another run, or with more steps, or a state of no known run."""
    if not (folder / ABOUT).exists():
        if (folder / STATE).exists():
            raise ValueError(f"{folder}: expected {ABOUT} beside {STATE}, got none.")
        return
    there, wanted = Run.read(folder).as_json(), run.as_json()
    if there["digest"] != wanted["digest"]:
        raise ValueError(
            f"{folder}: expected the puzzles that the run there is trained on, got others in {run.data}."
        )
    if other := {
        name: there[name] for name in wanted if there[name] != wanted[name] and name not in _MAY_CHANGE
    }:
        raise ValueError(f"{folder}: expected the settings of the run that is there, {other}, got others.")
    if wanted["steps"] < there["steps"]:
        raise ValueError(
            f"{folder}: expected at least the {there['steps']} steps of the run that is there (--steps), "
            f"got {wanted['steps']}."
        )


def _claim(run: Run, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{ABOUT}.part"
    beside.write_text(json.dumps(run.as_json(), indent=1))
    beside.replace(folder / ABOUT)
