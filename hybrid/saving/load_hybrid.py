"""Load a hybrid: its base by reference and the TRMs' tensors beside it, or the whole model."""

import copy
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    logging,
)
from transformers.utils.hub import get_checkpoint_shard_files

from hybrid.config import HybridConfig, meant_field, trm_fields
from hybrid.config_values import read_json_object
from hybrid.error_text import did_you_mean, first_line
from hybrid.model.quantized_base import as_it_was
from hybrid.model.trm_names import is_trm_key
from hybrid.saving import base_reference, saved_folder
from hybrid.saving.local_paths import check_folder

logger = logging.get_logger(__name__)

# what says where the TRM's files are, and not how the base is to be loaded
_PLACE_OF_TRM = ("revision", "subfolder")
# of a load in which every tensor came and fitted, as one that returns must
_LOADING_INFO = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
_MOVED = "If it has moved, base_model_name_or_path= says where to, on a command line --hybrid-base."
_HUB = ("token", "cache_dir", "local_files_only", "force_download", "proxies")


def load(
    cls: Any,
    load_whole: Callable[..., Any],
    path: str | os.PathLike[str] | None,
    *args: Any,
    config: HybridConfig | str | os.PathLike[str] | None,
    llm_model: Any,
    **kwargs: Any,
) -> Any:
    """HybridModel.from_pretrained: the base by reference and the TRMs' tensors, or the whole model."""
    if path is None:  # as transformers has it: `config` and `state_dict` are the whole model
        return _load_whole(load_whole, None, *args, config=config, **kwargs)
    with saved_folder.as_saved(path) as place:
        return _load(cls, load_whole, place, *args, given=config, llm_model=llm_model, **kwargs)


def _load(
    cls: Any,
    load_whole: Callable[..., Any],
    path: str,
    *args: Any,
    given: HybridConfig | str | os.PathLike[str] | None,
    llm_model: Any,
    **kwargs: Any,
) -> Any:
    hub = {name: kwargs[name] for name in (*_PLACE_OF_TRM, *_HUB) if name in kwargs}
    config = _config_of(cls, path, given, hub)
    fields = {name: kwargs.pop(name) for name in list(kwargs) if name in trm_fields(type(config))}
    config.update(fields)
    _take_settings(config, kwargs)
    if llm_model is None and config.base_model_name_or_path is None:
        _refuse_no_numbers(_read(path, hub, is_trm_key), path)  # which would be cast without a word
        return _load_whole(load_whole, path, *args, config=config, **kwargs)
    adapter, wants_info = _adapter_of(kwargs, path), kwargs.pop("output_loading_info", False)
    if llm_model is None:
        assert config.base_model_name_or_path is not None
        of_base = {name: value for name, value in kwargs.items() if name not in _PLACE_OF_TRM}
        if Path(config.base_model_name_or_path).resolve() == Path(path).resolve():
            raise ValueError(f"HybridModel: expected the base of {path} elsewhere, got the same folder.")
        try:
            if config.base_gguf_file is None and config.base_subfolder is None:
                check_folder("the base model", config.base_model_name_or_path)
        except ValueError as error:
            raise ValueError(f"HybridModel: {first_line(error)}. {_MOVED}") from None
        try:
            of_base |= _reference_of(config, of_base)
            llm_model = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, **of_base)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "mismatched" not in str(error):
                raise  # else tensors of other sizes than the config's
            raise ValueError(
                f"HybridModel: expected the base model at {config.base_model_name_or_path!r}, got: "
                f"{first_line(error)}. {_MOVED}"
            ) from error
    tensors = _read(path, hub)
    config.name_or_path = str(path)  # as of any model: by it PEFT and TRL find the hybrid again
    model = cls(config=config, llm_model=llm_model)
    try:
        base_reference.check_loaded(model, config.base_checksums)
        _fill(model, tensors, path)
        model = _as_saved(model, path, config, hub)
        if adapter is not None:
            model.load_adapter(**adapter)
        return (model, {kind: set() for kind in _LOADING_INFO}) if wants_info else model
    except BaseException:
        model.unwrap()  # a base that was passed goes back as it came
        raise


def _config_of(
    cls: Any, path: str, given: HybridConfig | str | os.PathLike[str] | None, hub: dict[str, Any]
) -> HybridConfig:
    """The saved config, or the one that was given, itself or by its folder."""
    if isinstance(given, HybridConfig):
        return given
    place = path if given is None else given
    if not isinstance(place, str | os.PathLike):
        raise ValueError(
            "HybridModel.from_pretrained: expected config to be a HybridConfig or the folder of one, got "
            f"{type(given).__name__}."
        )
    check_folder("a saved hybrid", place)
    config: HybridConfig = cls.config_class.from_pretrained(place, **hub)
    return config


def _adapter_of(kwargs: dict[str, Any], path: str) -> dict[str, Any] | None:
    """What load_adapter is told where an Auto class was given an adapter's folder; taken out of `kwargs`.

    Else of the adapter in the hybrid's own folder; None where there is none.
    """
    found = dict(kwargs.pop("adapter_kwargs", None) or {})
    name = kwargs.pop("adapter_name", None)
    place = found.pop("_adapter_model_path", path)
    if place == path and not Path(path, ADAPTER_CONFIG_NAME).is_file():
        return None
    return {"peft_model_id": str(place), "adapter_name": name, "adapter_kwargs": found}


