"""A run in a folder: trained, killed, gone on with; what is lost are the steps since its last state

    RUN/run.json              the data's folder, the seed and all settings
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
from puzzles.layout import Split, read
from puzzles.model import PuzzleModel, Sizes, load, save
from puzzles.settings import Settings, depth_at
from puzzles.training import Training

STATE, WEIGHTS, ABOUT = "state.safetensors", "weights.safetensors", "run.json"
_MAY_CHANGE = "steps"  # a run may be made longer


@dataclass(frozen=True)
class Run:
    """What makes a run what it is."""

    data: Path
    settings: Settings
    seed: int = 0
    checkpoint: Path | None = None  # weights to begin with

    def as_json(self) -> dict[str, Any]:
        begins = None if self.checkpoint is None else str(self.checkpoint)
        return {"data": str(self.data), "seed": self.seed, "checkpoint": begins, **asdict(self.settings)}

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Errors: ValueError for a folder without a run."""
        try:
            about = json.loads((folder / ABOUT).read_text())
            data, seed, begins = (about.pop(name) for name in ("data", "seed", "checkpoint"))
            return cls(Path(data), Settings(**about), seed, begins and Path(begins))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: expected a run (python -m puzzles train), got {error!r}.") from error


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_model(split: Split, settings: Settings) -> PuzzleModel:
    """A new model for these puzzles."""
    names = ("seq_len", "vocab_size", "num_puzzle_identifiers")
    return PuzzleModel(Sizes(*(split.about[name] for name in names)), settings)


def trained_model(folder: Path, split: Split) -> PuzzleModel:
    """The average of a run's weights. Errors: ValueError, OSError where there are none, or none that fit."""
    model = make_model(split, Run.read(folder).settings)
    load(model, folder / WEIGHTS)
    return model.to(device()).eval()


def train(run: Run, folder: Path, save_every: int) -> None:
    """Begins, or goes on from the last state. Errors: ValueError for a folder with another run."""
    depth_at(run.settings, 0)  # what is wrong with a curriculum is said before anything is made
    split = read(run.data, "train")
    _claim(run, folder)
    torch.manual_seed(run.seed)
    model = make_model(split, run.settings)
    if run.checkpoint is not None:
        load(model, run.checkpoint)
    model.to(device())
    sizes = np.resize(np.arange(len(split.inputs)), run.settings.batch_size)  # a folder may have fewer
    training = Training(model, run.settings, split.batch(sizes).to(device()))
    if (folder / STATE).exists():
        training.load(folder / STATE)
        print(f"goes on after step {training.step}", flush=True)
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


def _write(training: Training, folder: Path) -> None:
    training.save(folder / STATE)
    save(training.average, folder / WEIGHTS)
    losses = [float(loss) for loss in training.losses]
    pictures.losses(folder / "losses.png", range(1, len(losses) + 1), losses)


def _claim(run: Run, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    wanted = run.as_json()
    if (folder / ABOUT).exists():
        there = Run.read(folder).as_json()
        other = {name: there[name] for name in wanted if there[name] != wanted[name] and name != _MAY_CHANGE}
        if other:
            raise ValueError(
                f"{folder}: expected the settings of the run that is there, {other}, got others."
            )
    beside = folder / f"{ABOUT}.part"
    beside.write_text(json.dumps(wanted, indent=1))
    beside.replace(folder / ABOUT)
