"""What a command line names, loaded: a language model, a saved hybrid, its tokenizer."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hybrid.config import HybridConfig
from hybrid.error_text import first_line
from hybrid.model.hybrid_model import HybridModel
from hybrid.model.quantized_base import quantization_config
from hybrid.saving.local_paths import check_folder, is_in_a_folder_here
from hybrid.training import checkpoints as run_state
from hybrid.training import run_folder


def load_config(name_or_path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model on the hub, in a folder, or in the newest checkpoint of a training run's folder.

    Errors: ValueError when there is none.
    """
    return _load(AutoConfig, "a model of transformers", name_or_path, trust_remote_code=trust_remote_code)


def load_model(
    name_or_path: str,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quantize_base: str | None = None,
    hybrid_base: str | None = None,
) -> PreTrainedModel:
    """A causal language model, hybrid or not; see load_config for what may be named.

    dtype           of its parameters: "float32", "bfloat16", "float16", or "auto", as its files say
    quantize_base   "int8" or "nf4", see quantized_base.py; None: as its files say, or as it was saved
    hybrid_base     where a hybrid's base is now, a name or a folder; None: where its config says

    Errors: ValueError when there is none, its files are damaged, a package to quantize it is missing, or
    hybrid_base is given for a model that has no base in another place.
    """
    arguments: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    what, config = "a causal language model", load_config(name_or_path, trust_remote_code)
    if hybrid_base is not None:
        _check_base_elsewhere(config, name_or_path, hybrid_base)
        arguments["base_model_name_or_path"] = hybrid_base
    if quantize_base is not None:
        of_files = config.get_text_config(decoder=True).dtype
        in_half = of_files if of_files in (torch.bfloat16, torch.float16) else None
        given = in_half if dtype == "auto" else arguments["dtype"]
        arguments["quantization_config"] = quantization_config(quantize_base, given)
    if isinstance(config, HybridConfig):  # it refuses missing tensors itself
        if quantize_base is not None and config.base_model_name_or_path is None:
            raise ValueError(
                f"expected a base in a place of its own to quantize it, got {name_or_path}, which holds it."
            )
        return _load(HybridModel, what, name_or_path, **arguments)
    arguments |= {"trust_remote_code": trust_remote_code, "output_loading_info": True}
    model, found = _load(AutoModelForCausalLM, what, name_or_path, **arguments)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"expected all tensors of {what} at {name_or_path}, got none named {missing[0]} "
            f"({len(missing)} are missing for a {type(model).__name__})."
        )
    return model


def load_on_first(
    name_or_path: str,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    hybrid_base: str | None = None,
) -> PreTrainedModel:
    """As load_model, by all processes of a group: the first reads the weights, the others nothing.

    Theirs are on the meta device, for shard() to fill in.
    """
    model, dtypes = None, [dict[str, torch.dtype]()]
    if torch.distributed.get_rank() == 0:
        model = load_model(name_or_path, dtype, trust_remote_code, hybrid_base=hybrid_base)
        dtypes = [{name: p.dtype for name, p in model.named_parameters()}]
    broadcast_object_list(dtypes)
    if model is not None:
        return model
    config = load_config(name_or_path, trust_remote_code)
    with init_empty_weights():  # buffers, such as RoPE's frequencies, are made
        if isinstance(config, HybridConfig):
            model = HybridModel(config)
        else:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    base = model.llm_model if isinstance(model, HybridModel) else model
    base.tie_weights()  # each module had a parameter of its own
    for name, p in model.named_parameters():
        p.data = p.data.to(dtypes[0][name])
    return model.eval()


def load_tokenizer(
    name_or_path: str, trust_remote_code: bool = False, hybrid_base: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer in the model's folder; for a hybrid without one, that of its base.

    Errors: ValueError when there is none.
    """
    config = load_config(name_or_path, trust_remote_code)
    if (
        isinstance(config, HybridConfig)
        and config.base_model_name_or_path
        and not _has_tokenizer(name_or_path)
    ):
        name_or_path = hybrid_base or config.base_model_name_or_path
    return _load(AutoTokenizer, "a tokenizer", name_or_path, trust_remote_code=trust_remote_code)


def _check_base_elsewhere(config: PreTrainedConfig, name_or_path: str, hybrid_base: str) -> None:
    if not hybrid_base:
        raise ValueError("expected the place of a base for --hybrid-base, got an empty one.")
    if isinstance(config, HybridConfig) and config.base_model_name_or_path is not None:
        return
    got = "the whole of one" if isinstance(config, HybridConfig) else f"a {type(config).__name__}"
    raise ValueError(
        f"expected a saved hybrid whose base is in a place of its own for --hybrid-base, got {got} at "
        f"{name_or_path}."
    )


def _load(loader: Any, what: str, name_or_path: str, **kwargs: Any) -> Any:
    place = _place(name_or_path)
    check_folder(what, place)
    if not Path(place).exists() and is_in_a_folder_here(place):
        raise ValueError(
            f"expected {what} at {name_or_path}, got none that can be loaded: there is no such folder in "
            f"{place.partition('/')[0]}, which is one here. For a model of the hub, work in another folder."
        )
    try:
        return loader.from_pretrained(place, **kwargs)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ValueError(
            f"expected {what} at {name_or_path}, got none that can be loaded: {first_line(error)}"
        ) from error


def _place(name_or_path: str) -> str:
    """A training run's folder stands for its newest whole checkpoint."""
    folder = Path(name_or_path)
    if (folder / run_folder.RUN).is_file() and not (folder / "config.json").is_file():
        return str(run_state.latest(folder) or folder)
    return name_or_path


def _has_tokenizer(name_or_path: str) -> bool:
    return (Path(_place(name_or_path)) / "tokenizer_config.json").is_file()
