"""A model split among processes by FSDP2: its units, its precision, and its tensors on disk.

Every TRM is a unit by itself, so is the decoder layer around it, and so is what is left. A process keeps its
part of each parameter and gathers a unit's others while the unit computes. What is frozen has no gradient and
no optimizer state. TRM weights stay float32 where they are kept, and gradients where they are summed.

On disk a split model is what a whole one is: torch.distributed.checkpoint writes each process's part as
safetensors and puts them together, so any number of processes can load it, and so can from_pretrained.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hybrid.model.hybrid_model import HybridModel
from hybrid.model.injection import Injection
from hybrid.model.injection_points import decoder_layers
from hybrid.model.trm_names import is_trm_key

_FILE_BYTES = 5 * 10**9  # the largest file, about


def shard(model: PreTrainedModel, mesh: DeviceMesh, compute: torch.dtype | None = None) -> None:
    """Split `model` among the processes of `mesh`, in place; do it before the optimizer is made.

    Where the first process has weights and another has them on the meta device, they are sent to it, a unit
    at a time: it holds one unit and its own part of the others. So one process alone has to load a model.

    compute   the precision of the units' work; None: that of the language model's parameters as they are
    """
    base = model.llm_model if isinstance(model, HybridModel) else model
    of_base = next(p for name, p in base.named_parameters() if not is_trm_key(name))
    policy = MixedPrecisionPolicy(
        param_dtype=compute or of_base.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # RoPE's cosines and sines stay float32
    )
    units: list[nn.Module] = [m for m in model.modules() if isinstance(m, Injection)]
    # the rest, too, is split again after a forward, so that parameters are always what is kept
    units += [*decoder_layers(base), model]
    sends = _first_sends(model, mesh)
    for unit in units:
        if sends:
            _send_parameters(unit, mesh)
        splits_again = True if unit is model else None
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=splits_again)
    if sends:
        _send_buffers(model, mesh)


def _first_sends(model: nn.Module, mesh: DeviceMesh) -> bool:
    """Whether the first process has weights that another has not; all have to ask."""
    missing = float(any(p.is_meta for p in model.parameters()))
    of_first, of_any = (torch.tensor(missing, device=mesh.device_type) for _ in range(2))
    dist.broadcast(of_first, src=0)
    dist.all_reduce(of_any, dist.ReduceOp.MAX)
    return not of_first and bool(of_any)


def _send_parameters(unit: nn.Module, mesh: DeviceMesh) -> None:
    """From the first process to all: those of `unit` that are not split yet; tied ones stay tied."""
    came: dict[nn.Parameter, nn.Parameter] = {}
    for module in unit.modules():
        for name, p in module.named_parameters(recurse=False):
            if isinstance(p, DTensor):
                continue
            if p not in came:
                whole = (
                    torch.empty_like(p, device=mesh.device_type)
                    if p.is_meta
                    else p.detach().to(mesh.device_type)
                )
                dist.broadcast(whole, src=0)
                came[p] = nn.Parameter(whole, p.requires_grad) if p.is_meta else p
            setattr(module, name, came[p])


def _send_buffers(model: nn.Module, mesh: DeviceMesh) -> None:
    """From the first process to all: also those that no file has."""
    for buffer in model.buffers():
        whole = buffer.to(mesh.device_type)
        dist.broadcast(whole, src=0)
        buffer.copy_(whole)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """This process's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write(tensors: Mapping[str, Tensor], folder: Path, is_main: bool) -> None:
    """Write `tensors` as safetensors files with an index, as transformers does; every process takes part."""
    size, files = 0, {}
    for name, tensor in tensors.items():
        size += tensor.nbytes
        files[name] = 1 + (size - 1) // _FILE_BYTES
    numbers = sorted(set(files.values()))  # a large tensor passes over some
    files = {name: numbers.index(file) + 1 for name, file in files.items()}
    writer = HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=files, save_distributed=True, enable_consolidation=True
    )
    dcp.save(dict(tensors), storage_writer=writer)
    if is_main:
        shutil.rmtree(folder / "sharded")


def read(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill `tensors`, this process's parts, from the .safetensors files in `folder`.

    Errors: ValueError where they do not fit or a file is damaged.
    """
    try:
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))
    except Exception as error:  # DCP wraps whatever its processes raised
        raise ValueError(f"train: expected a whole checkpoint in {folder}, got: {error}.") from error


def names(folder: Path) -> list[str]:
    """The tensors in all .safetensors files of `folder`."""
    return list(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


def write_config(model: PreTrainedModel, folder: Path, has_base: bool) -> None:
    """config.json and generation_config.json, as save_pretrained writes them.

    has_base   the base's tensors are beside them, and it needs to be found nowhere else
    """
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = [type(model).__name__.removeprefix("FSDP")]
    if has_base:
        config["base_model_name_or_path"] = None
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
