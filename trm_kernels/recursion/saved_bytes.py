"""The memory policies: what the recursion keeps for backward, in bytes too, and which `save="auto"` takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trm_kernels.recursion.weights import AttentionWeights, LayerWeights
from trm_kernels.runtime.constant import constant_result


@dataclass(frozen=True)
class SavePolicy:
    """What one f keeps for backward besides its last state; backward computes the rest again.

    keeps_inner    what the ops of each layer keep; without it a layer is computed again
    keeps_states   the state behind each layer; without it a whole f is computed again
    """

    keeps_inner: bool
    keeps_states: bool

    @property
    def computes_again(self) -> Literal["layer", "f"] | None:
        """How much at a time; None: nothing."""
        if self.keeps_inner:
            return None
        return "layer" if self.keeps_states else "f"


POLICIES = {
    "all": SavePolicy(keeps_inner=True, keeps_states=True),
    "layer": SavePolicy(keeps_inner=False, keeps_states=True),
    "step": SavePolicy(keeps_inner=False, keeps_states=False),
}
SAVES = tuple(POLICIES)

# "auto" keeps all where that takes at most this share of the memory that is free: the language model's own
# layers, and the injections that follow, need room too
SHARE_OF_FREE_MEMORY = 0.25


def saved_bytes(save: str, x: Tensor, weights: Sequence[LayerWeights], num_heads: int) -> int:
    """Bytes that one f keeps for backward.

    Only shapes and dtypes are read: tensors may be on the "meta" device.

    Args:
        save: "all", "layer" or "step"; see fused_recursion.py.
        x: [B, T, D], the state.
        weights: The layers' matrices.
        num_heads: H.
    """
    B, T, D = x.shape
    policy = POLICIES[save]
    total = B * T * D * x.element_size() * (len(weights) if policy.keeps_states else 1)  # h2
    for w in weights if policy.keeps_inner else ():
        rows = D + w.mlp.gate_up_proj.shape[0]  # h; g and u
        elements, statistics = B * T * rows, 0
        if isinstance(w.mixer, AttentionWeights):
            elements += B * T * (w.mixer.qkv_proj.shape[0] + w.mixer.o_proj.shape[1])
            statistics = B * T * (num_heads + 1)  # of the softmax, of the norm
        else:
            elements += B * D * w.mixer.gate_up_proj.shape[0]
        total += elements * x.element_size() + 4 * statistics
    return total


def choose_save(save: str, x: Tensor, weights: Sequence[LayerWeights], num_heads: int, num_f: int) -> str:
    """`save` or, for "auto", what the free memory of x's device allows for num_f evaluations of f."""
    if save != "auto":
        return save
    if x.device.type != "cuda":
        return "all"
    wanted = num_f * saved_bytes("all", x, weights, num_heads)
    return save_that_fits(wanted, _free_bytes(x.device.index))


def save_that_fits(wanted: float, free: float) -> str:
    """What "auto" is: "all", which keeps `wanted` bytes, or "step"; `free` bytes are left."""
    return "all" if wanted <= SHARE_OF_FREE_MEMORY * free else "step"


@constant_result
def _free_bytes(index: int) -> int:
    """What the device has left, and what PyTorch holds of it without using it."""
    free, _ = torch.cuda.mem_get_info(index)
    return free + torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