def _reference_of(config: HybridConfig, given: dict[str, Any]) -> dict[str, Any]:
    """What from_pretrained has to be told to give the base that was wrapped."""
    name, found = config.base_model_name_or_path, {}
    assert name is not None
    for argument in ("revision", "subfolder", "gguf_file"):
        if (value := getattr(config, f"base_{argument}")) is not None:
            found[argument] = value
    if "quantization_config" not in given:
        find = {n: given[n] for n in (*_HUB, "trust_remote_code") if n in given}
        find |= {n: value for n, value in found.items() if n != "gguf_file"}
        if config.base_gguf_file is None:
            found |= as_it_was(config.base_config, name, **find)
    if config.base_config is not None and "config" not in given:
        # sizes and positions that were chosen when it was loaded are chosen again
        found["config"] = copy.deepcopy(config.base_config)
        is_gguf = config.base_gguf_file is not None
        if is_gguf and given.get("dtype", given.get("torch_dtype")) in (None, "auto"):
            found["dtype"] = config.base_config.dtype  # else the file's own
        if (is_gguf or "quantization_config" in {**given, **found}) and hasattr(
            found["config"], "quantization_config"
        ):
            del found["config"].quantization_config
    return found


def _take_settings(config: HybridConfig, kwargs: dict[str, Any]) -> None:
    """Settings of the language model among the keywords (use_cache=False) are set, strange ones refused."""
    known = _ARGUMENTS | set(inspect.signature(PreTrainedModel.from_pretrained).parameters)
    for name in [name for name in kwargs if name not in known and not name.startswith("_")]:
        if hasattr(config, name):
            setattr(config, name, kwargs.pop(name))
            continue
        near = meant_field(name, [*trm_fields(type(config)), *sorted(known)], cutoff=0.7)
        raise ValueError(
            f"HybridModel.from_pretrained: there is no field or argument {name!r}{did_you_mean(near)}"
        )


# what transformers' from_pretrained takes (5.17 to 5.23), besides its signature
_ARGUMENTS = {
    "adapter_kwargs",
    "adapter_name",
    "allow_all_kernels",
    "attn_implementation",
    "code_revision",
    "device_map",
    "device_mesh",
    "disable_mmap",
    "distributed_config",
    "dtype",
    "experts_implementation",
    "fusion_config",
    "generation_config",
    "gguf_file",
    "kernel_config",
    "key_mapping",
    "low_cpu_mem_usage",
    "max_memory",
    "mirror",
    "offload_buffers",
    "offload_folder",
    "offload_state_dict",
    "output_loading_info",
    "proxies",
    "quantization_config",
    "state_dict",
    "subfolder",
    "torch_dtype",
    "tp_plan",
    "tp_size",
    "tqdm_class",
    "trust_remote_code",
    "use_kernels",
    "variant",
}


def _as_saved(model: Any, path: Any, config: HybridConfig, hub: dict[str, Any]) -> Any:
    """The model in eval mode, with the settings of generation and the frozen base that it was saved with."""
    file = cached_file(path, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if file is not None:  # a folder of before there was one: its base's stay
        settings = read_json_object(file, "settings of generation")
        model.generation_config = GenerationConfig.from_dict(settings)
    if config.base_is_frozen:
        model.freeze_base()
        logger.info("The base is frozen, as it was saved: model.requires_grad_(True) lets it learn.")
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
            f"HybridModel: a tensor in {path} has another shape: {first_line(error)}."
        ) from error
    for kind in ("missing", "unexpected"):
        if keys := sorted(info[f"{kind}_keys"]):
            raise ValueError(f"HybridModel: {path}: {len(keys)} tensors are {kind}, the first is {keys[0]}.")
    if model.config.base_is_frozen and not model._hf_peft_config_loaded:  # whose adapter froze all else
        model.freeze_base()
    return (model, info) if wants_info else model


def _read(
    path: str | os.PathLike[str], hub: dict[str, Any], is_wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """Tensors of one safetensors file, or of the shards that an index names."""
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
            with safe_open(file, "pt") as opened:
                names = [n for n in opened.keys() if is_wanted(n)]  # noqa: SIM118  no dict
                tensors |= {name: opened.get_tensor(name) for name in names}
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(_damaged(file, error)) from error
    return tensors


def trms_in(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The TRMs' tensors of a saved hybrid that was loaded from there in this process.

    Errors: as from_pretrained.
    """
    with saved_folder.as_saved(path) as place:
        return _read(place, {"local_files_only": True}, is_trm_key)


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
    if of_base := sorted(name for name in tensors if not is_trm_key(name)):
        raise ValueError(
            f"HybridModel: {path}: expected tensors of the TRMs alone beside a base that is loaded from "
            f"elsewhere, got {of_base[0]}."
        )
    _refuse_no_numbers(tensors, path)
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"HybridModel: {path}: {name}: "
                f"expected {tuple(wanted[name].shape)}, got {tuple(tensor.shape)}."
            )
    model.load_state_dict(tensors, strict=False)


def _refuse_no_numbers(tensors: Mapping[str, Tensor], path: Any) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():  # as it is cast, at most
            raise ValueError(
                f"HybridModel: {path}: {name}: expected floating numbers, got "
                f"{'some that are none' if tensor.is_floating_point() else tensor.dtype}."
            )


def _damaged(path: Any, error: Exception) -> str:
    return (
        f"HybridModel: expected a whole safetensors file, got a damaged one in {path} ({first_line(error)})."
    )
