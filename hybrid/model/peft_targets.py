"""PEFT on a hybrid: what it is told to adapt means the language model, and the TRMs are left alone.

PEFT finds its targets by the ends of module names, and a TRM's matrices have names that language models use
too (`o_proj`, `down_proj`). It cannot adapt them: the kernels take the matrices themselves, so that nothing
calls a layer that PEFT would put around one. PEFT has no place where a model could say so. `tell_peft` puts a
step before PEFT's `inject_adapter`, through which every method goes that adapts layers. To models without a
TRM the step does nothing. On one with TRMs it

- answers "no" for every module of a TRM that PEFT asks about,
- refuses targets that are in TRMs alone, in `modules_to_save` parts of one, and a method that cannot work,
- tells PEFT the language model's own type, by which it knows the usual targets (`LoraConfig()` without any),
- names a head whose adapter is to be tied to the embeddings' by the end of its name too, as PEFT asks for it.

A second step, after PEFT's `save_pretrained`, warns where the adapter cannot say which hybrid it belongs to.

A TRM trains next to an adapter as a whole: `modules_to_save=["trm"]`, and `"trm_before"` for point 0.
"""

import importlib.util
import inspect
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hybrid.model.injection import Injection
from hybrid.model.lora import ADAPTER, adapted
from hybrid.model.trm_names import is_injection_name, is_trm_key

_ADVICE = "a TRM's matrices go to its kernels and cannot be adapted; modules_to_save=['trm'] trains it whole"

OF_NO_FOLDER = (
    "HybridModel: the adapter that was saved names no base, for the hybrid was wrapped in this process and "
    "is in no folder; nor does it hold the HybridConfig. To load it, wrap the base with the same config and "
    "call PeftModel.from_pretrained(hybrid, folder), or hybrid.load_adapter(folder). Or save the hybrid, "
    "load it, and add the adapter then."
)

_OVER_LORA_RANK = (
    "HybridModel: PEFT expected a hybrid without lora_rank, got one that has PEFT's layers already: another "
    "adapter would switch its LoRA off. Train with lora_rank alone, or wrap the base without it and give "
    "PEFT the rank: LoraConfig(r=..., target_modules='all-linear', modules_to_save=['trm'])."
)


