"""PyTorch's flash attention, forward and backward called one by one: for a loop that keeps what it chooses

Where SDPA differentiates by itself, these two are what it calls. The gradient is summed in one order: equal
reruns. On a CPU they are PyTorch's operators of that name for CPUs.

Shapes   q, k, v, do [B, T, H, K], RoPE done; o [B, T, H, K]; lse [B, H, T] float32, of PyTorch's own meaning.
Dtypes   float16 or bfloat16; on a CPU float32 as well.
Source   "FlashAttention-2", Dao, 2023.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def is_served(q: Tensor, heads: tuple[int, int], key_mask: Tensor | None) -> bool:
    """Whether flash attends for such heads: as many keys' as queries', 16 bits, and no mask of keys."""
    K, H, G = q.shape[-1], *heads
    is_narrow = q.element_size() == 2 or q.device.type == "cpu"
    return key_mask is None and H == G and is_narrow and K % 8 == 0 and K <= 256


def flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """(o, lse)"""
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    aten = torch.ops.aten
    on_cpu = q.device.type == "cpu"
    attend = aten._scaled_dot_product_flash_attention
    o, lse, *_ = (aten._scaled_dot_product_flash_attention_for_cpu if on_cpu else attend)(
        *heads_first, 0.0, causal
    )
    return o.transpose(1, 2), lse


def flash_backward(
    do: Tensor, qkv: tuple[Tensor, Tensor, Tensor], o: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    given = [t.transpose(1, 2) for t in (do, *qkv, o)]
    aten = torch.ops.aten
    if do.device.type == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, lse, 0.0, causal)
    else:
        T = int(do.shape[1])
        # the state of a generator that no dropout asks for
        unused = (
            torch.empty(2, dtype=torch.uint64, device=do.device),
            torch.empty(0, dtype=torch.uint64, device=do.device),
        )
        with _in_one_order():
            grads = aten._scaled_dot_product_flash_attention_backward(
                *given, lse, None, None, T, T, 0.0, causal, *unused
            )
    dq, dk, dv = (t.transpose(1, 2) for t in grads)
    return dq, dk, dv


@contextmanager
def _in_one_order() -> Iterator[None]:
    """PyTorch asked for its deterministic gradient; the setting is one for the whole process."""
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic  # whose property type checkers do not see
    filled = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = was_on and filled  # what is written anyway is not filled first
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=only_warned)
        deterministic.fill_uninitialized_memory = filled
