"""Where a hybrid's base came from, and whether what is there still gives this very base.

A base that is loaded again has to be the one that was wrapped. Three things see to that:

    checksums     of every base tensor when it is wrapped (base_checksum.py), compared when it is saved
    files         the safetensors files that the reference names, where they are at hand, compared value by
                  value before the first save: adapters that were merged, embeddings that were resized
    on loading    the checksum of all tensors that was saved, compared with those that were loaded
"""

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import get_checkpoint_shard_files

from hybrid.error_text import first_line
from hybrid.model.quantized_base import is_quantized
from hybrid.model.trm_names import is_trm_key
from hybrid.saving import base_checksum

logger = logging.get_logger(__name__)

_ADAPTED = ".base_layer"  # peft puts it into the name of a module that it has wrapped
_ROOM_TO_LOAD = 1.2  # times its bytes, of free memory
_NARROW = (torch.float32, torch.bfloat16, torch.float16)


def base_tensors(model: Any, once: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name in the language model, tensor) of all that a file of it would hold, offloaded ones too.

    once   tied tensors under the first of their names only
    """
    base, saved = model.llm_model, model.llm_model.state_dict().keys()
    for name, t in (
        *base.named_parameters(remove_duplicate=once),
        *base.named_buffers(remove_duplicate=once),
    ):
        if is_trm_key(name) or name not in saved:
            continue
        if t.device.type == "meta":
            found = _offloaded(base, name)
            t = t if found is None else found
        yield name.replace(_ADAPTED, ""), t


def checksums(model: Any, before: Mapping[str, Any]) -> dict[str, str] | None:
    """dtype -> digest of the base's tensors in it: its own, and narrower ones that it may be loaded in.

    A base in bfloat16 has none in float16: its files may be in float32, and rounded twice it is another.
    Of a base that is split among processes there is that of its own dtype, as it was wrapped. None for a base
    that is quantized: how it is rounded depends on the device.
    """
    if is_quantized(model.llm_model):
        return None
    own = model.llm_model.dtype
    now = dict(base_tensors(model))
    if any(map(is_split, now.values())):
        name = str(own).removeprefix("torch.")
        found = base_checksum.digest_of_sums(before, name) if now.keys() == before.keys() else None
        return None if found is None else {name: found}
    dtypes = [own, *(d for d in _NARROW if d.itemsize < own.itemsize)]
    return {str(d).removeprefix("torch."): base_checksum.digest(base_tensors(model), d) for d in dtypes}


def check_loaded(model: Any, expected: Mapping[str, str] | None) -> None:
    """ValueError where the base is not the one that the saved checksums are of."""
    if not expected or is_quantized(model.llm_model):
        return
    if any(t.device.type == "meta" for _, t in base_tensors(model)):
        return  # another process has the values, and compares them
    own = str(model.llm_model.dtype).removeprefix("torch.")
    dtype = own if own in expected else next(iter(expected))
    if own not in expected and model.llm_model.dtype.itemsize <= getattr(torch, dtype).itemsize:
        logger.warning(  # what was kept cannot be had from the dtype that it was loaded in
            "HybridModel: whether this is the base that the hybrid was saved with is not known. It was "
            f"loaded in {own}, and there are checksums in {', '.join(expected)} alone. To have it compared, "
            f"load it in {dtype} (dtype=, on a command line --dtype)."
        )
        return
    if base_checksum.digest(base_tensors(model), getattr(torch, dtype)) != expected[dtype]:
        raise ValueError(
            "HybridModel: expected the base that this hybrid was saved with (its config.json says where that "
            f"was; checksum {expected[dtype][:12]} in {dtype}), got one with other weights. Pass the right "
            "one as llm_model=, or say where it is by base_model_name_or_path=, on a command line by "
            "--hybrid-base."
        )


def changed(model: Any, now: Mapping[str, Tensor], before: Mapping[str, Any]) -> tuple[str | None, bool]:
    """(the first base tensor that is not as it was wrapped, or None; whether some were cast since)

    now      the model's state dict, where it was gathered from several processes
    before   base_checksum.tensor_sums of when it was wrapped
    """
    was_cast, seen = False, set()
    for name, parameter in base_tensors(model):
        t = _gathered(now, name, parameter)
        seen.add(name)
        if not is_here(t):
            if parameter.requires_grad:
                return name, was_cast
            continue
        if name not in before:  # a bias that was added, a head that was untied
            return name, was_cast
        ((_, found),) = base_checksum.tensor_sums([(name, t)]).items()
        if found != before[name]:
            is_cast = found[0] != before[name][0] and found[1] == before[name][1]
            if not is_cast:
                return name, was_cast
            was_cast = True
    gone = sorted(before.keys() - seen)  # a layer that was taken out, a head that was tied
    return (gone[0] if gone else None), was_cast


def compare_with_files(model: Any, now: Mapping[str, Tensor]) -> str | None | bool:
    """Why the files of the reference do not give this base; None: they do; False: nobody can tell by them."""
    config = model.config
    if is_quantized(model.llm_model):
        return False
    reference, is_of_hub = config.base_model_name_or_path, not Path(config.base_model_name_or_path).is_dir()
    tensors = {name: _gathered(now, name, t) for name, t in base_tensors(model)}
    if config.base_gguf_file is not None:
        return _compare_with_loaded(model, tensors)
    why: str | None | bool = False
    for revision, subfolder in _places(config, is_of_hub):
        files = _files(reference, revision, subfolder)
        found = _compare(tensors, files) if files else False
        if found is None:
            config.base_revision = _commit_of(files[0]) if is_of_hub else None
            config.base_subfolder = subfolder or None
            return None
        why = why or found
    if is_of_hub and not why and not _files(reference, config.base_revision, config.base_subfolder):
        return f"no files of {reference} are in the hub's cache of this machine to compare it with"
    return why or _compare_with_loaded(model, tensors)


def folder_of(config: Any, reference: str) -> Path | None:
    """Where the base's files are on this machine; None where nobody can tell."""
    if Path(reference).is_dir():
        return Path(reference, config.base_subfolder or "")
    files = _files(reference, config.base_revision, config.base_subfolder)
    return Path(files[0]).parent if files else None


