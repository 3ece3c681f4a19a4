"""The checkpoints of a training run.

    checkpoint-000123/    after step 123: the model as save_pretrained writes it, the optimizer's moments as
                          safetensors by parameter name, and state.json; the same, whichever way the model was
                          split among processes
    state.json            how far the run has come, the run's id, size and SHA-256 of every file beside it,
                          and a checksum of itself

Files are written to a temporary path, flushed to the disk, and atomically renamed. A run killed at any
moment leaves the last complete checkpoint. A damaged checkpoint is reported and skipped. No pickle: a
checkpoint from elsewhere cannot contain code.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybrid.saving.files import replace_file, sha256, sync_folder, sync_tree
from hybrid.saving.json_files import read_object
from hybrid.training.checkpoint_tensors import OPTIMIZER, read_tensors, write_tensors
from hybrid.training.run_folder import (
    check_same_run,
    extended,
    new_run,
    read_metrics,
    read_run,
    refuse_others_files,
    saving,
)

_STATE = "state.json"
_NAME = re.compile(r"checkpoint-(\d{6,})")


@dataclass(frozen=True)
class Progress:
    """How far a run has come, besides its tensors.

    step               steps done
    loss_sum           of the steps since the last metrics line, nats per token
    grad_norm          the largest of these steps, before clipping
    counted            how many these steps are
    skipped            how many steps since then were not taken: loss or gradient was no number
    skipped_in_row     of these, the last that follow each other
    held_out_before    loss per token of each held-out set before the first step, nats
    place              where the data is after these steps; None: the steps say it
    keep_place         the same of what is trained on so that it is not forgotten
    """

    step: int = 0
    loss_sum: float = 0.0
    grad_norm: float = 0.0
    counted: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    held_out_before: dict[str, float] = field(default_factory=dict)
    place: dict[str, Any] | None = None
    keep_place: dict[str, Any] | None = None


@dataclass(frozen=True)
class Found:
    """Where a run begins.

    run          what it is, see run_folder.py
    checkpoint   to go on from; None: at step 0
    notes        what a person should know of it, a line each
    """

    run: dict[str, Any]
    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()


def find(folder: Path, what: dict[str, Any], resume: bool) -> Found:
    """Where to begin: at the newest whole checkpoint to resume. Nothing in `folder` is changed.

    what   makes the run this run; a resumed run must have all of it in common, but it may have more steps

    Errors: ValueError when another run or somebody's files are in `folder`, or when nothing can be resumed.
    """
    if not resume:
        refuse_others_files(folder)
        return Found(new_run(what))
    run = read_run(folder)
    check_same_run(folder, run, what)
    read_metrics(folder)
    _refuse_others_checkpoints(folder)
    checkpoint, damaged = newest(folder, run["id"])
    if checkpoint is None and damaged:
        raise ValueError(
            f"train: expected a whole checkpoint in {folder}, got none: {'; '.join(damaged)}. Move them away "
            "to begin again from step 0."
        )
    done = 0 if checkpoint is None else step_of(checkpoint)
    run, notes = extended(folder, run, what["steps"], done)
    return Found(run, checkpoint, (*(f"passed over {fault}" for fault in damaged), *notes))


def newest(folder: Path, run_id: str) -> tuple[Path | None, list[str]]:
    """(the newest whole checkpoint of the run, what is wrong with each that is newer).

    All their bytes are read.
    """
    damaged: list[str] = []
    for checkpoint in sorted(_checkpoints(folder), key=step_of, reverse=True):
        fault = _fault(checkpoint, run_id)
        if fault is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint.name}: {fault}")
    return None, damaged


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint of the run in `folder`; warns of newer ones that are damaged.

    Errors: ValueError when no run is there, or all its checkpoints are damaged.
    """
    checkpoint, damaged = newest(folder, read_run(folder)["id"])
    if checkpoint is None and damaged:
        raise ValueError(f"expected a whole checkpoint in {folder}, got none: {'; '.join(damaged)}.")
    for fault in damaged:
        warnings.warn(f"{folder}: passed over {fault}", stacklevel=2)
    return checkpoint


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is, or would be."""
    return folder / f"checkpoint-{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def save(
    folder: Path,
    run: dict[str, Any],
    progress: Progress,
    model: PreTrainedModel,
    optimizer: Optimizer,
    tokenizer: PreTrainedTokenizerBase | None,
    keep: int,
    processes: PartialState,
) -> None:
    """Write the checkpoint of `progress.step`, then delete the run's own whole ones but the `keep` newest.

    Every process calls it; all but the main one return when their part of a sharded model is written.

    tokenizer   written beside the model; None writes none
    """
    is_main, beside = processes.is_main_process, folder / f"{saving(run)}{progress.step:06d}"
    if is_main:
        if beside.exists():
            shutil.rmtree(beside)
        beside.mkdir()
    write_tensors(model, optimizer, beside, processes)
    if not is_main:
        return
    if tokenizer is not None:
        tokenizer.save_pretrained(beside)
    _write_state(beside, run["id"], progress)
    target = checkpoint_of(folder, progress.step)
    if target.exists():  # not whole, or the run would have gone on from it
        _set_aside(target)
    beside.rename(target)
    sync_folder(folder)
    _remove_old(folder, run, keep)


def load(checkpoint: Path, model: PreTrainedModel, optimizer: Optimizer) -> Progress:
    """Fill the trained tensors of `model` and the optimizer's moments from a checkpoint.

    Errors: ValueError for a file that is damaged, or tensors that do not fit.
    """
    state = _read_state(checkpoint)
    read_tensors(checkpoint, list(state["files"]), model, optimizer)
    return Progress(**{one.name: state[one.name] for one in fields(Progress)})


def _write_state(checkpoint: Path, run_id: str, progress: Progress) -> None:
    """state.json, last of all: what it names is on the disk."""
    sync_tree(checkpoint)
    files = {
        name: {"bytes": (checkpoint / name).stat().st_size, "sha256": sha256(checkpoint / name)}
        for name in _files(checkpoint)
    }
    state = {"run": run_id, **asdict(progress), "files": files}
    state["sha256"] = _checksum(state)
    replace_file(checkpoint / _STATE, json.dumps(state, indent=1).encode())


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """Errors: ValueError, OSError for one that is not as it was written."""
    path = checkpoint / _STATE
    state = read_object(path, "train")
    content = {name: value for name, value in state.items() if name != "sha256"}
    of_run = {"run", "files", "sha256"} | {one.name for one in fields(Progress)}
    if state.keys() != of_run or type(state["step"]) is not int or not _are_files(state["files"]):
        raise ValueError(f"train: expected in {path} what a run writes there, got something else.")
    if state["sha256"] != _checksum(content):
        raise ValueError(f"train: expected {path} as it was written, got another checksum.")
    return state


def _are_files(files: Any) -> bool:
    return isinstance(files, dict) and all(
        isinstance(facts, dict) and facts.keys() == {"bytes", "sha256"} for facts in files.values()
    )


def _checksum(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _files(checkpoint: Path) -> list[str]:
    """All that is in a checkpoint but its state, also in folders of it."""
    paths = (path for path in checkpoint.rglob("*") if not path.is_dir())
    return sorted(name for path in paths if (name := path.relative_to(checkpoint).as_posix()) != _STATE)


def _checkpoints(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name))


def _refuse_others_checkpoints(folder: Path) -> None:
    """A folder of that name that holds nothing a run writes is somebody else's."""
    for path in sorted(_checkpoints(folder)):
        ours = [path / _STATE, *path.glob(f"{OPTIMIZER}*.safetensors")]
        if not any(file.is_file() for file in ours):
            raise ValueError(
                f"train: expected only checkpoints of the run in {folder}, got {path.name}, which it did not "
                "write or which lost its state and optimizer. Move it away."
            )


