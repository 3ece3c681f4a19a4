"""One evaluation of a layer of the recursion, forward and backward, as launches of the ops beside it

    h = v + mix(v);  h2 = rms(h) + mlp(rms(h))

h and h2 stay un-normalised. The product after h is scaled by its rstd, which follows from the sums of squares
that the residual's kernel leaves (ops/linear_residual.py); the op after h2 norms it while reading it
(ops/norm_add.py).

mix is attention or, with mlp_t, the same MLP over the token axis. Its products run over the transposed axis:
the state [B, T, D] is copied to rows [B D, T], which go through the MLP as any rows do; their norm runs along
T as well, and is copied back.

Rows are [M, D] with M = B T. Results are filled into tensors that the caller allocates: the same ones again
and again where nothing is kept, fresh ones for what backward needs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trm_kernels.ops.attention import flash
from trm_kernels.ops.attention.launchers import (
    AttentionContext,
    fill_rope_attention,
    rope_attention_gradients,
)
from trm_kernels.ops.attention.rope import rope_fwd
from trm_kernels.ops.linear_residual import count_tiles, fill_linear_residual
from trm_kernels.ops.linear_swiglu import fill_linear_swiglu, swiglu_candidate
from trm_kernels.ops.norm_add import fill_norm_add, fill_norm_add_bwd
from trm_kernels.ops.swiglu_mlp import swiglu_mlp_bwd
from trm_kernels.recursion.spec import RecursionSpec
from trm_kernels.recursion.weights import AttentionWeights, LayerWeights, SwiGLUWeights
from trm_kernels.runtime import tuning
from trm_kernels.runtime.gemm_common import add_weight_gradient
from trm_kernels.runtime.launch import arch_of


class Setting(NamedTuple):
    """What all evaluations of one call share."""

    B: int
    T: int
    spec: RecursionSpec
    cos: Tensor | None  # [B or 1, T, K/2] float32
    sin: Tensor | None
    key_mask: Tensor | None  # [B, T] uint8, 0 for keys that no query attends to

    @property
    def attention(self) -> AttentionContext:
        """What the attention's kernels read besides q, k and v."""
        return AttentionContext(self.cos, self.sin, self.key_mask, self.spec.causal, 0)


class AttentionInner(NamedTuple):
    """What lies between v and h2 and is needed by backward."""

    qkv: Tensor  # [M, (H + 2G) K]
    o: Tensor  # [M, H K]
    lse: Tensor  # [B, H, T] float32
    h: Tensor  # [M, D]
    rstd: Tensor  # [M] float32, of h
    gu: Tensor | None  # [M, 2F]; None where neither backward nor the candidate needs it


class TokensInner(NamedTuple):
    """The same with mlp_t."""

    tokens_gu: Tensor | None  # [B D, 2 F_T]
    h: Tensor  # [B D, T]
    gu: Tensor | None  # [M, 2F]


Inner = AttentionInner | TokensInner


class Scratch(NamedTuple):
    """What lies between v and h2, and is not needed afterwards."""

    a: Tensor  # [M, F]
    squares: Tensor | None  # [M, tiles] float32, of h; with attention
    tokens_a: Tensor | None  # [B D, F_T]; with mlp_t


# the float32 gradients of the two matrices of a mixer or an MLP
Dw = tuple[Tensor, Tensor] | None

# qkv [B, T, (H + 2G) K] -> o [B, T, H K]: attention over more than these tokens, from outside
Attend = Callable[[Tensor], Tensor]


def empty_inner(v: Tensor, w: LayerWeights, s: Setting, is_kept: bool) -> Inner:
    """Room for an evaluation that starts from v [M, D]."""
    M, D = v.shape
    gu = _empty_gu(v, w.mlp, s, is_kept)
    if isinstance(w.mixer, SwiGLUWeights):
        h = v.new_empty(s.B * D, s.T)
        return TokensInner(_empty_gu(h, w.mixer, s, is_kept), h, gu)
    return AttentionInner(
        qkv=v.new_empty(M, w.mixer.qkv_proj.shape[0]),
        o=v.new_empty(M, w.mixer.o_proj.shape[1]),
        lse=v.new_empty(s.B, s.spec.num_heads, s.T, dtype=torch.float32),
        h=v.new_empty(M, D),
        rstd=v.new_empty(M, dtype=torch.float32),
        gu=gu,
    )


