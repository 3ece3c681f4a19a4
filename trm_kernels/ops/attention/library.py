"""Attention as libraries have it: candidates beside our own kernels, for queries and keys with RoPE done.

    sdpa             torch's scaled_dot_product_attention, whichever of its backends torch picks
    sdpa_cudnn       the same, held to one backend: cuDNN,
    sdpa_flash         flash,
    sdpa_efficient     memory-efficient
    flash_attn       the package flash-attn, 3 (flash_attn_interface) where installed, else 2

Shapes   q [B, H, T, K]; k, v [B, G, S, K]; o [B, H, T, K].
Errors   ValueError for what a candidate cannot do, RuntimeError where it is not there. Whatever SDPA itself
         refuses is its own error.

SDPA's gradients are the same in every run where torch.use_deterministic_algorithms says so.
"""

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trm_kernels.runtime.constant import constant_result

_BACKENDS = {
    "sdpa": None,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
NAMES = (*_BACKENDS, "flash_attn")


def check_available(op: str, name: str, q: Tensor) -> None:
    """Refuse a candidate that cannot be had for tensors like q. Errors: RuntimeError."""
    if name == "flash_attn" and _flash_attn_module() is None:
        raise RuntimeError(
            f"{op}: implementation 'flash_attn' needs the package flash-attn, and it is not installed."
        )
    if name in ("sdpa_cudnn", "sdpa_efficient", "flash_attn") and q.device.type not in ("cuda", "meta"):
        raise RuntimeError(
            f"{op}: implementation '{name}' expects CUDA tensors, got {q.device.type} tensors."
        )


def attend(
    op: str, name: str, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, is_causal: bool
) -> Tensor:
    """Attention by a candidate.

    Args:
        op: The caller's name, for errors.
        name: One of NAMES.
        q: [B, H, T, K], rotated.
        k: [B, G, S, K], rotated.
        v: [B, G, S, K].
        visible: Which keys each query may attend to, as a mask of SDPA.
        is_causal: Instead of a mask: no query attends to a later key, and the last query is at the last key.

    Returns:
        o, [B, H, T, K].

    Raises:
        ValueError: For what the candidate cannot do.
    """
    if name in ("flash_attn", "sdpa_flash") and visible is not None:
        raise ValueError(
            f"{op}: implementation '{name}' takes no mask but causal, with the last query at the last key; "
            "got a mask of keys, a general mask or a query_offset elsewhere."
        )
    if name == "flash_attn":
        return _flash_attn(op, q, k, v, is_causal)
    # with a mask or without flash, CUDA has no SDPA kernel for grouped heads
    is_grouped = bool(q.shape[1] != k.shape[1])  # torch.jit.trace makes a tensor of it
    if is_grouped and (visible is not None or name == "sdpa_efficient"):
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        is_grouped = False
    backend = _BACKENDS[name]
    with nullcontext() if backend is None else sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=is_causal, enable_gqa=is_grouped
        )


def _flash_attn(op: str, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"{op}: implementation 'flash_attn' expects float16 or bfloat16, got {q.dtype}.")
    module = _flash_attn_module()
    assert module is not None, "check_available comes first"
    flash_attn_func: Callable[..., Tensor] = importlib.import_module(module).flash_attn_func
    # its axes are [B, tokens, heads, K]; its causal mask ends at the last query and the last key, as ours
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    o = flash_attn_func(q, k, v, causal=is_causal, deterministic=True)
    return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)


@constant_result
def _flash_attn_module() -> str | None:
    """The module that has flash_attn_func: version 3's, else version 2's."""
    for name in ("flash_attn_interface", "flash_attn"):
        if importlib.util.find_spec(name) is not None:
            return name
    return None
