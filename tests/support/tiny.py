"""Tiny random language models of every family that is tested, and hybrids of them."""

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hybrid import HybridConfig, HybridModel

WIDTH, LAYERS, VOCABULARY = 32, 3, 99
_SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLP = {"intermediate_size": 64}
_GQA = _MLP | {"num_key_value_heads": 2}
# a window of 4 tokens, so that the tests' sequences outgrow it
_SLIDING = _GQA | {"sliding_window": 4}

_FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, _GQA),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, _GQA | {"head_dim": 8}),
    "mistral": (MistralForCausalLM, MistralConfig, _SLIDING),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, _SLIDING | {"head_dim": 8}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_positions": 64}),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, _MLP),
    "opt": (
        OPTForCausalLM,
        OPTConfig,
        {"ffn_dim": 64, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 64},
    ),
    "phi": (PhiForCausalLM, PhiConfig, _MLP),
    "falcon": (FalconForCausalLM, FalconConfig, {}),
    "bloom": (BloomForCausalLM, BloomConfig, {}),
}
FAMILIES = tuple(_FAMILIES)


def tiny_base(family: str = "llama", seed: int = 0, layers: int = LAYERS) -> PreTrainedModel:
    """A random language model of width 32, in eval mode."""
    model_class, config_class, own = _FAMILIES[family]
    torch.manual_seed(seed)
    return model_class(config_class(**_SIZES | {"num_hidden_layers": layers}, **own)).eval()


def tiny_config(**changes) -> HybridConfig:
    """Points on the embeddings, in the middle and after the last layer; two cycles; GQA."""
    fields = {
        "injection_layers": [0, 2, 3],
        "trm_hidden_size": 24,
        "trm_num_heads": 3,
        "trm_num_key_value_heads": 1,
        "trm_num_layers": 2,
        "trm_intermediate_size": 32,
        "num_recursion_steps": 2,
        "num_cycles": 2,
    }
    return HybridConfig(**(fields | changes))


def tiny_hybrid(family: str = "llama", seed: int = 0, awake: bool = True, **changes) -> HybridModel:
    """A hybrid of a tiny base; `awake` gives W_out values, as training would."""
    hybrid = HybridModel(llm_model=tiny_base(family, seed), config=tiny_config(**changes))
    return awaken(hybrid) if awake else hybrid


def brief_hybrid(family: str = "llama", **changes) -> HybridModel:
    """For torch.compile, which unrolls layers and steps: a point before two layers, and one after them."""
    brief = {"num_cycles": 1, "num_recursion_steps": 1, "trm_num_layers": 1, "injection_layers": [0, 2]}
    return awaken(HybridModel(llm_model=tiny_base(family, layers=2), config=tiny_config(**brief | changes)))


@torch.no_grad()
def awaken(hybrid: HybridModel, size: float = 0.5) -> HybridModel:
    """Give every W_out (and gate) random values: a fresh hybrid equals its base and hides mistakes."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in hybrid.named_parameters():
        if name.endswith(("out_proj.weight", "gate_weight", "gate_bias")) and "trm" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return hybrid


def tokens(batch: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """[batch, length] ids that are no special tokens."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
