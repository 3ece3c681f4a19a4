"""A hybrid on disk: config.json and model.safetensors, with the TRMs' tensors or with the whole model.

Files replace those of a former save all at once (saved_folder.py).
"""

import copy
import difflib
import inspect
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import (
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    logging,
)
from transformers.utils.hub import get_checkpoint_shard_files

from hybrid.config import HybridConfig, trm_fields
from hybrid.config_values import read_json_object
from hybrid.model.lora import is_merged
from hybrid.model.quantized_base import as_it_was, is_quantized
from hybrid.model.trm_names import is_trm_key
from hybrid.saving import base_reference, saved_folder
from hybrid.saving.local_paths import check_folder
from hybrid.saving.modeling_file import AUTO_MAP, write_modeling_file
from hybrid.saving.saved_tokenizer import copy_tokenizer, has_tokenizer

logger = logging.get_logger(__name__)

# what says where the TRM's files are, and not how the base is to be loaded
_PLACE_OF_TRM = ("revision", "subfolder")
_HUB = ("token", "cache_dir", "local_files_only", "force_download", "proxies")
SAVING = threading.RLock()  # one save at a time in a process


def _set_since_built(model: Any) -> dict[str, Any]:
    """What the language model's config says otherwise than when its modules were made."""
    now, then = model.llm_model.config.to_dict(), model._base_config_then
    return {name: value for name, value in now.items() if value != then.get(name)}


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


def save(
    model: Any,
    write: Callable[..., None],
    folder: str | os.PathLike[str],
    save_base: bool,
    state_dict: Mapping[str, Tensor],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Write `model` into `folder` by transformers' own save_pretrained, then rename into place.

    Under SAVING: what is being saved stands in the model's config while it is written.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"save_pretrained: expected a folder, got the file {folder}.")
    base_reference.refuse_bases_folder(folder, model.config)
    _refuse_another_model(folder)
    _check_complete(model, state_dict, save_base, kwargs)
    _check_config_fits(model)
    if save_base:
        if is_quantized(model.llm_model):
            raise ValueError(
                "save_pretrained: expected a base that can be had again where "
                "config.base_model_name_or_path says, for a quantized one is not written, got "
                f"{model.config.base_model_name_or_path!r}; save_base=False writes the TRM alone."
            )
    else:
        state_dict = {name: t for name, t in state_dict.items() if is_trm_key(name)}
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
    is_offloaded = any(t.device.type == "meta" for t in state_dict.values())
    if is_offloaded:
        model.hf_device_map = {"": "disk"}
    try:
        write(place, True, dict(state_dict), *args, **kwargs)
    finally:
        if is_offloaded:
            del model.hf_device_map


def _places_of_tokenizer(config: HybridConfig, reference: str | None) -> list[tuple[Path, str | None]]:
    """The hybrid's own folder, where it was loaded from one; then the language model's."""
    own = Path(config.name_or_path or "nowhere")
    places: list[tuple[Path, str | None]] = [(own, None)] if own.is_dir() else []
    if reference is not None and (folder := base_reference.folder_of(config, reference)) is not None:
        places.append((folder, config.base_gguf_file))
    return places


def load(
    cls: Any,
    load_whole: Callable[..., Any],
    path: str | os.PathLike[str] | None,
    *args: Any,
    config: HybridConfig | None,
    llm_model: Any,
    **kwargs: Any,
) -> Any:
    """HybridModel.from_pretrained: the base by reference and the TRMs' tensors, or the whole model."""
    if path is None:  # as transformers has it: `config` and `state_dict` are the whole model
        return _load_whole(load_whole, None, *args, config=config, **kwargs)
    with saved_folder.as_saved(path) as place:
        return _load(cls, load_whole, place, *args, config=config, llm_model=llm_model, **kwargs)


def _load(
    cls: Any,
    load_whole: Callable[..., Any],
    path: str,
    *args: Any,
    config: HybridConfig | None,
    llm_model: Any,
    **kwargs: Any,
) -> Any:
    hub = {name: kwargs[name] for name in (*_PLACE_OF_TRM, *_HUB) if name in kwargs}
    if config is None:
        check_folder("a saved hybrid", path)
        config = cls.config_class.from_pretrained(path, **hub)
    fields = {name: kwargs.pop(name) for name in list(kwargs) if name in trm_fields(type(config))}
    config.update(fields)
    _take_settings(config, kwargs)
    if llm_model is None:
        if config.base_model_name_or_path is None:
            _refuse_no_numbers(_read(path, hub, is_trm_key), path)  # which would be cast without a word
            return _load_whole(load_whole, path, *args, config=config, **kwargs)
        of_base = {name: value for name, value in kwargs.items() if name not in _PLACE_OF_TRM}
        if Path(config.base_model_name_or_path).resolve() == Path(path).resolve():
            raise ValueError(f"HybridModel: expected the base of {path} elsewhere, got the same folder.")
        try:
            if config.base_gguf_file is None and config.base_subfolder is None:
                check_folder("the base model", config.base_model_name_or_path)
        except ValueError as error:
            raise ValueError(f"HybridModel: {_first_line(error)}. Pass llm_model= if it has moved.") from None
        try:
            of_base |= _reference_of(config, of_base)
            llm_model = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, **of_base)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "mismatched" not in str(error):
                raise  # else tensors of other sizes than the config's
            raise ValueError(
                f"HybridModel: expected the base model at {config.base_model_name_or_path!r}, got: "
                f"{_first_line(error)}. Pass llm_model= if it has moved."
            ) from error
    tensors = _read(path, hub)
    model = cls(config=config, llm_model=llm_model)
    try:
        base_reference.check_loaded(model, config.base_checksums, str(config.base_model_name_or_path))
        _fill(model, tensors, path)
        return _as_saved(model, path, config, hub)
    except BaseException:
        model.unwrap()  # a base that was passed goes back as it came
        raise


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
        near = difflib.get_close_matches(name, [*trm_fields(type(config)), *sorted(known)], n=1, cutoff=0.7)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"HybridModel.from_pretrained: there is no field or argument {name!r}{hint}")


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
            f"HybridModel: a tensor in {path} has another shape: {_first_line(error)}."
        ) from error
    for kind in ("missing", "unexpected"):
        if keys := sorted(info[f"{kind}_keys"]):
            raise ValueError(f"HybridModel: {path}: {len(keys)} tensors are {kind}, the first is {keys[0]}.")
    if model.config.base_is_frozen:
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


def _refuse_another_model(folder: Path) -> None:
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


def _check_complete(model: Any, state_dict: Mapping[str, Tensor], save_base: bool, given: Any) -> None:
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
        raise ValueError(
            f"save_pretrained: expected a state_dict with all tensors, got one without {missing[0]}."
        )


def _check_config_fits(model: Any) -> None:
    """ValueError where the language model's config was changed so that its tensors could not be loaded."""
    base, of_shapes = model.llm_model, {"vocab_size", "tie_word_embeddings"}
    changed = [n for n in _set_since_built(model) if n not in _READ_AT_EACH_CALL or n in of_shapes]
    if not changed or is_quantized(base):
        return
    have = {name: t.shape for name, t in base_reference.base_tensors(model, once=False)}
    try:
        with torch.device("meta"):
            made = type(base)(copy.deepcopy(base.config))
    except Exception as error:  # each family has its own kinds
        why = f"no model can be made of it ({_first_line(error)})"
    else:
        want = {name: t.shape for name, t in made.state_dict().items()}
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


def _damaged(path: Any, error: Exception) -> str:
    return (
        f"HybridModel: expected a whole safetensors file, got a damaged one in {path} ({_first_line(error)})."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
