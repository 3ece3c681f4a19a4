"""A hybrid on disk: config.json and model.safetensors, with the TRMs' tensors or with the whole model.

Files are written into a folder beside the old ones and renamed into their place, so a killed run
leaves the last good checkpoint.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from hybrid.config import HybridConfig
from hybrid.quantized_base import as_it_was, integers, is_quantized, is_quantized_tensor

# what says where the TRM's files are, and not how the base is to be loaded
_PLACE_OF_TRM = ("revision", "subfolder")
_HUB = ("token", "cache_dir", "local_files_only", "force_download", "proxies")
DRAWS = "trm_draws"  # among the tensors, [1] int64: how often training drew a number of recursion steps
_SAMPLES = 16  # values of each tensor of the base that are remembered


def is_trm_key(name: str) -> bool:
    """Whether a parameter belongs to a TRM: the training guide's own rule."""
    return "trm" in name.lower()


def sample(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """A few values of each tensor, to tell later whether the base is still as it came."""
    return {name: _few(p) for name, p in parameters if _is_at_hand(p)}


def has_changed(
    before: Mapping[str, Tensor], parameters: Iterable[tuple[str, Tensor]], now: Mapping[str, Tensor]
) -> bool:
    """Whether a tensor of the base differs from its sample; one that is not at hand counts if trainable."""
    for name, parameter in parameters:
        tensor = now.get(name, parameter)
        if name not in before or not _is_at_hand(tensor):
            if parameter.requires_grad:
                return True
            continue
        then, few = before[name], _few(tensor)
        if not is_quantized_tensor(tensor):
            then = then.to(tensor.dtype).double()
        if then.shape != few.shape or not torch.equal(then, few):
            return True
    return False


def save(
    model: Any,
    write: Callable[..., None],
    folder: str | os.PathLike[str],
    save_base: bool,
    state_dict: Mapping[str, Tensor],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Write `model` into `folder` by transformers' own save_pretrained, then rename into place."""
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"save_pretrained: expected a folder, got the file {folder}.")
    if save_base:
        if is_quantized(model.llm_model):
            raise ValueError(
                "save_pretrained: expected a base that can be had again where "
                "config.base_model_name_or_path says, for a quantized one is not written, got "
                f"{model.config.base_model_name_or_path!r}; save_base=False writes the TRM alone."
            )
        if model.config.lora_rank is None:
            _refuse_adapters(name for name, _ in model.base_named_parameters())
    else:
        state_dict = {name: t for name, t in state_dict.items() if is_trm_key(name)}
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", folder.name)

    folder.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    reference = model.config.base_model_name_or_path
    model.config.base_model_name_or_path = None if save_base else reference
    try:
        write(beside, True, state_dict, *args, **kwargs)
        _move(beside, folder)
    finally:
        model.config.base_model_name_or_path = reference
        shutil.rmtree(beside, ignore_errors=True)


def load(
    cls: Any,
    load_whole: Callable[..., Any],
    path: str | os.PathLike[str],
    *args: Any,
    config: HybridConfig | None,
    llm_model: Any,
    **kwargs: Any,
) -> Any:
    """HybridModel.from_pretrained: the base by reference and the TRMs' tensors, or the whole model."""
    hub = {name: kwargs[name] for name in (*_PLACE_OF_TRM, *_HUB) if name in kwargs}
    if config is None:
        config = HybridConfig.from_pretrained(path, **hub)
    if llm_model is None:
        if config.base_model_name_or_path is None:
            return _load_whole(load_whole, path, *args, config=config, **kwargs)
        of_base = {name: value for name, value in kwargs.items() if name not in _PLACE_OF_TRM}
        try:
            if "quantization_config" not in of_base:
                find = {name: of_base[name] for name in (*_HUB, "trust_remote_code") if name in of_base}
                of_base |= as_it_was(config.base_config, config.base_model_name_or_path, **find)
            llm_model = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, **of_base)
        except OSError as error:
            raise ValueError(
                f"HybridModel: expected the base model at {config.base_model_name_or_path!r}, got: "
                f"{_first_line(error)}. Pass llm_model= if it has moved."
            ) from error
    tensors = _read(path, hub)
    tensors.pop(DRAWS, None)  # a run that resumes reads it; this is a model for a new one
    model = cls(config=config, llm_model=llm_model)
    _fill(model, tensors, path)
    return model.eval()


