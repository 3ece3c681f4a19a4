"""Save the adapter of a hybrid that transformers' own add_adapter or load_adapter gave one, as of any model.

The folder gets adapter_config.json and adapter_model.safetensors, and no hybrid: that is in the folder which
the adapter's config names. A TRM that is neither in the adapter nor there would be lost, and is refused.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hybrid.model.injection import Injection
from hybrid.model.peft_targets import OF_NO_FOLDER
from hybrid.saving import base_reference
from hybrid.saving.load_hybrid import trms_in


def check_adapter(
    model: Any, folder: str | os.PathLike[str], save_base: bool | None, state_dict: Mapping[str, Tensor]
) -> None:
    """ValueError where the adapter's files would not give this hybrid again; nothing was written then."""
    if save_base is not None:
        raise ValueError(
            "save_pretrained: expected no save_base where add_adapter or load_adapter gave the hybrid an "
            f"adapter, which is saved alone, got save_base={save_base}."
        )
    base_reference.refuse_bases_folder(Path(folder), model.config)
    if (why := _why_trm_is_lost(model, state_dict)) is not None:
        raise ValueError(
            f"save_pretrained: the adapter alone is saved, and a TRM that is not in it would be lost: {why}. "
            "Give the adapter the TRM, LoraConfig(..., modules_to_save=['trm']), with point 0 ['trm', "
            "'trm_before']; or save the hybrid before it has an adapter, load it, and add the adapter then."
        )


def save_adapter(
    model: Any,
    write: Callable[..., None],
    folder: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    *args: Any,
    **kwargs: Any,
) -> None:
    """By transformers' own save_pretrained, `write`."""
    write(folder, True, dict(state_dict), *args, **kwargs)
    if not model.peft_config[model.active_adapters()[0]].base_model_name_or_path:
        warnings.warn(OF_NO_FOLDER, stacklevel=4)


def _why_trm_is_lost(model: Any, state_dict: Mapping[str, Tensor]) -> str | None:
    trms = dict(_not_in_adapter(model))
    parameters = {f"{trm}.{name}": p for trm, one in trms.items() for name, p in one.named_parameters()}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            return f"{name} requires gradients"
    if all(not one.out_proj.weight.any() for one in trms.values()):
        return None  # each adds nothing, as a fresh one
    if not (folder := model.__dict__.get("name_or_path")):
        return f"{next(iter(trms))} is in no folder, for the hybrid was wrapped in this process"
    try:
        there = trms_in(folder)
    except (OSError, ValueError):
        return f"{folder}, where the hybrid was loaded from, cannot be read"
    for name in parameters:
        t = state_dict.get(name)
        if t is None or not base_reference.is_here(t):  # elsewhere, or split among processes
            continue
        if name not in there or not there[name].to(t.dtype).equal(t.detach().cpu()):
            return f"{name} has other values than in {folder}"
    return None


def _not_in_adapter(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, TRM) of those that the active adapter has no copy of."""
    adapters = model.active_adapters()
    copied = tuple(f"{name}." for name, module in model.named_modules() if _has_copy(module, adapters))
    for name, module in model.named_modules():
        if isinstance(module, Injection) and not name.startswith(copied):
            yield name, module


def _has_copy(module: nn.Module, adapters: list[str]) -> bool:
    copies = getattr(module, "modules_to_save", ())
    return any(adapter in copies for adapter in adapters)
