"""The matrices of the recursive block, each [out, in] as nn.Linear keeps it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionWeights(NamedTuple):
    """Mixes tokens by attention; see ops/attention/rope_attention.py for H, G and K."""

    qkv_proj: Tensor  # [(H + 2G) K, D]
    o_proj: Tensor  # [D, H K]


class SwiGLUWeights(NamedTuple):
    """An MLP over channels [2F, D], [D, F], or over tokens [2F, T], [T, F] (mlp_t)."""

    gate_up_proj: Tensor
    down_proj: Tensor


class InjectionWeights(NamedTuple):
    """What stands between a language model of width D and a recursion of width d, and back."""

    in_proj: Tensor  # [d, D]
    out_proj: Tensor  # [D, d]
    gate_weight: Tensor | None = None  # [1, d]; None where the blend has no gate
    gate_bias: Tensor | None = None  # [1]


class InjectionPoint(NamedTuple):
    """What stands around a recursion inside a language model: h' = h + strength * gate * (y W_out^T)."""

    weights: InjectionWeights
    strength: float = 1.0
    norms_x: bool = False  # whether x is normed as well, see ops/injection_in.py


class LayerWeights(NamedTuple):
    """One layer's matrices, each [out, in]: what mixes the tokens, then the MLP."""

    mixer: AttentionWeights | SwiGLUWeights
    mlp: SwiGLUWeights


def map_weights(function: Callable[[Tensor], Tensor], w: LayerWeights) -> LayerWeights:
    """A layer with the function's value of each matrix in its place."""
    return LayerWeights(type(w.mixer)(*map(function, w.mixer)), SwiGLUWeights(*map(function, w.mlp)))


def flat_weights(weights: Sequence[LayerWeights]) -> list[Tensor]:
    """All matrices of some layers, four a layer."""
    return [t for w in weights for part in w for t in part]


def in_dtype(weights: Sequence[LayerWeights], dtype: torch.dtype) -> list[LayerWeights]:
    """The layers' matrices in `dtype`; those that are in it already, as they are."""
    return [map_weights(lambda t: t.to(dtype), w) for w in weights]


def map_two_weights(
    function: Callable[[Tensor, Tensor], Tensor], w: LayerWeights, other: LayerWeights
) -> LayerWeights:
    """A layer with the function's value of each matrix, and of what is in its place in the other."""
    mixer = type(w.mixer)(*map(function, w.mixer, other.mixer))
    return LayerWeights(mixer, SwiGLUWeights(*map(function, w.mlp, other.mlp)))
