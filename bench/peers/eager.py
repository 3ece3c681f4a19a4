"""The recursion in plain PyTorch: the baseline of the kernels.

One loop, one layer, and `Parts`, in which peers differ. PLAIN uses PyTorch's own ops. PAPER does what the TRM
paper's code does: parameters stay float32 and are cast at every use. So each use has its own gradient, and
these are summed in float32. The norm and RoPE go through float32 tensors.

Source   "Less is More: Recursive Reasoning with Tiny Networks", arXiv 2510.04871, and its code,
         github.com/SamsungSAILMontreal/TinyRecursiveModels, models/layers.py; restated, not copied.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trm_kernels.ops.attention.rope import Angles
from trm_kernels.recursion.weights import AttentionWeights, LayerWeights
from trm_kernels.runtime.precision import wide


class Recursion(NamedTuple):
    """The sizes and counts of a recursion."""

    D: int  # width
    H: int  # heads
    F: int  # inner width of the MLP
    num_layers: int
    num_recursion_steps: int  # n
    num_cycles: int = 1  # T; gradients flow through the last one
    causal: bool = False
    eps: float = 1e-5

    @property
    def evaluations(self) -> int:
        """Evaluations of a layer in one call."""
        return self.num_cycles * (self.num_recursion_steps + 1) * self.num_layers


# keys and values [B, H, S, K] of all tokens, with room for the newest in the last place; one each evaluation
Cache = tuple[Tensor, Tensor]


class Parts(NamedTuple):
    """The ops in which peers differ."""

    linear: Callable[[Tensor, Tensor], Tensor]
    rms: Callable[[Tensor, float], Tensor]
    rope: Callable[[Tensor, Angles], Sequence[Tensor]]  # [B, T, 2H, K] -> q and k [B, T, H, K], turned
    attend: Callable[[Tensor, Tensor, Tensor, bool], Tensor]  # q, k, v [B, H, T, K] and is_causal
    swiglu: Callable[[Tensor], Tensor]  # [..., 2F] -> [..., F]


def turn(u: Tensor, angles: Angles) -> Tensor:
    """u [B, T, N, K] rotated (RoPE), in float32 internally; angles [B or 1, T, 1, K]."""
    cos, sin = angles
    u_wide = wide(u)
    low, high = u_wide.chunk(2, dim=-1)
    return (u_wide * cos + torch.cat((-high, low), dim=-1) * sin).to(u.dtype)


def plain_rope(qk: Tensor, angles: Angles) -> Sequence[Tensor]:
    return turn(qk, angles).chunk(2, dim=2)


def paper_rope(qk: Tensor, angles: Angles) -> Sequence[Tensor]:
    return [turn(u, angles) for u in qk.chunk(2, dim=2)]


def plain_rms(v: Tensor, eps: float) -> Tensor:
    return F.rms_norm(v, (v.shape[-1],), eps=eps)


def paper_rms(v: Tensor, eps: float) -> Tensor:
    v_wide = wide(v)
    return (v_wide * torch.rsqrt(v_wide.square().mean(-1, keepdim=True) + eps)).to(v.dtype)


def plain_attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def plain_swiglu(gu: Tensor) -> Tensor:
    gate, up = gu.chunk(2, dim=-1)
    return F.silu(gate) * up


def cast_linear(v: Tensor, w: Tensor) -> Tensor:
    return F.linear(v, w.to(v.dtype))


PLAIN = Parts(F.linear, plain_rms, plain_rope, plain_attend, plain_swiglu)
PAPER = Parts(cast_linear, paper_rms, paper_rope, plain_attend, plain_swiglu)


def layer(
    v: Tensor,
    w: LayerWeights,
    angles: Angles,
    numbers: Recursion,
    parts: Parts,
    cache: Cache | None = None,
) -> Tensor:
    """One evaluation of a layer; v [B, T, D]."""
    assert isinstance(w.mixer, AttentionWeights)
    heads = parts.linear(v, w.mixer.qkv_proj).unflatten(-1, (3 * numbers.H, -1))
    q, k = parts.rope(heads[:, :, : 2 * numbers.H], angles)
    q, k, value = (t.transpose(1, 2) for t in (q, k, heads[:, :, 2 * numbers.H :]))
    is_causal = numbers.causal
    if cache is not None:
        k, value = write(cache, k, value)
        is_causal = False  # the one query there is comes last
    o = parts.attend(q, k, value, is_causal).transpose(1, 2).flatten(2)
    v = parts.rms(v + parts.linear(o, w.mixer.o_proj), numbers.eps)
    a = parts.swiglu(parts.linear(v, w.mlp.gate_up_proj))
    return parts.rms(v + parts.linear(a, w.mlp.down_proj), numbers.eps)


def write(cache: Cache, k: Tensor, v: Tensor) -> Cache:
    """The cache with the newest token's keys and values written to it."""
    for all_tokens, newest in zip(cache, (k, v), strict=True):
        all_tokens[:, :, -1:] = newest
    return cache


def f(
    state: Tensor,
    r: Tensor,
    weights: Sequence[LayerWeights],
    angles: Angles,
    numbers: Recursion,
    parts: Parts,
    caches: Sequence[Cache] | None = None,
) -> Tensor:
    """All layers, from state + r."""
    v = state + r
    for i, w in enumerate(weights):
        v = layer(v, w, angles, numbers, parts, None if caches is None else caches[i])
    return v


def recursion(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    angles: Angles,
    numbers: Recursion,
    caches: Sequence[Cache] | None = None,
    *,
    parts: Parts = PLAIN,
    apply_f: Callable[..., Tensor] = f,
) -> tuple[Tensor, Tensor]:
    """(y, z). apply_f is f, or f compiled; angles [B or 1, T, K/2]; caches, one each evaluation."""
    angles = Angles(*(torch.cat((t, t), dim=-1)[:, :, None] for t in angles))  # for both halves, all heads
    L, calls = len(weights), 0

    def next_f(state: Tensor, r: Tensor) -> Tensor:
        nonlocal calls
        of_call = None if caches is None else caches[L * calls : L * (calls + 1)]
        calls += 1
        return apply_f(state, r, weights, angles, numbers, parts, of_call)

    for cycle in range(numbers.num_cycles):
        with torch.set_grad_enabled(torch.is_grad_enabled() and cycle == numbers.num_cycles - 1):
            y_and_x = y + x
            for _ in range(numbers.num_recursion_steps):
                z = next_f(z, y_and_x)
            y = next_f(y, z)
    return y, z