def empty_scratch(v: Tensor, w: LayerWeights, s: Setting) -> Scratch:
    """Room for the rest of an evaluation that starts from v [M, D]."""
    M, D = v.shape
    a = v.new_empty(M, w.mlp.down_proj.shape[1])
    if isinstance(w.mixer, SwiGLUWeights):
        return Scratch(a, None, v.new_empty(s.B * D, w.mixer.down_proj.shape[1]))
    tiles = count_tiles(v.new_empty(M, w.mixer.o_proj.shape[1]), w.mixer.o_proj, s.spec.candidate)
    return Scratch(a, v.new_empty(M, tiles, dtype=torch.float32), None)


def _empty_gu(v: Tensor, w: SwiGLUWeights, s: Setting, is_kept: bool) -> Tensor | None:
    if is_kept or swiglu_candidate(v, w.gate_up_proj, s.spec.candidate) == "mm":
        return v.new_empty(v.shape[0], w.gate_up_proj.shape[0])
    return None


def layer_forward(
    v: Tensor,
    w: LayerWeights,
    inner: Inner,
    scratch: Scratch,
    s: Setting,
    h2: Tensor | None,
    attend: Attend | None = None,
) -> None:
    """Fills inner and, where it is wanted, h2 [M, D] from v [M, D]."""
    rstd, squares, candidate = None, None, s.spec.candidate
    if isinstance(inner, AttentionInner):
        assert isinstance(w.mixer, AttentionWeights)
        _attention_forward(v, w.mixer, inner, scratch, s, attend)
        r, rstd, squares = inner.h, inner.rstd, scratch.squares
    else:
        assert isinstance(w.mixer, SwiGLUWeights) and scratch.tokens_a is not None
        rows = _tokens_last(v, s)
        fill_linear_swiglu(scratch.tokens_a, inner.tokens_gu, rows, w.mixer.gate_up_proj, None, candidate)
        fill_linear_residual(inner.h, None, scratch.tokens_a, w.mixer.down_proj, rows, None, candidate)
        r = _normed_over_tokens(inner.h, s)
    fill_linear_swiglu(scratch.a, inner.gu, r, w.mlp.gate_up_proj, rstd, candidate, squares, s.spec.eps)
    if h2 is not None:
        fill_linear_residual(h2, None, scratch.a, w.mlp.down_proj, r, rstd, candidate)


def _attention_forward(
    v: Tensor,
    w: AttentionWeights,
    inner: AttentionInner,
    scratch: Scratch,
    s: Setting,
    attend: Attend | None,
) -> None:
    o = inner.o
    if attend is not None:
        qkv = torch.mm(v, w.qkv_proj.t())  # fresh each time: a cache may keep its values as they are
        o = attend(qkv.view(s.B, s.T, -1)).reshape(o.shape)
    else:
        torch.mm(v, w.qkv_proj.t(), out=inner.qkv)
        H, G = s.spec.num_heads, s.spec.num_key_value_heads
        heads = _heads(inner.qkv, s)
        if _takes_flash(heads, s):
            found, lse = flash.flash_forward(*_rotated(heads, s), s.spec.causal)
            o.view(found.shape).copy_(found)
            inner.lse.copy_(lse)
        else:
            q, k, value = heads.split((H, G, G), dim=2)
            fill_rope_attention(o.view(s.B, s.T, -1), inner.lse, q, k, value, s.attention)
    fill_linear_residual(inner.h, scratch.squares, o, w.o_proj, v, None, s.spec.candidate)


def layer_backward(
    dh2: Tensor, v: Tensor, w: LayerWeights, inner: Inner, dw: LayerWeights | None, s: Setting
) -> Tensor:
    """dv [M, D]; the gradients of the weights, where they are wanted, are added to dw, in float32."""
    assert inner.gu is not None, "kept for backward"
    dmixer, dmlp = (None, None) if dw is None else dw
    if isinstance(inner, AttentionInner):
        assert isinstance(w.mixer, AttentionWeights)
        scaled_dr = _mlp_backward(dh2, inner.h, inner.rstd, inner.gu, w.mlp, dmlp, s)
        dh = torch.empty_like(inner.h)
        fill_norm_add_bwd(dh, dh2, inner.h, s.spec.eps, scaled_dy=scaled_dr)
        return _attention_backward(dh, v, w.mixer, inner, dmixer, s)
    assert isinstance(w.mixer, SwiGLUWeights) and inner.tokens_gu is not None
    dr = _mlp_backward(dh2, _normed_over_tokens(inner.h, s), None, inner.gu, w.mlp, dmlp, s)
    dh = torch.empty_like(inner.h)
    fill_norm_add_bwd(dh, _tokens_last(dr, s), inner.h, s.spec.eps)
    dv = _mlp_backward(dh, _tokens_last(v, s), None, inner.tokens_gu, w.mixer, dmixer, s)
    return _tokens_first(dv, s)


