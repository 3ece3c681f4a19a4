"""What learns in a real base: a recursion after the last layer, or LoRA of the same size on that layer."""

from typing import Any

from peft import LoraConfig, get_peft_model

from hybrid.config import HybridConfig
from hybrid.demo.real.training import Model
from hybrid.model.hybrid_model import HybridModel
from hybrid.model.injection_points import decoder_layers

_MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_recursion(base: Any, seed: int, **settings: Any) -> Model:
    """A TRM of one layer of width 64 after the last layer of `base`, which is changed and frozen.

    Args:
        base: A causal language model.
        seed: Of the numbers of recursion steps; the initial weights are torch's.
        settings: Of HybridConfig, in the place of those chosen here.
    """
    chosen: dict[str, Any] = {
        "injection_layers": [len(decoder_layers(base))],
        "trm_hidden_size": 64,
        "trm_num_heads": 4,
        "trm_num_layers": 1,
        "trm_intermediate_size": 168,
        "trm_attention": "sdpa",
        "num_recursion_steps": 8,
        "recursion_sampling": "uniform",
        "injection_strength": 32.0,
    }
    config = HybridConfig(recursion_seed=seed, **chosen | settings)
    hybrid = HybridModel(llm_model=base, config=config).freeze_base()
    draws_steps = config.recursion_sampling == "uniform"
    return Model(hybrid, base, config.injection_layers[0], draws_steps=draws_steps)


def with_lora(base: Any, rank: int = 12) -> Model:
    """LoRA on all matrices of the last layer of `base`, which is changed and frozen."""
    layer = len(decoder_layers(base)) - 1
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=_MATRICES,
        layers_to_transform=[layer],
        layers_pattern="layers",
    )
    return Model(get_peft_model(base, config), base, layer)
