"""The tensors of a training run's checkpoint: what was trained, and the optimizer's moments, as safetensors.

The names are those of the model's parameters, whichever way the model was split among processes.
"""

import shutil
from pathlib import Path
from typing import Any

import safetensors
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.utils import logging

from hybrid.model.hybrid_model import HybridModel
from hybrid.training import shard

OPTIMIZER = "optimizer"  # how the names of its files begin


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What requires gradients, by name, each tensor once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def write_tensors(
    model: PreTrainedModel, optimizer: Optimizer, folder: Path, processes: PartialState
) -> None:
    """Config, trained tensors and moments into `folder`; every process calls it, to write its part."""
    if shard.is_sharded(model):
        _save_shards(model, optimizer, folder, processes)
    if not processes.is_main_process:
        return
    if shard.is_sharded(model):
        shard.write_config(model, folder, has_base=_trains_base(model))
    else:
        _save_model(model, folder)
        save_file(_moments(model, optimizer), folder / f"{OPTIMIZER}.safetensors")


def read_tensors(checkpoint: Path, files: list[str], model: PreTrainedModel, optimizer: Optimizer) -> None:
    """Fill the trained tensors and the moments from the `files` of a checkpoint.

    Errors: ValueError for a file that is damaged, or tensors that do not fit.
    """
    if shard.is_sharded(model):
        _load_shards(checkpoint, model, optimizer)
    else:
        of = {kind: [n for n in files if n.startswith(kind)] for kind in ("model", OPTIMIZER)}
        _load_model(checkpoint, of["model"], model)
        _load_moments([checkpoint / name for name in of[OPTIMIZER]], model, optimizer)


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
    shard.write(_moments(model, optimizer), folder / OPTIMIZER, is_main)
    if is_main:
        for file in (folder / OPTIMIZER).glob("*.safetensors"):
            file.rename(folder / file.name.replace("model", OPTIMIZER, 1))
        shutil.rmtree(folder / OPTIMIZER)


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
