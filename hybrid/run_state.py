"""A training run on disk: what it is, its checkpoints, its metrics.

    run.json              what makes the run this run: settings, data, trained tensors
    metrics.jsonl         one JSON object a line
    curve.png             its losses as a picture
    checkpoint-000123/    after step 123: the model as save_pretrained writes it, the optimizer's
                          moments as safetensors by parameter name, and state.json; the same, whichever way
                          the model was split among processes

Everything is written beside its place and renamed into it, so a run killed at any moment leaves the
last whole checkpoint. No pickle: a checkpoint from elsewhere can hold no code.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hybrid import shard
from hybrid.model import HybridModel

RUN = "run.json"
METRICS = "metrics.jsonl"
CURVE = "curve.png"
_STATE = "state.json"
_OPTIMIZER = "optimizer"  # how the names of its files begin
_SAVING = ".saving-"
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


def make_folder(folder: Path, who: str = "train") -> None:
    """Make `folder` and see that files can be written there.

    who   asks for it, for the error

    Errors: ValueError when they cannot, with the system's reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{who}: expected an output folder that can be written to, got {folder} ({error.strerror})."
        ) from error


def find(folder: Path, run: dict[str, Any], resume: bool) -> Path | None:
    """The checkpoint to go on from: the newest whole one to resume, None for a new run.

    run   what makes the run this run; a resumed run must have all of it in common

    Errors: ValueError when another run is in `folder`, or when there is none to resume.
    """
    checkpoint = latest(folder)
    if resume:
        _check_same_run(folder, run)
    elif checkpoint is not None:
        raise ValueError(
            f"train: expected an output folder without a run, got {checkpoint.name} in {folder}. "
            "Resume it, or choose another folder."
        )
    return checkpoint