def _fault(checkpoint: Path, run_id: str, reads: bool = True) -> str | None:
    """What is wrong with a checkpoint; None: it is whole, and of this run.

    reads   compare every byte, by checksums; else the files' sizes
    """
    try:
        state = _read_state(checkpoint)
        if state["run"] != run_id:
            return "it is of another run"
        if state["step"] != step_of(checkpoint):
            return f"it is of step {state['step']}"
        for name, then in state["files"].items():
            size = (checkpoint / name).stat().st_size
            if size != then["bytes"]:
                return f"{name} had {then['bytes']:,} bytes and has {size:,}"
            if reads and _sha256(checkpoint / name) != then["sha256"]:
                return f"{name} is not as it was written (another SHA-256)"
    except OSError as error:
        name = Path(error.filename or _STATE).relative_to(checkpoint)
        return f"{name} cannot be read ({error.strerror})"
    except ValueError as error:
        return str(error).removeprefix("train: ").rstrip(".")
    return None


def _sha256(path: Path) -> str:
    """As files.sha256; a file that is as it was when it was last asked for is not read again."""
    facts = path.stat()
    return _known_sha256(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=256)
def _known_sha256(path: Path, size: int, changed: int) -> str:
    return sha256(path)


def _set_aside(checkpoint: Path) -> None:
    """Rename a checkpoint that is not whole, for the next of its step."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    number = 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}-{number}")
    checkpoint.rename(aside)
    warnings.warn(f"{checkpoint} was there and not whole: it is {aside.name} now", stacklevel=3)


def _remove_old(folder: Path, run: dict[str, Any], keep: int) -> None:
    """All whole checkpoints of the run but the newest; none with a file in it that the run did not write."""
    whole = [c for c in _checkpoints(folder) if _fault(c, run["id"], reads=False) is None]
    for old in sorted(whole, key=step_of)[:-keep]:
        if others := sorted(set(_files(old)) - _read_state(old)["files"].keys()):
            warnings.warn(f"{old} stays, for the run did not write {others[0]}, which is in it", stacklevel=3)
            continue
        # renamed first: what is half removed is no checkpoint
        going = folder / f"{saving(run)}{old.name}"
        old.rename(going)
        shutil.rmtree(going)
