"""trm_recursion: the loop, one shared block applied to its own latent state

    repeat num_cycles times:
        repeat num_recursion_steps times:
            z = f(z + (y + x))
        y = f(y + z)

    f(v): for each layer:  v = rms(v + mix(v));  v = rms(v + swiglu(v))

mix is attention or, with mlp_t weights, a SwiGLU over the token axis; then the rms before the MLP
runs over the token axis as well, as in TRM's own code.

Shapes   x, y, z [B, T, D]; weights of a layer: see LayerWeights; y and z are returned.
Dtypes   one floating dtype for all; norms and softmax in float32 (float64 for float64).
Gradient flows through the last `grad_cycles` cycles; None means all of them.
Errors   ValueError for counts below one, no layers, or shapes that disagree.
Source   TRM, "Less is More: Recursive Reasoning with Tiny Networks", arXiv 2510.04871, figure 3.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trm_kernels.ops.add_rms_norm import add_rms_norm
from trm_kernels.ops.linear_swiglu import linear_swiglu
from trm_kernels.ops.rope_attention import rope_attention

# (evaluation, keys, values) -> all keys and values so far. Evaluations of a layer are counted from 0
# through one call: cycle by cycle, step by step, layer by layer.
EvaluationCache = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


class AttentionWeights(NamedTuple):
    """Mixes tokens by attention; see ops/rope_attention.py for H, G and K."""

    qkv_proj: Tensor  # [(H + 2G) K, D]
    o_proj: Tensor  # [D, H K]


class SwiGLUWeights(NamedTuple):
    """An MLP over channels [2F, D], [D, F], or over tokens [2F, T], [T, F] (mlp_t)."""

    gate_up_proj: Tensor
    down_proj: Tensor


class LayerWeights(NamedTuple):
    """One layer's matrices, each [out, in]: what mixes the tokens, then the MLP."""

    mixer: AttentionWeights | SwiGLUWeights
    mlp: SwiGLUWeights


def evaluations(num_layers: int, num_recursion_steps: int, num_cycles: int) -> int:
    """How many times a layer is evaluated in one call: the number of key/value slabs a cache needs."""
    return num_cycles * (num_recursion_steps + 1) * num_layers


def trm_recursion(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    *,
    num_heads: int,
    num_key_value_heads: int | None = None,
    num_recursion_steps: int,
    num_cycles: int = 1,
    grad_cycles: int | None = 1,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    rope_theta: float | None = 10000.0,
    eps: float = 1e-5,
    update_cache: EvaluationCache | None = None,
    key_mask: Tensor | None = None,
    query_offset: int | None = None,
    attention: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(y, z) after all cycles. See the top of this file; attention's arguments are rope_attention's.

    num_recursion_steps   n: updates of z in a cycle
    num_cycles            T: updates of y
    grad_cycles           how many of the last cycles pass gradients; None = all
    update_cache          keeps keys and values of every evaluation of a layer (decoding)
    attention             rope_attention's implementation
    """
    _check(x, y, z, weights, num_recursion_steps, num_cycles, grad_cycles)
    evaluation = 0

    def f(v: Tensor) -> Tensor:
        nonlocal evaluation
        for layer in weights:
            if isinstance(
                layer.mixer, SwiGLUWeights
            ):  # mlp_t: the same MLP on the transposed state [B, D, T]
                v = _mlp(v.transpose(1, 2), layer.mixer, eps).transpose(1, 2)
            else:
                o = rope_attention(
                    F.linear(v, layer.mixer.qkv_proj),
                    positions,
                    num_heads,
                    num_key_value_heads,
                    mask,
                    causal,
                    rope_theta,
                    None if update_cache is None else partial(update_cache, evaluation),
                    key_mask=key_mask,
                    query_offset=query_offset,
                    implementation=attention,
                )
                v = add_rms_norm(v, F.linear(o, layer.mixer.o_proj), eps)
            v = _mlp(v, layer.mlp, eps)
            evaluation += 1
        return v

    first_with_gradient = 0 if grad_cycles is None else num_cycles - grad_cycles
    for cycle in range(num_cycles):
        with torch.set_grad_enabled(torch.is_grad_enabled() and cycle >= first_with_gradient):
            y_and_x = y + x
            for _ in range(num_recursion_steps):
                z = f(z + y_and_x)
            y = f(y + z)
    return y, z


def _mlp(v: Tensor, weights: SwiGLUWeights, eps: float) -> Tensor:
    """rms(v + swiglu(v)) along the last axis."""
    return add_rms_norm(v, F.linear(linear_swiglu(v, weights.gate_up_proj), weights.down_proj), eps)


def _check(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    num_recursion_steps: int,
    num_cycles: int,
    grad_cycles: int | None,
) -> None:
    if not (x.ndim == 3 and x.shape == y.shape == z.shape):
        got = ", ".join(str(tuple(t.shape)) for t in (x, y, z))
        raise ValueError(f"trm_recursion: expected x, y and z of one shape [B, T, D], got {got}.")
    if not weights:
        raise ValueError("trm_recursion: expected the weights of at least one layer, got none.")
    if num_recursion_steps < 1 or num_cycles < 1:
        raise ValueError(
            "trm_recursion: expected num_recursion_steps and num_cycles of at least 1, "
            f"got {num_recursion_steps} and {num_cycles}."
        )
    if grad_cycles is not None and not 1 <= grad_cycles <= num_cycles:
        raise ValueError(
            f"trm_recursion: expected grad_cycles in 1..{num_cycles} (num_cycles) or None, got {grad_cycles}."
        )
