"""The language model that is wrapped: what it must be, and what the config says of where it came from."""

import copy
import inspect
import os

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from hybrid.config import HybridConfig
from hybrid.model.cache_name import check_cache_name
from hybrid.model.trm_names import is_trm_key
from hybrid.saving import base_reference


def unloaded_base(config: HybridConfig) -> PreTrainedModel:
    """A base by its config alone, for weights that come with the hybrid's own files."""
    if config.base_config is None:
        raise ValueError("HybridModel: expected llm_model, or a config with base_config, got neither.")
    base_config = copy.deepcopy(config.base_config)
    base_config.name_or_path = ""  # nowhere to load it from again
    return AutoModelForCausalLM.from_config(base_config)


def check_base(model: PreTrainedModel) -> None:
    """Errors: ValueError for no causal language model, one with a TRM, and an unknown transformers."""
    check_cache_name()
    who = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"HybridModel: expected llm_model to be a model of transformers, got {who}. By name: "
            "HybridModel(llm_model=..., config=...)."
        )
    # an encoder with a language-model head (BertLMHeadModel) generates too, but looks both ways
    looks_both_ways = type(model.config) in MODEL_FOR_MASKED_LM_MAPPING and not model.config.is_decoder
    if model.config.is_encoder_decoder or not model.can_generate() or looks_both_ways:
        raise ValueError(
            f"HybridModel: expected a decoder-only causal language model (AutoModelForCausalLM), got {who}."
        )
    text_config = model.config.get_text_config(decoder=True)
    for size in ("hidden_size", "num_hidden_layers"):
        if not isinstance(getattr(text_config, size, None), int):
            raise ValueError(f"HybridModel: expected the base's config to have {size}, got none in {who}.")
    if split := [name for name, p in model.named_parameters() if base_reference.is_split(p)]:
        raise ValueError(
            f"HybridModel: expected a base with whole parameters, got {split[0]} split among processes. For "
            "FSDP2 wrap the base first, then shard the hybrid: fully_shard(layer) of each layer, "
            "fully_shard(hybrid). Tensor parallelism is not supported here."
        )
    if wrapped := [name for name, _ in model.named_parameters() if is_trm_key(name)]:
        raise ValueError(
            f"HybridModel: expected a base without a TRM, got one that has {wrapped[0]} already. unwrap() of "
            "the hybrid gives the language model back; where the hybrid is gone, load the base again."
        )


def accepts_loss_kwargs(model: PreTrainedModel) -> bool:
    """Whether `num_items_in_batch` reaches the model's loss: Trainer's own rule, asked of the base."""
    parameters = inspect.signature(model.forward).parameters.values()
    takes_any = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters)
    return bool(getattr(model, "accepts_loss_kwargs", takes_any))


def refer_to(model: PreTrainedModel, config: HybridConfig) -> None:
    """Put into the config where the base came from: a hub name and its commit, or a folder's full path."""
    name = model.config.name_or_path
    if not name:
        return
    reference = os.path.abspath(name) if os.path.isdir(name) else name
    if reference != config.base_model_name_or_path:  # else what was read from a file says more
        config.base_subfolder = config.base_gguf_file = config.base_revision = None
    config.base_model_name_or_path = reference
    config.base_gguf_file = base_reference.gguf_file_of(model.config) or config.base_gguf_file