def tell_peft() -> None:
    """Put the step before PEFT's, once in a process; nothing where PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        return
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    their_inject, their_config = BaseTuner.inject_adapter, BaseTuner.get_model_config
    if hasattr(their_inject, "leaves_trms_alone"):
        return

    @wraps(their_inject)
    def inject_adapter(tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        of_trms = _names_in_trms(model)
        if not of_trms:
            their_inject(tuner, model, adapter_name, *args, **kwargs)
            return
        try:
            if not hasattr(tuner.peft_config[adapter_name], "of_hybrid"):
                _check_beside_our_own(model, adapter_name)
            with _for_the_base(tuner, model, tuner.peft_config[adapter_name], of_trms):
                their_inject(tuner, model, adapter_name, *args, **kwargs)
        except BaseException:
            if not hasattr(model, "peft_config"):  # transformers' add_adapter notes one beforehand
                model._hf_peft_config_loaded = False  # type: ignore[assignment]
            raise

    @wraps(their_config)
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        base = getattr(model, "llm_model", None)  # of a HybridModel, or of what PEFT put around one
        own_type = {"model_type": base.config.model_type} if isinstance(base, PreTrainedModel) else {}
        return their_config(model) | own_type

    their_save = PeftModel.save_pretrained

    @wraps(their_save)
    def save_pretrained(model: Any, *args: Any, **kwargs: Any) -> None:
        their_save(model, *args, **kwargs)
        given = inspect.signature(their_save).bind(model, *args, **kwargs).arguments
        saved = given.get("selected_adapters")
        saved = list(model.peft_config) if saved is None else saved
        is_nameless = not all(model.peft_config[name].base_model_name_or_path for name in saved)
        if is_nameless and given.get("is_main_process", True) and _names_in_trms(model):
            warnings.warn(OF_NO_FOLDER, stacklevel=2)

    PeftModel.save_pretrained = save_pretrained  # type: ignore[method-assign, assignment]
    inject_adapter.leaves_trms_alone = True  # type: ignore[attr-defined]
    BaseTuner.inject_adapter = inject_adapter  # type: ignore[method-assign, assignment]
    BaseTuner.get_model_config = staticmethod(get_model_config)  # type: ignore[method-assign]


@contextmanager
def _for_the_base(tuner: Any, model: nn.Module, config: Any, of_trms: set[str]) -> Iterator[None]:
    """Within the block PEFT's `tuner` finds no module of `model` that is one of `of_trms`.

    Errors: ValueError for a config that asks for what is inside a TRM.
    """
    if config.peft_type == "SHADOW":
        raise ValueError(
            "HybridModel: PEFT's Shadow builds a second model out of the decoder's class, which a hybrid "
            "does not have: it cannot be used on one."
        )
    if getattr(config, "layer_replication", None):
        raise ValueError(
            "HybridModel: PEFT's layer_replication repeats decoder layers, and those of a hybrid have TRMs "
            "at places that are counted: expected a LoraConfig without it."
        )
    matches = tuner._check_target_module_exists
    of_base = [name for name, _ in model.named_modules() if name not in of_trms]
    _check_modules(config, of_base, of_trms, matches)
    _check_modules_to_save(config, of_trms)
    if wanted := getattr(config, "target_parameters", None):
        config.target_parameters = _parameters_of_base(wanted, model, of_trms)
    tie = tuner._add_targets_to_tie

    def add_targets_to_tie(config: Any, tied: list[str]) -> None:
        tie(config, tied)
        # LoRA looks for the end of the name; not found, a head here gets an adapter of its own, and no word
        if getattr(config, "target_modules_to_tie", None):
            config.target_modules_to_tie |= {name.rpartition(".")[2] for name in tied}

    tuner._check_target_module_exists = lambda config, key: key not in of_trms and matches(config, key)
    tuner._add_targets_to_tie = add_targets_to_tie
    try:
        yield
    finally:
        del tuner._check_target_module_exists, tuner._add_targets_to_tie


def _check_beside_our_own(model: nn.Module, adapter_name: str) -> None:
    """Errors: ValueError for an adapter over that of `lora_rank`, or by its name."""
    if adapted(model):
        raise ValueError(_OVER_LORA_RANK)
    if adapter_name == ADAPTER:
        raise ValueError(
            f"HybridModel: PEFT expected another adapter_name than {ADAPTER!r}, by which a hybrid's own LoRA "
            "is known: that is frozen, saved and switched off with the TRMs."
        )


def _names_in_trms(model: nn.Module) -> set[str]:
    """The TRMs' own names, and those of all that is in them."""
    return {
        f"{name}.{part}" if part else name
        for name, module in model.named_modules()
        if isinstance(module, Injection)
        for part, _ in module.named_modules()
    }


def _check_modules(config: Any, of_base: list[str], of_trms: set[str], matches: Any) -> None:
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str):
        if targets.lower() == "all-linear" or not any(matches(config, name) for name in of_trms):
            return
        if is_trm_key(targets) or not any(matches(config, name) for name in of_base):
            raise _error("target_modules", repr(targets), _ADVICE)
        return
    for target in targets or ():
        if _named(target, of_trms) and not _named(target, of_base):
            raise _error("target_modules", repr(target), _ADVICE)


def _check_modules_to_save(config: Any, of_trms: set[str]) -> None:
    for target in getattr(config, "modules_to_save", None) or ():
        if parts := [name for name in of_trms if name.endswith(target) and not is_injection_name(name)]:
            advice = "a TRM is trained as a whole, and PEFT goes by the ends of names: give longer ones"
            raise _error("modules_to_save", f"{target!r}, which is also {min(parts)}", advice)


def _parameters_of_base(targets: Iterable[str], model: nn.Module, of_trms: set[str]) -> list[str]:
    """`targets`, those that also name parameters of TRMs as full names of the others."""
    names = [name for name, _ in model.named_parameters()]
    ours = [name for name in names if name.rpartition(".")[0] in of_trms]
    wanted = []
    for target in targets:
        if not _named(target, ours):
            wanted.append(target)
            continue
        found = _named(target, (name for name in names if name not in ours))
        if not found:
            raise _error("target_parameters", repr(target), _ADVICE)
        wanted += found
    return wanted


def _named(target: str, names: Iterable[str]) -> list[str]:
    """The names that PEFT takes `target` to mean."""
    return [name for name in names if name == target or name.endswith(f".{target}")]


def _error(field: str, got: str, advice: str) -> ValueError:
    return ValueError(
        f"HybridModel: PEFT's {field} expected parts of the language model, got {got}: {advice}."
    )