def _attention_backward(
    dh: Tensor,
    v: Tensor,
    w: AttentionWeights,
    inner: AttentionInner,
    dw: Dw,
    s: Setting,
) -> Tensor:
    """The gradient of v in v + attention(v)."""
    heads, do = _heads(inner.qkv, s), torch.mm(dh, w.o_proj).view(s.B, s.T, -1)
    if _takes_flash(heads, s):
        dqkv = _flash_gradient(do, heads, inner, s)
    else:
        counts = s.spec.num_heads, s.spec.num_key_value_heads
        o = inner.o.view(s.B, s.T, -1)
        (dqkv,) = rope_attention_gradients(do, (heads,), counts, s.attention, o, inner.lse)
    dqkv = dqkv.view(inner.qkv.shape)
    if dw is not None:
        dqkv_proj, do_proj = dw
        add_weight_gradient(do_proj, dh, inner.o)
        add_weight_gradient(dqkv_proj, dqkv, v)
    return torch.addmm(dh, dqkv, w.qkv_proj)


def _takes_flash(heads: Tensor, s: Setting) -> bool:
    """Whether PyTorch's flash attends, by the settings table: the same way forward and backward."""
    counts = s.spec.num_heads, s.spec.num_key_value_heads
    if s.spec.attention != "auto" or not flash.is_served(heads, counts, s.key_mask):
        return False
    return tuning.attention_implementation(arch_of(heads), s.T, int(heads.shape[3])) == "sdpa"


def _rotated(heads: Tensor, s: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """q and k, rotated where there are positions, and v: [B, T, H, K] each."""
    H = s.spec.num_heads
    qk, v = heads[:, :, : 2 * H], heads[:, :, 2 * H :]
    if s.cos is not None and s.sin is not None:
        qk = rope_fwd(qk, s.cos, s.sin, False)
    return qk[:, :, :H], qk[:, :, H:], v


def _flash_gradient(do: Tensor, heads: Tensor, inner: AttentionInner, s: Setting) -> Tensor:
    """The gradient of the projection, [B, T, 3H, K]."""
    qkv = _rotated(heads, s)
    shape = qkv[0].shape
    grads = flash.flash_backward(do.view(shape), qkv, inner.o.view(shape), inner.lse, s.spec.causal)
    if s.cos is not None and s.sin is not None:
        dq, dk = (rope_fwd(t, s.cos, s.sin, True) for t in grads[:2])
        grads = dq, dk, grads[2]
    return torch.cat(grads, dim=2)


def _mlp_backward(
    do: Tensor, r: Tensor, rstd: Tensor | None, gu: Tensor, w: SwiGLUWeights, dw: Dw, s: Setting
) -> Tensor:
    """The gradient of r in r + mlp(r); with rstd, rstd times that of n = rstd r in mlp(n)."""
    dgu, a, _ = swiglu_mlp_bwd(do, w.down_proj, gu, rstd, s.spec.candidate, False)
    if dw is not None:
        dgate_up_proj, ddown_proj = dw
        add_weight_gradient(ddown_proj, do, a)
        add_weight_gradient(dgate_up_proj, dgu, r)
    return torch.addmm(do, dgu, w.gate_up_proj) if rstd is None else torch.mm(dgu, w.gate_up_proj)


def _heads(qkv: Tensor, s: Setting) -> Tensor:
    return qkv.view(s.B, s.T, s.spec.num_heads + 2 * s.spec.num_key_value_heads, -1)


def _tokens_last(rows: Tensor, s: Setting) -> Tensor:
    """[B T, D] -> [B D, T], copied."""
    return rows.view(s.B, s.T, -1).transpose(1, 2).contiguous().view(-1, s.T)


def _tokens_first(rows: Tensor, s: Setting) -> Tensor:
    """[B D, T] -> [B T, D], copied."""
    return rows.view(s.B, -1, s.T).transpose(1, 2).contiguous().view(s.B * s.T, -1)


def _normed_over_tokens(h: Tensor, s: Setting) -> Tensor:
    """rms(h) of h [B D, T], as [B T, D]."""
    y = torch.empty_like(h)
    fill_norm_add(y, h, None, s.spec.eps)
    return _tokens_first(y, s)
