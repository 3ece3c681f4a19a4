"""trm_recursion as one op with a gradient: fused_recursion.py behind a custom op and an autograd.Function

Forward and backward are one custom op each: torch.compile and torch.export see one call, whatever the number
of steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trm_kernels.ops.attention.rope import Angles, tables
from trm_kernels.recursion.fused_layer import AttentionInner, Inner, Setting, TokensInner
from trm_kernels.recursion.fused_recursion import (
    AttendEvaluation,
    SavedF,
    State,
    recursion_backward,
    recursion_forward,
)
from trm_kernels.recursion.spec import RecursionSpec
from trm_kernels.recursion.weights import AttentionWeights, LayerWeights, SwiGLUWeights, flat_weights
from trm_kernels.runtime.gemm_common import mask_bytes, rows_of, wants_gradient
from trm_kernels.runtime.launch import launcher


def _layers(weights: Sequence[Tensor], mixes_tokens: Sequence[bool]) -> list[LayerWeights]:
    """The matrices, four a layer, by their names; mixes_tokens says which layers have mlp_t."""
    layers = []
    for i, with_mlp_t in enumerate(mixes_tokens):
        mixer = SwiGLUWeights if with_mlp_t else AttentionWeights
        of_layer = weights[4 * i : 4 * i + 4]
        layers.append(LayerWeights(mixer(*of_layer[:2]), SwiGLUWeights(*of_layer[2:])))
    return layers


def _saved(tensors: Iterator[Tensor], mixes_tokens: Sequence[bool], spec: RecursionSpec) -> list[SavedF]:
    """What each differentiated f kept, from all of it in one list."""
    found = []
    for _ in range(spec.differentiated_fs):
        h2 = list(islice(tensors, len(mixes_tokens) if spec.policy.keeps_states else 1))
        inner: list[Inner] = []
        for with_mlp_t in mixes_tokens if spec.policy.keeps_inner else ():
            kind = TokensInner if with_mlp_t else AttentionInner
            inner.append(kind(*islice(tensors, len(kind._fields))))
        found.append(SavedF(h2, inner))
    return found


class _OpInputs(NamedTuple):
    """What both ops are given. The backward has the y and z with which gradients start."""

    x: Tensor  # [B, T, D], as y and z
    y: Tensor
    z: Tensor
    weights: list[Tensor]  # four a layer
    mixes_tokens: list[bool]  # of each layer, whether it has mlp_t
    cos: Tensor | None  # [B or 1, T, K/2] float32
    sin: Tensor | None
    key_mask: Tensor | None  # [B, T] uint8

    def setting(self, spec: RecursionSpec) -> Setting:
        """What all evaluations of the call share."""
        B, T = self.x.shape[:2]
        return Setting(B, T, spec, self.cos, self.sin, self.key_mask)


@launcher
def _trm_recursion_fwd(given: _OpInputs, spec: RecursionSpec) -> list[Tensor]:
    """y, z, and what backward needs."""
    x, y, z = map(rows_of, given[:3])
    y_end, z_end, starts, kept = recursion_forward(
        x, y, z, _layers(given.weights, given.mixes_tokens), given.setting(spec)
    )
    saved: list[Tensor] = []
    for f in kept:
        saved += f.h2
        saved += (t for inner in f.inner for t in inner if t is not None)
    return [y_end.view(given.x.shape), z_end.view(given.x.shape), *starts, *saved]


@launcher
def _trm_recursion_bwd(
    dy: Tensor | None,
    dz: Tensor | None,
    given: _OpInputs,
    saved: list[Tensor],
    wants_weights: bool,
    spec: RecursionSpec,
) -> list[Tensor]:
    """The gradients of x, y, z and, where they are wanted, of the weights.

    The y and z that are given are the arguments', or un-normalised from the cycle before.
    """
    is_normed = spec.num_cycles == spec.differentiated_cycles
    dx, dy, dz, dw = recursion_backward(
        (None if dy is None else rows_of(dy), None if dz is None else rows_of(dz)),
        rows_of(given.x),
        (State(rows_of(given.y), is_normed), State(rows_of(given.z), is_normed)),
        _saved(iter(saved), given.mixes_tokens, spec),
        _layers(given.weights, given.mixes_tokens),
        given.setting(spec),
        wants_weights,
    )
    return [*(t.view(given.x.shape) for t in (dx, dy, dz)), *flat_weights(dw)]


class _FusedRecursion(torch.autograd.Function):
    """Over a spec, which layers have mlp_t, six tensors (x, y, z, cos, sin, key_mask), and the weights."""

    @staticmethod
    def forward(ctx: Any, spec: RecursionSpec, mixes_tokens: list[bool], *tensors: Any) -> Any:
        x, y, z, cos, sin, key_mask, *weights = tensors
        of_attention = cos, sin, key_mask
        given = _OpInputs(x, y, z, weights, mixes_tokens, *of_attention)
        y_end, z_end, *saved = _trm_recursion_fwd(*given, *spec.fields)
        if spec.differentiated_cycles < spec.num_cycles:
            y, z, *saved = saved
        ctx.save_for_backward(x, y, z, *of_attention, *weights, *saved)
        ctx.spec, ctx.mixes_tokens = spec, mixes_tokens
        ctx.set_materialize_grads(False)
        return y_end, z_end

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> Any:
        spec, mixes_tokens = ctx.spec, ctx.mixes_tokens
        count = 4 * len(mixes_tokens)
        if dy is None and dz is None:
            return (None,) * (8 + count)
        x, y, z, cos, sin, key_mask, *rest = ctx.saved_tensors
        weights, saved = rest[:count], rest[count:]
        _, _, needs_x, needs_y, needs_z, _, _, _, *needs_weights = ctx.needs_input_grad
        wants_weights = any(needs_weights)
        given = _OpInputs(x, y, z, weights, mixes_tokens, cos, sin, key_mask)
        dx, dy, dz, *dw = _trm_recursion_bwd(dy, dz, *given, saved, wants_weights, *spec.fields)
        starts_at_arguments = spec.differentiated_cycles == spec.num_cycles
        return (
            None,
            None,
            dx if needs_x else None,
            dy if needs_y and starts_at_arguments else None,
            dz if needs_z and starts_at_arguments else None,
            None,
            None,
            None,
            *(dw if wants_weights else (None,) * count),
        )


def fused_recursion(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    spec: RecursionSpec,
    angles: Angles | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, z) of trm_recursion, which checked the arguments; [B, T, D]. Differentiable.

    Args:
        x: [B, T, D].
        y: [B, T, D].
        z: [B, T, D].
        weights: The layers' matrices, in x's dtype.
        spec: With `save` chosen.
        angles: RoPE's table, or None for no positions.
        key_mask: [B, T] bool, False for keys that no query attends to.
    """
    of_attention = (*tables(angles), mask_bytes(key_mask))
    mixes_tokens = [isinstance(w.mixer, SwiGLUWeights) for w in weights]
    flat = flat_weights(weights)
    if wants_gradient(x, y, z, *flat):
        y, z = _FusedRecursion.apply(spec, mixes_tokens, x, y, z, *of_attention, *flat)
        return y, z
    given = _OpInputs(x, y, z, flat, mixes_tokens, *of_attention)
    y, z = _trm_recursion_fwd(*given, *replace(spec, grad_cycles=0).fields)
    return y, z


def fused_recursion_with_cache(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    spec: RecursionSpec,
    attend: AttendEvaluation,
) -> tuple[Tensor, Tensor]:
    """As fused_recursion without gradient, attention being what `attend` makes of qkv and its cache."""
    setting = Setting(x.shape[0], x.shape[1], replace(spec, grad_cycles=0), None, None, None)
    y_end, z_end, *_ = recursion_forward(rows_of(x), rows_of(y), rows_of(z), weights, setting, attend)
    return y_end.view(x.shape), z_end.view(x.shape)
