"""Parameter counts by part, of a model that need not be loaded: it is built on the meta device."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from hybrid.config import HybridConfig
from hybrid.injection import Injection
from hybrid.model import HybridModel


def _llama_2(width: int, inner_width: int, layers: int, heads: int, key_value_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=inner_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


# shapes as published; the weights are not needed to count them
KNOWN_BASES = {
    "llama-2-7b": _llama_2(4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama_2(5120, 13824, 40, 40, 40),
    "llama-2-70b": _llama_2(8192, 28672, 80, 64, 8),
}
# the base that a preset is made for
PRESET_BASES = {
    "llama_2_7b_level1": "llama-2-7b",
    "llama_2_13b_level2": "llama-2-13b",
    "llama_2_70b_enterprise": "llama-2-70b",
    "research_experimental": "llama-2-70b",
}


@dataclass(frozen=True)
class Part:
    """A part of a model and how many parameters it has; tied tensors count once."""

    name: str
    parameters: int


def on_meta(
    config: HybridConfig, base_config: PreTrainedConfig, trust_remote_code: bool = False
) -> HybridModel:
    """The hybrid without any memory behind its parameters.

    Errors: ValueError when the config does not fit the base.
    """
    config.check_base(base_config)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(base_config, trust_remote_code=trust_remote_code)
        return HybridModel(llm_model=base, config=config)


def parts(model: HybridModel) -> Iterator[Part]:
    """The base, then what each injection point is made of: projections, recursion, gate."""
    yield Part("base", sum(p.numel() for _, p in model.base_named_parameters()))
    injections = sorted((m for m in model.modules() if isinstance(m, Injection)), key=lambda m: m.index)
    for injection in injections:
        point = model.config.injection_layers[injection.index]
        counts: dict[str, int] = {}
        for name, parameter in injection.named_parameters():
            part = "gate" if name.startswith("gate_") else name.partition(".")[0]
            counts[part] = counts.get(part, 0) + parameter.numel()
        for part, parameters in counts.items():
            yield Part(f"layer {point}: {part}", parameters)


def count(module: torch.nn.Module) -> int:
    """Parameters of a module; tied tensors count once."""
    return sum(p.numel() for p in module.parameters())


def count_trained(model: PreTrainedModel) -> int:
    """Parameters that require gradients."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
