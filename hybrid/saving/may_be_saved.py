"""What may be saved: a hybrid whose files would load again as it is. All else is refused, or said.

Nothing is written here; save_hybrid.py asks before it begins.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.utils import SAFE_WEIGHTS_NAME

from hybrid.config import HybridConfig
from hybrid.config_values import read_json_object
from hybrid.error_text import first_line
from hybrid.model.lora import is_merged
from hybrid.model.quantized_base import is_quantized
from hybrid.model.trm_names import is_trm_key
from hybrid.saving import base_reference


def not_kept(model: Any) -> list[str]:
    """What the model is now and the loaded one will not be, or the other way round; a sentence each."""
    said = [
        f"The base's config.{name} was set to {value!r} after its modules were made: it takes effect "
        "when the hybrid is loaded."
        for name, value in _set_since_built(model).items()
        if name not in _READ_AT_EACH_CALL
    ]
    if not model.injection_enabled:
        said.append("The injection is switched off (injection_enabled=False): a loaded hybrid has it on.")
    return said


# of a language model's config: what is no part of its modules
_READ_AT_EACH_CALL = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "quantization_config",
        "return_dict",
        "tie_word_embeddings",
        "transformers_version",
        "use_cache",
        "vocab_size",
    }
)


def _set_since_built(model: Any) -> dict[str, Any]:
    """What the language model's config says otherwise than when its modules were made."""
    now, then = model.llm_model.config.to_dict(), model._base_config_then
    return {name: value for name, value in now.items() if value != then.get(name)}


def refuse_another_model(folder: Path) -> None:
    """ValueError where the folder holds a model that is no hybrid."""
    config = folder / "config.json"
    if config.is_file():
        fields = read_json_object(config, "a model's fields")
        if fields.get("model_type") == HybridConfig.model_type or "trm_hidden_size" in fields:  # a subclass's
            return
        what = f"a model of the type {fields.get('model_type')!r}"
    elif weights := sorted(path.name for end in _WEIGHTS for path in folder.glob(end)):
        what = f"{weights[0]} without a hybrid's config.json"
    else:
        return
    raise ValueError(
        f"save_pretrained: expected an empty folder or one of a saved hybrid, got {folder}, which holds "
        f"{what}."
    )


_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin")


def check_complete(model: Any, state_dict: Mapping[str, Tensor], save_base: bool, given: Any) -> None:
    """ValueError where what would be written could not be loaded again; nothing was written then."""
    if given.get("variant") is not None:
        raise ValueError(
            f"save_pretrained: expected no variant, got {given['variant']!r}: a hybrid is looked for in "
            f"{SAFE_WEIGHTS_NAME}."
        )
    if is_merged(model.llm_model):
        raise ValueError(
            "save_pretrained: expected LoRA beside the base's weights (lora_rank), got some that is merged "
            "into them: unmerge() first, or it would be counted twice."
        )
    wanted = [name for name in model.state_dict() if is_trm_key(name)]
    if save_base:
        wanted += [f"llm_model.{name}" for name, _ in base_reference.base_tensors(model)]
    of_adapted = {name.replace(".base_layer", "") for name in state_dict}
    if missing := [n for n in wanted if n not in state_dict and n not in of_adapted]:
        named = next((name for name in state_dict if name.endswith(f".{missing[0]}")), None)
        why = "" if named is None else f" It has {named}: take what precedes the name from all of them."
        raise ValueError(
            f"save_pretrained: expected a state_dict with all tensors, got one without {missing[0]}.{why}"
        )


def refuse_computed(model: Any, save_base: bool) -> None:
    """ValueError where pruning or a parametrization makes a tensor, which then would be in no file."""
    of_base, prefix = set(), "llm_model."
    names = list(_computed(model))
    if save_base and not all(map(is_trm_key, names)):
        # what is not among these the class computes by itself, and loads it so; where none can be made of the
        # config, check_config_fits says what it can
        with suppress(Exception):
            of_base = set(_made_anew(model.llm_model))
    lost = [name for name in names if is_trm_key(name) or name.removeprefix(prefix) in of_base]
    if lost:
        some = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        raise ValueError(
            f"save_pretrained: expected plain parameters, got {len(lost)} that are computed from others and "
            f"would be missing on loading: {some}. First make each plain, by torch.nn.utils.prune.remove("
            "module, name) or torch.nn.utils.parametrize.remove_parametrizations(module, name)."
        )


def _computed(model: nn.Module) -> Iterator[str]:
    """The tensors that torch's pruning, weight norm or a parametrization computes from others."""
    for name, module in model.named_modules():
        found = list(module.parametrizations) if is_parametrized(module) else []
        for hook in module._forward_pre_hooks.values():  # of pruning; of weight_norm and spectral_norm
            if not type(hook).__module__.startswith("torch.nn.utils."):
                continue
            tensor = getattr(hook, "_tensor_name", getattr(hook, "name", None))
            if isinstance(tensor, str) and tensor not in module._parameters and hasattr(module, tensor):
                found.append(tensor)
        yield from (f"{name}.{tensor}" for tensor in found)


def _made_anew(base: Any) -> dict[str, Tensor]:
    """The tensors, without values, of a language model made by its config."""
    with torch.device("meta"):
        made: dict[str, Tensor] = type(base)(copy.deepcopy(base.config)).state_dict()
    return made


def check_config_fits(model: Any) -> None:
    """ValueError where the language model's config was changed so that its tensors could not be loaded."""
    base, of_shapes = model.llm_model, {"vocab_size", "tie_word_embeddings"}
    changed = [n for n in _set_since_built(model) if n not in _READ_AT_EACH_CALL or n in of_shapes]
    if not changed or is_quantized(base):
        return
    have = {name: t.shape for name, t in base_reference.base_tensors(model, once=False)}
    try:
        made = _made_anew(base)
    except Exception as error:  # each family has its own kinds
        why = f"no model can be made of it ({first_line(error)})"
    else:
        want = {name: t.shape for name, t in made.items()}
        odd = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
        if not odd and not _loses_its_head(base):
            return
        why = "its tied head would be in no file"
        if odd:
            shapes = [tuple(s[odd[0]]) if odd[0] in s else "none" for s in (want, have)]
            why = f"{odd[0]} would be {shapes[0]} and is {shapes[1]}"
    raise ValueError(
        "save_pretrained: expected the base's config to fit its tensors, as they could not be loaded "
        f"otherwise, got one whose {', '.join(changed)} was changed since they were made: {why}."
    )


def _loses_its_head(base: Any) -> bool:
    """Whether the head is the embeddings, which are written once, and the config says otherwise."""
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or base.config.get_text_config(decoder=True).tie_word_embeddings:
        return False
    return getattr(head, "weight", None) is embeddings.weight


def refuse_adapters(base_names: Iterable[str]) -> None:
    adapters = [name for name in base_names if ".base_layer." in name or "lora_" in name]
    if adapters:
        raise ValueError(
            f"save_pretrained: expected a base without adapters inside, got {adapters[0]}. Wrap the hybrid: "
            'get_peft_model(hybrid, LoraConfig(..., modules_to_save=["trm"])), and save that; '
            "or save_base=False for the TRM alone."
        )