def gguf_file_of(base_config: Any) -> str | None:
    """The GGUF file that a language model was read from."""
    how = getattr(base_config, "quantization_config", None)
    named = how.get("gguf_file") if isinstance(how, dict) else getattr(how, "gguf_file", None)
    return named or getattr(base_config, "gguf_file", None)


def _places(config: Any, is_of_hub: bool) -> Iterator[tuple[str | None, str | None]]:
    """(commit, subfolder), what the config says first: transformers remembers neither of a model."""
    reference = config.base_model_name_or_path
    yield config.base_revision, config.base_subfolder
    roots = {c: _cache(reference) / c for c in _commits(reference)} if is_of_hub else {None: Path(reference)}
    for commit, root in roots.items():
        yield commit, None
        for folder in sorted(path for path in root.iterdir() if (path / "config.json").is_file()):
            yield commit, folder.name


def _compare(tensors: Mapping[str, Tensor], files: list[str]) -> str | None | bool:
    try:
        places = {name: file for file in files for name in _names(file)}
        if not tensors.keys() <= places.keys():
            return False  # transformers has given them other names on loading
        for name, t in tensors.items():
            if (why := _difference(name, t, places[name])) is not None:
                return why
    except (SafetensorError, OSError):
        return False
    return None


def _compare_with_loaded(model: Any, tensors: Mapping[str, Tensor]) -> str | None | bool:
    """The same for files whose tensors transformers transforms: they are loaded a second time."""
    if psutil.virtual_memory().available < _ROOM_TO_LOAD * sum(t.nbytes for t in tensors.values()):
        return "there is no memory to load it a second time and compare"
    config, own = model.config, copy.deepcopy(model.llm_model.config)
    if config.base_gguf_file is not None and hasattr(own, "quantization_config"):
        del own.quantization_config
    named = {name: getattr(config, f"base_{name}") for name in ("revision", "subfolder", "gguf_file")}
    where = {name: value for name, value in named.items() if value is not None}
    try:
        with torch.random.fork_rng(devices=[]):
            again = AutoModelForCausalLM.from_pretrained(
                config.base_model_name_or_path,
                config=own,
                dtype=model.llm_model.dtype,
                local_files_only=True,
                **where,
            )
    except OSError as error:
        if Path(config.base_model_name_or_path).is_dir():  # with the files of a variant alone, for one
            return f"its folder does not give it without further arguments ({first_line(error)})"
        return False
    except (ValueError, RuntimeError, KeyError, ImportError):
        return False
    there = again.state_dict()
    for name, t in tensors.items():
        if name not in there or (is_here(t) and not torch.equal(there[name].to(t.dtype), t.detach().cpu())):
            return f"{name} has other values than where it came from"
    return None


