"""The language models whose shapes are known by name: nothing is downloaded to count or to plan with them."""

from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config


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


def _llama_3(width: int, inner_width: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=inner_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
    )


def _qwen_3(width: int, inner_width: int, layers: int, heads: int, is_tied: bool = False) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=inner_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=is_tied,
    )


# shapes as published; the weights are not needed to count them
KNOWN_BASES: dict[str, PreTrainedConfig] = {
    "llama-2-7b": _llama_2(4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama_2(5120, 13824, 40, 40, 40),
    "llama-2-70b": _llama_2(8192, 28672, 80, 64, 8),
    "llama-3-8b": _llama_3(4096, 14336, 32, 32),
    "llama-3-70b": _llama_3(8192, 28672, 80, 64),
    "qwen3-0.6b": _qwen_3(1024, 3072, 28, 16, is_tied=True),
    "qwen3-1.7b": _qwen_3(2048, 6144, 28, 16, is_tied=True),
    "qwen3-4b": _qwen_3(2560, 9728, 36, 32, is_tied=True),
    "qwen3-8b": _qwen_3(4096, 12288, 36, 32),
    "qwen3-14b": _qwen_3(5120, 17408, 40, 40),
    "qwen3-32b": _qwen_3(5120, 25600, 64, 64),
}
# the base that a preset is made for
PRESET_BASES = {
    "llama_2_7b_level1": "llama-2-7b",
    "llama_2_13b_level2": "llama-2-13b",
    "llama_2_70b_enterprise": "llama-2-70b",
    "research_experimental": "llama-2-70b",
}
# the guide's four levels
LEVELS = dict(enumerate(PRESET_BASES, start=1))
