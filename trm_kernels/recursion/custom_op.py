"""trm_recursion as one op with a gradient: fused_recursion.py behind a custom op and an autograd.Function

Forward and backward are one custom op each: torch.compile and torch.export see one call, whatever the number
of steps.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from trm_kernels.ops.attention.rope import Angles, tables
from trm_kernels.recursion.fused_layer import AttentionInner, Inner, Setting, TokensInner
from trm_kernels.recursion.fused_recursion import (
    AttendEvaluation,
    Kept,
    Loop,
    State,
    recursion_backward,
    recursion_forward,
)
from trm_kernels.recursion.weights import AttentionWeights, LayerWeights, SwiGLUWeights
from trm_kernels.runtime.gemm_common import mask_bytes, rows_of, wants_gradient
from trm_kernels.runtime.launch import launcher


class Call(NamedTuple):
    """What a call says besides tensors, as a custom op takes it."""

    mixes_tokens: list[bool]  # a layer each: whether it has mlp_t
    H: int
    G: int
    causal: bool
    query_offset: int
    eps: float
    candidate: str | None
    num_recursion_steps: int
    num_cycles: int
    grad_cycles: int
    save: str

    @property
    def loop(self) -> Loop:
        return Loop(self.num_recursion_steps, self.num_cycles, self.grad_cycles, self.save)

    def setting(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, key_mask: Tensor | None) -> Setting:
        B, T = x.shape[:2]
        sizes = self.H, self.G, cos, sin, key_mask, self.causal, self.query_offset, self.eps, self.candidate
        return Setting(B, T, *sizes)

    def layers(self, weights: Sequence[Tensor]) -> list[LayerWeights]:
        """The weights, four a layer, by their names."""
        layers = []
        for i, mixes_tokens in enumerate(self.mixes_tokens):
            mixer = SwiGLUWeights if mixes_tokens else AttentionWeights
            layers.append(
                LayerWeights(
                    mixer(*weights[4 * i : 4 * i + 2]), SwiGLUWeights(*weights[4 * i + 2 : 4 * i + 4])
                )
            )
        return layers

    def kept(self, tensors: Iterator[Tensor]) -> list[Kept]:
        """What each f left, from all of it in one row."""
        return [self._kept_of_one(tensors) for _ in range(self.grad_cycles * (self.num_recursion_steps + 1))]

    def _kept_of_one(self, tensors: Iterator[Tensor]) -> Kept:
        h2 = list(islice(tensors, 1 if self.save == "step" else len(self.mixes_tokens)))
        inner: list[Inner] = []
        for mixes_tokens in self.mixes_tokens if self.save == "all" else ():
            kind = TokensInner if mixes_tokens else AttentionInner
            inner.append(kind(*islice(tensors, len(kind._fields))))
        return Kept(h2, inner)


@launcher
def _trm_recursion_fwd(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    mixes_tokens: list[bool],
    H: int,
    G: int,
    causal: bool,
    query_offset: int,
    eps: float,
    candidate: str | None,
    num_recursion_steps: int,
    num_cycles: int,
    grad_cycles: int,
    save: str,
) -> list[Tensor]:
    """y, z, and what backward needs."""
    call = Call(
        mixes_tokens,
        H,
        G,
        causal,
        query_offset,
        eps,
        candidate,
        num_recursion_steps,
        num_cycles,
        grad_cycles,
        save,
    )
    setting = call.setting(x, cos, sin, key_mask)
    y_end, z_end, starts, kept = recursion_forward(
        rows_of(x), rows_of(y), rows_of(z), call.layers(weights), setting, call.loop
    )
    left: list[Tensor] = []
    for f in kept:
        left += f.h2
        left += (t for inner in f.inner for t in inner if t is not None)
    return [y_end.view(x.shape), z_end.view(x.shape), *starts, *left]


@launcher
def _trm_recursion_bwd(
    dy: Tensor | None,
    dz: Tensor | None,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    left: list[Tensor],
    wants_weights: bool,
    weights: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    mixes_tokens: list[bool],
    H: int,
    G: int,
    causal: bool,
    query_offset: int,
    eps: float,
    candidate: str | None,
    num_recursion_steps: int,
    num_cycles: int,
    grad_cycles: int,
    save: str,
) -> list[Tensor]:
    """The gradients of x, y, z and, where they are wanted, of the weights.

    y, z   those with which gradients start: the arguments, or un-normalised from the last cycle without
    """
    call = Call(
        mixes_tokens,
        H,
        G,
        causal,
        query_offset,
        eps,
        candidate,
        num_recursion_steps,
        num_cycles,
        grad_cycles,
        save,
    )
    is_normed = num_cycles == grad_cycles
    dx, dy, dz, dw = recursion_backward(
        None if dy is None else rows_of(dy),
        None if dz is None else rows_of(dz),
        rows_of(x),
        State(rows_of(y), is_normed),
        State(rows_of(z), is_normed),
        call.kept(iter(left)),
        call.layers(weights),
        call.setting(x, cos, sin, key_mask),
        call.loop,
        wants_weights,
    )
    return [*(t.view(x.shape) for t in (dx, dy, dz)), *(t for w in dw for part in w for t in part)]


class _FusedRecursion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, x, y, z, cos, sin, key_mask, *weights):
        y_end, z_end, *left = _trm_recursion_fwd(x, y, z, weights, cos, sin, key_mask, *call)
        if call.grad_cycles < call.num_cycles:
            y, z, *left = left
        ctx.save_for_backward(x, y, z, cos, sin, key_mask, *weights, *left)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return y_end, z_end

    @staticmethod
    def backward(ctx, dy, dz):
        call, count = ctx.call, 4 * len(ctx.call.mixes_tokens)
        x, y, z, cos, sin, key_mask, *rest = ctx.saved_tensors
        if dy is None and dz is None:
            return (None,) * (7 + count)
        _, needs_x, needs_y, needs_z, _, _, _, *needs_weights = ctx.needs_input_grad
        wants_weights = any(needs_weights)
        dx, dy, dz, *dw = _trm_recursion_bwd(
            dy, dz, x, y, z, rest[count:], wants_weights, rest[:count], cos, sin, key_mask, *call
        )
        starts_at_arguments = call.grad_cycles == call.num_cycles
        return (
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
    angles: Angles | None,
    key_mask: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor]:
    """(y, z) of trm_recursion, which checked the arguments. x, y, z [B, T, D]; key_mask [B, T] bool."""
    cos, sin = tables(angles)
    key_mask = mask_bytes(key_mask)
    flat = [t for w in weights for part in w for t in part]
    if wants_gradient(x, y, z, *flat):
        return _FusedRecursion.apply(call, x, y, z, cos, sin, key_mask, *flat)
    y, z = _trm_recursion_fwd(x, y, z, flat, cos, sin, key_mask, *call._replace(grad_cycles=0))
    return y, z


def fused_recursion_with_cache(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    call: Call,
    attend: AttendEvaluation,
) -> tuple[Tensor, Tensor]:
    """The same without gradient, attention being what `attend` makes of qkv and its cache."""
    setting, loop = call.setting(x, None, None, None), call._replace(grad_cycles=0).loop
    y_end, z_end, *_ = recursion_forward(rows_of(x), rows_of(y), rows_of(z), weights, setting, loop, attend)
    return y_end.view(x.shape), z_end.view(x.shape)
