"""LoRA on the language model's linear layers, beside the TRMs, by peft.

The adapter is called `trm`, so its tensors' names say what they are: trained and saved with the TRMs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

ADAPTER = "trm"


def add_lora(model: PreTrainedModel, rank: int, dtype: torch.dtype) -> None:
    """Adapters of `rank`, alpha 2 * rank, on every linear layer but the head; they start as zero.

    dtype   of the adapters: peft brings a layer's input to it, and what they answer to the layer's own

    Errors: ValueError without peft, and for a model without linear layers that peft knows.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("HybridModel: lora_rank expected peft (pip install peft), got none.") from error
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
    )
    # peft_targets.py lets no other adapter have its name, or come beside it
    lora.of_hybrid = True  # type: ignore[attr-defined]
    inject_adapter_in_model(lora, model, adapter_name=ADAPTER)
    for layer in adapted(model):
        for part in (layer.lora_A, layer.lora_B):
            part.to(dtype)


def adapted(model: nn.Module) -> list[Any]:
    """The layers that have an adapter of `add_lora`."""
    return [m for m in model.modules() if ADAPTER in getattr(m, "lora_A", {})]


def is_merged(model: nn.Module) -> bool:
    """Whether an adapter's product is in the weights of a layer at the moment, as peft's merge() puts it."""
    return any(ADAPTER in getattr(m, "merged_adapters", ()) for m in model.modules())


def remove_lora(model: nn.Module) -> None:
    """Put the layers back that `add_lora` wrapped, without what was merged into them."""
    names = {layer: name for name, layer in model.named_modules()}
    for layer in adapted(model):
        if layer.merged:
            layer.unmerge()
        parent, _, child = names[layer].rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
    if hasattr(model, "peft_config"):
        del model.peft_config


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the layers answer without their adapters, where they have any."""
    layers = adapted(model)
    learning = {p: p.requires_grad for layer in layers for p in layer.parameters()}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, learns in learning.items():  # enabling makes all of them learn
            parameter.requires_grad_(learns)