def _load_whole(load_whole: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
    wants_info = kwargs.pop("output_loading_info", False)
    try:
        model, info = load_whole(path, *args, output_loading_info=True, **kwargs)
    except safetensors.SafetensorError as error:
        raise ValueError(_damaged(path, error)) from error
    except RuntimeError as error:
        if "size" not in str(error):
            raise
        raise ValueError(
            f"HybridModel: a tensor in {path} has another shape: {_first_line(error)}."
        ) from error
    for kind in ("missing", "unexpected"):
        if keys := sorted(info[f"{kind}_keys"]):
            raise ValueError(f"HybridModel: {path}: {len(keys)} tensors are {kind}, the first is {keys[0]}.")
    return (model, info) if wants_info else model


def _read(path: str | os.PathLike[str], hub: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of one safetensors file, or of the shards that an index names."""
    find = {**hub, "_raise_exceptions_for_missing_entries": False}
    if file := cached_file(path, SAFE_WEIGHTS_NAME, **find):
        files = [file]
    elif index := cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **find):
        files, _ = get_checkpoint_shard_files(path, index, **hub)
    else:
        raise ValueError(f"HybridModel: expected {SAFE_WEIGHTS_NAME} in {path}, got no such file.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(_damaged(file, error)) from error
    return tensors


def _fill(model: Any, tensors: dict[str, Tensor], path: Any) -> None:
    """Copy the tensors in; every one must fit, and every TRM tensor must come."""
    wanted = model.state_dict()
    missing = sorted(name for name in wanted if is_trm_key(name) and name not in tensors)
    unexpected = sorted(tensors.keys() - wanted.keys())
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            raise ValueError(
                f"HybridModel: {path}: {len(names)} tensors are {kind}, the first is {names[0]}."
            )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"HybridModel: {path}: {name}: "
                f"expected {tuple(wanted[name].shape)}, got {tuple(tensor.shape)}."
            )
    model.load_state_dict(tensors, strict=False)


def _move(source: Path, target: Path) -> None:
    """Rename every file of `source` into `target`, the config last, and drop weights of a former save."""
    names = sorted((p.name for p in source.iterdir()), key=lambda name: name == "config.json")
    for name in names:
        os.replace(source / name, target / name)
    for old in (
        *target.glob("model-*-of-*.safetensors"),
        target / SAFE_WEIGHTS_INDEX_NAME,
        target / SAFE_WEIGHTS_NAME,
    ):
        if old.name not in names:
            old.unlink(missing_ok=True)


def _refuse_adapters(base_names: Iterable[str]) -> None:
    adapters = [name for name in base_names if ".base_layer." in name or "lora_" in name]
    if adapters:
        raise ValueError(
            f"save_pretrained: expected a base without adapters inside, got {adapters[0]}. Wrap the hybrid: "
            'get_peft_model(hybrid, LoraConfig(..., modules_to_save=["trm"])), and save that; '
            "or save_base=False for the TRM alone."
        )


def _is_at_hand(t: Tensor) -> bool:
    is_known = type(t) in (Tensor, torch.nn.Parameter) or is_quantized_tensor(t)
    return t.device.type != "meta" and is_known


def _few(t: Tensor) -> Tensor:
    flat = (integers(t) if is_quantized_tensor(t) else t).detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)].double().cpu()


def _damaged(path: Any, error: Exception) -> str:
    return (
        f"HybridModel: expected a whole safetensors file, got a damaged one in {path} ({_first_line(error)})."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
