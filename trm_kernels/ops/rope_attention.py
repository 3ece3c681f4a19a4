"""rope_attention: o = softmax(rot(q) rot(k)^T / sqrt(K) + mask) v, read from the fused projection q|k|v

rot turns each pair (u[j], u[j + K/2]) by the angle position * theta^(-2j/K): RoPE in its rotate-half form.

Shapes   qkv [B, T, (H + 2G) K] with H query heads, G key/value heads (H a multiple of G), head width K;
         positions [B, T] or [1, T], in tokens; mask broadcast to [B, H, T, S], S the number of keys;
         o [B, T, H K].
Dtypes   qkv: any floating dtype, o has it too; angles, softmax in float32 (float64 for float64).
         mask: bool (True = may look at) or floating (added to the scores).
Errors   ValueError when sizes disagree, H is no multiple of G, or RoPE meets an odd K.
Source   RoPE: "RoFormer", Su et al., 2021, section 3.2. Attention: as in TRM, arXiv 2510.04871.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trm_kernels.backend import runs_triton
from trm_kernels.precision import wide

# (keys, values) of the new tokens [B, G, T, K] -> those of all tokens so far [B, G, S, K]
UpdateCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def rotate(u: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE of u [B, heads, T, K] at positions [B, T]; computed in float32, returned in u's dtype."""
    K = u.shape[-1]
    exponents = torch.arange(0, K, 2, device=u.device, dtype=torch.float32) / K
    angles = positions[:, None, :, None].float() * theta**-exponents  # [B, 1, T, K/2]
    cos, sin = angles.cos(), angles.sin()
    low, high = wide(u).chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(u.dtype)


def visible(T: int, S: int, device: torch.device) -> Tensor:
    """[T, S] bool: which of S keys each of the last T tokens may see when none may look ahead."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def rope_attention_ref(
    qkv: Tensor,
    positions: Tensor | None,
    num_heads: int,
    num_key_value_heads: int,
    mask: Tensor | None = None,
    causal: bool = False,
    rope_theta: float | None = 10000.0,
    update_cache: UpdateCache | None = None,
) -> Tensor:
    """The meaning of the op, in eager PyTorch."""
    B, T, width = qkv.shape
    H, G = num_heads, num_key_value_heads
    K = width // (H + 2 * G)
    q, k, v = qkv.view(B, T, H + 2 * G, K).transpose(1, 2).split((H, G, G), dim=1)
    if rope_theta is not None:
        if positions is None:
            positions = torch.arange(T, device=qkv.device)[None]
        q, k = rotate(q, positions, rope_theta), rotate(k, positions, rope_theta)
    if update_cache is not None:
        k, v = update_cache(k, v)
    k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))

    scores = wide(q @ k.transpose(-1, -2)) * K**-0.5  # [B, H, T, S]
    if mask is None and causal:
        mask = visible(T, k.shape[-2], qkv.device)
    if mask is not None and mask.dtype == torch.bool:
        # the least finite number, not -inf: a padded row that sees nothing stays finite
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    o = scores.softmax(dim=-1).to(v.dtype) @ v
    return o.transpose(1, 2).reshape(B, T, H * K)


def rope_attention(
    qkv: Tensor,
    positions: Tensor | None,
    num_heads: int,
    num_key_value_heads: int | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    rope_theta: float | None = 10000.0,
    update_cache: UpdateCache | None = None,
) -> Tensor:
    """Attention over the fused projection. See the top of this file for shapes and dtypes.

    positions      None counts from 0
    mask           None with `causal` means: no token looks ahead, the last query is the last key
    rope_theta     None leaves positions out
    update_cache   given the new keys (RoPE applied) and values, returns those of all tokens
    """
    H, G = num_heads, num_key_value_heads or num_heads
    if qkv.ndim != 3 or H < 1 or H % G or qkv.shape[-1] % (H + 2 * G):
        raise ValueError(
            "rope_attention: expected qkv [B, T, (H + 2G) K] with H a multiple of G, "
            f"got {tuple(qkv.shape)} with H = {H} and G = {G}."
        )
    if rope_theta is not None and qkv.shape[-1] // (H + 2 * G) % 2:
        raise ValueError(
            f"rope_attention: RoPE expected an even head width K, got {qkv.shape[-1] // (H + 2 * G)}."
        )
    runs_triton("rope_attention", qkv, has_kernel=False)
    return rope_attention_ref(qkv, positions, H, G, mask, causal, rope_theta, update_cache)