def begin(folder: Path, run: dict[str, Any], step: int | None) -> None:
    """Clear away what was left behind, and say what this run is.

    step   of the checkpoint that was loaded: metrics after it will be written again; None: a new run
    """
    for left in folder.glob(f"{_SAVING}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    lines = [] if step is None else [line for line in read_metrics(folder) if line["step"] <= step]
    replace_file(folder / METRICS, "".join(json.dumps(line) + "\n" for line in lines).encode())
    replace_file(folder / RUN, json.dumps(run, indent=1).encode())


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`; None when there is none."""
    return max(_whole_checkpoints(folder), default=None, key=_step_of)


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is, or would be."""
    return folder / f"checkpoint-{step:06d}"


def save(
    folder: Path,
    progress: Progress,
    model: PreTrainedModel,
    optimizer: Optimizer,
    tokenizer: PreTrainedTokenizerBase | None,
    keep: int,
    processes: PartialState,
) -> None:
    """Write the checkpoint of `progress.step`, then delete all whole ones but the `keep` newest.

    Every process calls it; all but the main one return when their part of a sharded model is written.

    tokenizer   written beside the model; None writes none
    """
    is_main, beside = processes.is_main_process, folder / f"{_SAVING}{progress.step:06d}"
    if is_main:
        if beside.exists():
            shutil.rmtree(beside)
        beside.mkdir()
    if shard.is_sharded(model):
        _save_shards(model, optimizer, beside, processes)
    if not is_main:
        return
    if shard.is_sharded(model):
        shard.write_config(model, beside, has_base=_trains_base(model))
    else:
        _save_model(model, beside)
        save_file(_moments(model, optimizer), beside / f"{_OPTIMIZER}.safetensors")
    if tokenizer is not None:
        tokenizer.save_pretrained(beside)
    files = {path.name: path.stat().st_size for path in sorted(beside.iterdir()) if path.is_file()}
    replace_file(beside / _STATE, json.dumps({**asdict(progress), "files": files}, indent=1).encode())

    target = checkpoint_of(folder, progress.step)
    if target.exists():  # of a copy that was cut short: latest() passed over it
        shutil.rmtree(target)
    beside.rename(target)
    for old in sorted(_whole_checkpoints(folder), key=_step_of)[:-keep]:
        shutil.rmtree(old)


def load(checkpoint: Path, model: PreTrainedModel, optimizer: Optimizer) -> Progress:
    """Fill the trained tensors of `model` and the optimizer's moments from a checkpoint.

    Errors: ValueError for a file that is damaged, or tensors that do not fit.
    """
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    if shard.is_sharded(model):
        _load_shards(checkpoint, model, optimizer)
    else:
        of = {kind: [n for n in state["files"] if n.startswith(kind)] for kind in ("model", _OPTIMIZER)}
        _load_model(checkpoint, of["model"], model)
        _load_moments([checkpoint / name for name in of[_OPTIMIZER]], model, optimizer)
    return Progress(**{name: value for name, value in state.items() if name != "files"})


def append_metrics(folder: Path, line: dict[str, Any]) -> None:
    """Add one line; it is on its way to the disk when this returns."""
    with open(folder / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Every whole line; what a killed run left of the last one is passed over."""
    path = folder / METRICS
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def replace_file(path: Path, content: bytes) -> None:
    """Write a file beside its place, then rename it: a reader sees the old one or the new one, whole."""
    beside = path.with_name(f"{_SAVING}{path.name}")
    beside.write_bytes(content)
    os.replace(beside, path)


def first_difference(then: dict[str, Any], now: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """(name, value then, value now) of the first thing in which two trees differ, or None.

    A name inside of others is written with points between; a value that is missing is "none".
    """
    before, after = dict(_flat(then)), dict(_flat(now))
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            return name, before.get(name, "none"), after.get(name, "none")
    return None


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What requires gradients, by name, each tensor once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _check_same_run(folder: Path, run: dict[str, Any]) -> None:
    """Refuse to resume a run as another one: ValueError with the first thing that differs."""
    try:
        before = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"train: expected a run to resume in {folder}, got no {RUN} there.") from None
    except ValueError as error:
        raise ValueError(f"train: expected a whole {folder / RUN}, got a damaged one ({error}).") from error
    if difference := first_difference(before, run):
        name, then, now = difference
        raise ValueError(
            f"train: to resume the run in {folder}, expected {name} {then} as it began, got {now}."
        )


def _save_model(model: PreTrainedModel, folder: Path) -> None:
    # names as in the model, also where transformers renames on saving, so that load() finds them
    arguments: dict[str, Any] = {"save_original_format": False}
    if _trains_base(model):
        arguments["save_base"] = True
    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # there is one already
    try:
        model.save_pretrained(folder, **arguments)
    finally:
        if shows_bars:
            logging.enable_progress_bar()


def _load_model(checkpoint: Path, names: list[str], model: PreTrainedModel) -> None:
    trained = trained_parameters(model)
    ours = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    filled = set()
    for file in (checkpoint / name for name in names if name.endswith(".safetensors")):
        for name, tensor in _read(file).items():
            if name not in ours:
                continue
            if tensor.shape != ours[name].shape:
                raise ValueError(
                    f"train: {file}: {name}: expected {tuple(ours[name].shape)}, got {tuple(tensor.shape)}."
                )
            with torch.no_grad():
                ours[name].copy_(tensor)
            filled.add(id(ours[name]))
    if missing := [name for name, p in trained.items() if id(p) not in filled]:
        raise ValueError(f"train: expected {missing[0]} in {checkpoint}, got no such tensor.")


def _moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """`name/moment` -> tensor, for every trained parameter that has had a gradient.

    A single number has an axis here: torch.distributed.checkpoint loses those that have none.
    """
    state = optimizer.state_dict()["state"]
    return {
        f"{name}/{moment}": tensor.detach().clone().contiguous().reshape(tensor.shape or (1,))
        for index, name in enumerate(trained_parameters(model))
        for moment, tensor in state.get(index, {}).items()
    }


def _load_moments(files: list[Path], model: nn.Module, optimizer: Optimizer) -> None:
    state = {}
    for file in files:
        for key, tensor in _read(file).items():
            if key.rpartition("/")[0] not in trained_parameters(model):
                raise ValueError(f"train: {file}: expected moments of trained parameters, got {key}.")
            state[key] = tensor
    _set_moments(state, model, optimizer)


def _set_moments(tensors: dict[str, Tensor], model: nn.Module, optimizer: Optimizer) -> None:
    index = {name: i for i, name in enumerate(trained_parameters(model))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition("/")
        state.setdefault(index[name], {})[moment] = tensor.reshape(()) if moment == "step" else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _save_shards(model: PreTrainedModel, optimizer: Optimizer, folder: Path, processes: PartialState) -> None:
    """model-00001-of-0000N.safetensors with an index, and optimizer-... ; every process writes its part."""
    is_main = processes.is_main_process
    processes.wait_for_everyone()
    weights = {name: p.detach() for name, p in trained_parameters(model).items()}
    shard.write(weights, folder, is_main)
    shard.write(_moments(model, optimizer), folder / _OPTIMIZER, is_main)
    if is_main:
        for file in (folder / _OPTIMIZER).glob("*.safetensors"):
            file.rename(folder / file.name.replace("model", _OPTIMIZER, 1))
        shutil.rmtree(folder / _OPTIMIZER)


def _load_shards(checkpoint: Path, model: PreTrainedModel, optimizer: Optimizer) -> None:
    trained = trained_parameters(model)
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in trained.items()}
    moments = {}
    for key in shard.names(checkpoint):
        name, _, moment = key.rpartition("/")
        if name in trained:
            # how often a parameter has been stepped is one number, whole on every process
            moments[key] = torch.zeros(1) if moment == "step" else torch.zeros_like(trained[name].detach())
    shard.read(tensors | moments, checkpoint)
    _set_moments(moments, model, optimizer)


def _trains_base(model: PreTrainedModel) -> bool:
    return isinstance(model, HybridModel) and any(p.requires_grad for _, p in model.base_named_parameters())


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"train: expected a whole {file}, got a damaged one ({error}).") from error


def _whole_checkpoints(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and _is_whole(path))


def _is_whole(checkpoint: Path) -> bool:
    """Whether every file that was written is there, at its length."""
    try:
        files = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