def _difference(name: str, t: Tensor, file: str) -> str | None:
    with safe_open(file, "pt") as opened:
        there = opened.get_tensor(name)
    if there.shape != t.shape:
        return f"{name} is {list(t.shape)}, and {list(there.shape)} where it came from"
    if is_here(t) and not torch.equal(there.to(t.dtype), t.detach().cpu()):
        return f"{name} has other values than where it came from"
    return None


def _commits(reference: str) -> list[str]:
    """Those of which the hub's cache on this machine has files."""
    return sorted(path.name for path in _cache(reference).glob("*"))


def _cache(reference: str) -> Path:
    return Path(HF_HUB_CACHE) / f"models--{reference.replace('/', '--')}" / "snapshots"


def _commit_of(file: str) -> str | None:
    found = re.search(r"snapshots/([0-9a-f]{40})/", Path(file).as_posix())
    return found[1] if found else None


def _names(file: str) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _files(reference: str, revision: str | None, subfolder: str | None) -> list[str]:
    """The safetensors files that a reference names, where they are on this machine."""
    where: dict[str, Any] = {"revision": revision, "subfolder": subfolder or "", "local_files_only": True}
    find = {**where, "_raise_exceptions_for_missing_entries": False}
    try:
        if file := cached_file(reference, SAFE_WEIGHTS_NAME, **find):
            return [file]
        if index := cached_file(reference, SAFE_WEIGHTS_INDEX_NAME, **find):
            return list(get_checkpoint_shard_files(reference, index, **where)[0])
    except (OSError, ValueError):
        pass
    return []


def refuse_bases_folder(folder: Path, config: Any) -> None:
    """ValueError where `folder` is the one that the base was loaded from, or holds one of its files."""
    reference = config.base_model_name_or_path
    if reference is None:
        return
    place = Path(reference)
    inside = [Path(file) for file in _files(reference, config.base_revision, config.base_subfolder)]
    folders = (
        {place.resolve(), *(file.parent.resolve() for file in inside)} if inside or place.is_dir() else set()
    )
    holds = any((folder / file.name).exists() and (folder / file.name).samefile(file) for file in inside)
    if folder.resolve() in folders or holds:
        raise ValueError(
            f"save_pretrained: expected another folder than the base's own, got {folder}: the hybrid's files "
            f"have the same names, and the base at {reference} would be lost."
        )


def is_split(t: Tensor) -> bool:
    """Whether each process has a part of it (FSDP2); the type is not imported, which takes seconds."""
    return hasattr(t, "full_tensor")


def is_here(t: Tensor) -> bool:
    """Whether this process has all of its values."""
    return t.device.type != "meta" and not is_split(t)


def _gathered(now: Mapping[str, Tensor], name: str, otherwise: Tensor) -> Tensor:
    t = now.get(f"llm_model.{name}", otherwise)
    return otherwise if t.device.type == "meta" else t


def _offloaded(model: nn.Module, name: str) -> Tensor | None:
    """A tensor that a hook of accelerate's brings for a forward; None where no hook knows it."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        hook = getattr(model.get_submodule(".".join(parts[:depth])), "_hf_hook", None)
        for each in (hook, *getattr(hook, "hooks", ())):
            weights = getattr(each, "weights_map", None)
            if weights is not None and ".".join(parts[depth:]) in weights:
                found: Tensor = weights[".".join(parts[depth:])]
                return found
    return None
