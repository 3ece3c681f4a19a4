"""Save a hybrid: config.json and model.safetensors, with the TRMs' tensors or with the whole model.

Files replace those of a former save all at once (saved_folder.py). What could not be loaded again is refused
before anything is written (may_be_saved.py).
"""

import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import logging

from hybrid.config import HybridConfig
from hybrid.model.quantized_base import is_quantized
from hybrid.model.trm_names import is_trm_key
from hybrid.saving import base_reference, saved_folder
from hybrid.saving.may_be_saved import (
    check_complete,
    check_config_fits,
    not_kept,
    refuse_adapters,
    refuse_another_model,
    refuse_computed,
)
from hybrid.saving.modeling_file import AUTO_MAP, write_modeling_file
from hybrid.saving.save_adapter import check_adapter, save_adapter
from hybrid.saving.saved_tokenizer import copy_tokenizer, has_tokenizer

logger = logging.get_logger(__name__)


_SAVING = threading.RLock()  # one save at a time in a process


def save(
    model: Any,
    write: Callable[..., None],
    folder: str | os.PathLike[str],
    save_base: bool | None,
    state_dict: Mapping[str, Tensor],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Write `model` into `folder` by transformers' own save_pretrained, then rename into place.

    Of a hybrid with an adapter the adapter alone, as transformers does it: save_adapter.py.

    Errors: see HybridModel.save_pretrained.
    """
    with _SAVING:
        if model._hf_peft_config_loaded:  # by add_adapter or load_adapter; not inside of PEFT's own model
            refuse_computed(model, save_base=False)
            check_adapter(model, folder, save_base, state_dict)
            save_adapter(model, write, folder, state_dict, *args, **kwargs)
            return
        saves_base = _saves_base(model, save_base, state_dict)
        for line in not_kept(model):
            logger.warning(line)
        _save(model, write, folder, saves_base, state_dict, *args, **kwargs)


def _saves_base(model: Any, asked: bool | None, state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the base is saved with the TRM. Errors: see HybridModel.save_pretrained."""
    if asked is not False and model.config.lora_rank is None:
        refuse_adapters(name for name, _ in model.base_named_parameters())
    if asked is True:
        return True
    why = _why_base_is_lost(model, state_dict)
    has_reference = model.config.base_model_name_or_path is not None
    if why is not None and asked is False and has_reference:
        raise ValueError(
            "save_pretrained: save_base=False expected a base that can be loaded again from "
            f"{model.config.base_model_name_or_path}, but {why}."
        )
    if why is not None and asked is None and has_reference:
        logger.warning(f"The base is saved with the TRM, for {why}.")
    return why is not None and asked is None


def _why_base_is_lost(model: Any, state_dict: Mapping[str, Tensor]) -> str | None:
    """Why what the config refers to would not give this base; None: it does, or loading will tell."""
    if model.config.base_model_name_or_path is None:
        return "there is no name or folder that it could be loaded from again"
    name, was_cast = base_reference.changed(model, state_dict, model._base_sums)
    if name is not None:
        return f"{name} has changed since it was wrapped"
    if model._files_give_base is True or was_cast:
        model._files_give_base = base_reference.compare_with_files(model, state_dict)
    if isinstance(model._files_give_base, str):
        return model._files_give_base
    if was_cast and model._files_give_base is False:
        return "it was cast since it was wrapped, and its files are not at hand to compare with"
    return None


def _save(
    model: Any,
    write: Callable[..., None],
    folder: str | os.PathLike[str],
    save_base: bool,
    state_dict: Mapping[str, Tensor],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Under the lock: what is being saved stands in the model's config while it is written."""
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"save_pretrained: expected a folder, got the file {folder}.")
    base_reference.refuse_bases_folder(folder, model.config)
    refuse_another_model(folder)
    refuse_computed(model, save_base)
    check_complete(model, state_dict, save_base, kwargs)
    check_config_fits(model)
    if save_base:
        if is_quantized(model.llm_model):
            raise ValueError(
                "save_pretrained: expected a base that can be had again where "
                "config.base_model_name_or_path says, for a quantized one is not written, got "
                f"{model.config.base_model_name_or_path!r}; save_base=False writes the TRM alone."
            )
    else:
        state_dict = {name: t for name, t in state_dict.items() if is_trm_key(name)}
        # else the names of a base's own files would be given to the TRMs' tensors, as to its experts
        kwargs["save_original_format"] = False
    reference = model.config.base_model_name_or_path
    model.config.base_model_name_or_path = None if save_base else reference
    model.config.base_checksums = None if save_base else _digests(model)
    model.llm_model.config.dtype = model.llm_model.dtype  # as it is now, for the next load
    model.config.base_is_frozen = not any(p.requires_grad for _, p in model.base_named_parameters())
    push = kwargs.pop("push_to_hub", False)
    hub = {name: kwargs.pop(name) for name in _OF_UPLOAD if name in kwargs}
    is_own_code = not model.config.auto_map  # a subclass of the user's may have another
    tokenizer_of = [] if has_tokenizer(folder) else _places_of_tokenizer(model.config, reference)

    def write_all(place: Path) -> None:
        if is_own_code:
            write_modeling_file(place)
        copy_tokenizer(tokenizer_of, place)
        _write(model, write, place, state_dict, *args, **kwargs)

    if is_own_code:
        model.config.auto_map = AUTO_MAP
    try:
        saved_folder.replace(folder, write_all)
    finally:
        model.config.base_model_name_or_path = reference
        if is_own_code:
            del model.config.auto_map
    if push:
        _push(model, hub.pop("repo_id", folder.name), save_base, hub, kwargs)


def _digests(model: Any) -> dict[str, str] | None:
    """The base's checksums, made once: before each save it is compared with what it was."""
    known = model.__dict__.setdefault("_base_digests", {})
    if model.config.base_model_name_or_path is None:  # with nothing
        known.clear()
    dtype = model.llm_model.dtype
    if dtype not in known:
        known[dtype] = base_reference.checksums(model, model._base_sums)
    found: dict[str, str] | None = known[dtype]
    return found


_OF_UPLOAD = ("repo_id", "commit_message", "create_pr", "private", "token", "revision", "tags")


def _push(model: Any, repo_id: str, is_whole: bool, hub: dict[str, Any], others: dict[str, Any]) -> None:
    """transformers saves once more, into a folder of its own, and uploads all of that; as this save was."""
    sizes = {"max_shard_size": others["max_shard_size"]} if "max_shard_size" in others else {}
    model.save_pretrained = partial(model.save_pretrained, save_base=is_whole)
    try:
        model.push_to_hub(repo_id, **hub, **sizes)
    finally:
        del model.save_pretrained


def _write(
    model: Any,
    write: Callable[..., None],
    place: Path,
    state_dict: Mapping[str, Tensor],
    *args: Any,
    **kwargs: Any,
) -> None:
    """transformers' save_pretrained, told that it has to fetch the tensors that are offloaded."""
    had = {name: model.__dict__[name] for name in ("hf_device_map",) if name in model.__dict__}
    if any(t.device.type == "meta" for t in state_dict.values()):
        model.hf_device_map = {"": "disk"}
    try:
        write(place, True, dict(state_dict), *args, **kwargs)
    finally:
        model.__dict__.pop("hf_device_map", None)
        model.__dict__.update(had)


def _places_of_tokenizer(config: HybridConfig, reference: str | None) -> list[tuple[Path, str | None]]:
    """The hybrid's own folder, where it was loaded from one; then the language model's."""
    own = Path(config.name_or_path or "nowhere")
    places: list[tuple[Path, str | None]] = [(own, None)] if own.is_dir() else []
    if reference is not None and (folder := base_reference.folder_of(config, reference)) is not None:
        places.append((folder, config.base_gguf_file))
    return places
