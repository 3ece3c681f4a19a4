"""trm_recursion: the loop, one shared block applied to its own latent state

    repeat num_cycles times:
        repeat num_recursion_steps times:
            z = f(z + (y + x))
        y = f(y + z)

    f(v): for each layer:  v = rms(v + mix(v));  v = rms(v + swiglu(v))

mix is attention or, with mlp_t weights, a SwiGLU over the token axis; then the rms before the MLP
runs over the token axis as well, as in TRM's own code.

On the triton backend the whole loop is one op, custom_op.py. Elsewhere, and where attention is not by
our kernels or not by them alone (a general mask, a library, a cache under torch.compile), it runs op by op.
Without gradient it may be one launch, recursion/one_launch/launchers.py.

Shapes   x, y, z [B, T, D]; weights of a layer: see recursion/weights.py; y and z are returned.
Dtypes   one floating dtype for all (autocast: see autocast.py); norms and softmax in float32 (float64 for
         float64).
Gradient flows through the last `grad_cycles` cycles; None means all of them.
Errors   ValueError for counts below one, no layers, or shapes that disagree.
Source   TRM, "Less is More: Recursive Reasoning with Tiny Networks", arXiv 2510.04871, figure 3.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trm_kernels.ops.add_rms_norm import add_rms_norm
from trm_kernels.ops.attention.rope import Angles, check_angles, rope_angles
from trm_kernels.ops.attention.rope_attention import rope_attention
from trm_kernels.ops.linear_swiglu import linear_swiglu
from trm_kernels.recursion.custom_op import Call, fused_recursion, fused_recursion_with_cache
from trm_kernels.recursion.one_launch.choice import choose_regime
from trm_kernels.recursion.one_launch.launchers import CacheRoom, one_launch_recursion
from trm_kernels.recursion.quantize import dequantize_layers
from trm_kernels.recursion.saved_bytes import SAVES, choose_save
from trm_kernels.recursion.weights import AttentionWeights, LayerWeights, SwiGLUWeights, in_dtype, map_weights
from trm_kernels.runtime import tuning
from trm_kernels.runtime.autocast import as_autocast, is_on
from trm_kernels.runtime.backend import backend, current_backend, runs_triton
from trm_kernels.runtime.gemm_common import rows_of, wants_gradient
from trm_kernels.runtime.launch import arch_of


class EvaluationCache(Protocol):
    """Keeps keys and values; a function of this form does.

    Evaluations of a layer are counted from 0: cycle by cycle, step by step, layer by layer.

    One that can be written to in place also has two methods. `room(x, num_key_value_heads, head_width,
    evaluations)` gives the tensors for the keys and values of x's tokens, a CacheRoom, or None where it
    cannot. `written(tokens)` is called after so many were written to them.
    """

    def __call__(self, evaluation: int, keys: Tensor, values: Tensor, /) -> tuple[Tensor, Tensor]:
        """Keeps the keys and values of some tokens [B, G, T, K]; returns those of all so far."""


# (evaluation, qkv) -> o, see ops/attention/rope_attention.py
Attention = Callable[[int, Tensor], Tensor]


def evaluations(num_layers: int, num_recursion_steps: int, num_cycles: int) -> int:
    """How many times a layer is evaluated in one call: the number of key/value slabs a cache needs."""
    return num_cycles * (num_recursion_steps + 1) * num_layers


def trm_recursion_ref(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    attend: Attention,
    num_recursion_steps: int,
    num_cycles: int,
    grad_cycles: int,
    eps: float,
    save: str = "all",
) -> tuple[Tensor, Tensor]:
    """The meaning of the op: the loop, op by op. What `save` does not keep is computed again in backward."""
    evaluation = 0

    def keep(policy: str, function: Callable[..., Tensor], *args: object) -> Tensor:
        if save == policy and torch.is_grad_enabled():
            if not torch.compiler.is_compiling():  # a traced graph has the backend's code in it
                function = partial(_on_backend, current_backend(), function)
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def f(v: Tensor, first_evaluation: int) -> Tensor:
        for i, layer in enumerate(weights):
            v = keep("layer", _layer, v, layer, attend, first_evaluation + i, eps)
        return v

    def next_f(v: Tensor) -> Tensor:
        nonlocal evaluation
        first_evaluation, evaluation = evaluation, evaluation + len(weights)
        return keep("step", f, v, first_evaluation)

    for cycle in range(num_cycles):
        with torch.set_grad_enabled(torch.is_grad_enabled() and cycle >= num_cycles - grad_cycles):
            y_and_x = y + x
            for _ in range(num_recursion_steps):
                z = next_f(z + y_and_x)
            y = next_f(y + z)
    return y, z


def _on_backend(name: str, function: Callable[..., Tensor], *args: object) -> Tensor:
    """What is computed again runs on its forward's backend: backward may have a thread that chose none."""
    with backend(name):
        return function(*args)


def _layer(v: Tensor, layer: LayerWeights, attend: Attention, evaluation: int, eps: float) -> Tensor:
    if isinstance(layer.mixer, SwiGLUWeights):  # mlp_t: the same MLP on the transposed state [B, D, T]
        v = _mlp(v.transpose(1, 2), layer.mixer, eps).transpose(1, 2)
    else:
        o = attend(evaluation, F.linear(v, layer.mixer.qkv_proj))
        v = add_rms_norm(v, F.linear(o, layer.mixer.o_proj), eps)
    return _mlp(v, layer.mlp, eps)


def _mlp(v: Tensor, weights: SwiGLUWeights, eps: float) -> Tensor:
    """rms(v + swiglu(v)) along the last axis."""
    return add_rms_norm(v, F.linear(linear_swiglu(v, weights.gate_up_proj), weights.down_proj), eps)


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
    save: str = "auto",
    candidate: str | None = None,
    angles: Angles | None = None,
    regime: str = "auto",
    scales: Sequence[LayerWeights] | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, z) after all cycles. See the top of this file; attention's arguments are rope_attention's.

    num_recursion_steps   n: updates of z in a cycle
    num_cycles            T: updates of y
    grad_cycles           how many of the last cycles pass gradients; None = all
    update_cache          keeps keys and values of every evaluation of a layer (decoding)
    attention             rope_attention's implementation; "auto" takes ours wherever the loop can be fused
    save                  what is kept for backward: "all", "layer" or "step", see fused_recursion.py;
                          "auto": all if a share of the free memory holds it, else step
    candidate             of the products with epilogues, "fused" or "mm"; None: as the table of settings says
    angles                RoPE's table, for a caller with more than one call; else of positions and rope_theta
    regime                how it is launched: "per_op", "one_launch" or "per_phase", see
                          one_launch/launchers.py; "auto": as the table of settings says, per op where
                          that cannot run, and with a warning per phase where one launch is impossible
    scales                of weights in 8 bits, see quantize.py
    """
    check_call(x, y, z, weights, num_recursion_steps, num_cycles, grad_cycles, save, regime)
    if is_on(x):
        x, y, z = as_autocast(x, y, z)
        weights = weights if scales is not None else in_dtype(weights, x.dtype)
    H, G = num_heads, num_key_value_heads or num_heads
    with_gradient = num_cycles if grad_cycles is None else grad_cycles
    angles = _angles(x, weights, H, positions, rope_theta, query_offset, angles)

    def attend(evaluation: int, qkv: Tensor) -> Tensor:
        return rope_attention(
            qkv,
            None,
            H,
            G,
            mask,
            causal,
            None,
            None if update_cache is None else partial(update_cache, evaluation),
            key_mask=key_mask,
            query_offset=query_offset,
            angles=angles,
            implementation=attention,
        )

    asked, count = regime, evaluations(len(weights), num_recursion_steps, num_cycles)
    regime, room = choose_regime(
        asked,
        x,
        weights,
        scales,
        (x, y, z),
        None if update_cache is None else partial(room_in, update_cache, x, G, x.shape[2] // H, count),
        num_heads=H,
        mask=mask,
        query_offset=query_offset,
        attention=attention,
        candidate=candidate,
    )
    if regime != "per_op":
        check_key_mask(key_mask, x, room)
        y, z = one_launch_recursion(
            x,
            y,
            z,
            weights,
            angles,
            key_mask,
            room,
            scales=scales,
            num_heads=H,
            num_key_value_heads=G,
            causal=causal,
            eps=eps,
            num_recursion_steps=num_recursion_steps,
            num_cycles=num_cycles,
            regime=regime,
            may_fall_back=asked == "auto",
        )
        if update_cache is not None:
            update_cache.written(x.shape[1])  # type: ignore[attr-defined]  # it had room
        return y, z
    if scales is not None:
        weights = dequantize_layers(weights, scales, x.dtype)
    if not _is_fused(x, weights, H, attention, mask, update_cache):
        if candidate is not None:
            raise RuntimeError(
                f"trm_recursion: the candidate {candidate!r} was asked for, and the loop runs op by op here."
            )
        policy = "all" if save == "auto" else save
        return trm_recursion_ref(
            x, y, z, weights, attend, num_recursion_steps, num_cycles, with_gradient, eps, policy
        )
    weights = [map_weights(lambda t: rows_of(t.to(x.dtype)), w) for w in weights]
    call = Call(
        [isinstance(w.mixer, SwiGLUWeights) for w in weights],
        H,
        G,
        causal,
        query_offset or 0,
        eps,
        candidate,
        num_recursion_steps,
        num_cycles,
        with_gradient,
        choose_save(save, x, weights, H, with_gradient * (num_recursion_steps + 1)),
    )
    if update_cache is not None:
        return fused_recursion_with_cache(x, y, z, weights, call, attend)
    check_key_mask(key_mask, x)
    return fused_recursion(x, y, z, weights, angles, key_mask, call)


def room_in(cache: EvaluationCache | None, *what: Any) -> CacheRoom | None:
    """Where a cache lets a call write; None where it cannot."""
    find = getattr(cache, "room", None)
    return find(*what) if find else None


def _is_fused(
    x: Tensor,
    weights: Sequence[LayerWeights],
    num_heads: int,
    attention: str,
    mask: Tensor | None,
    update_cache: EvaluationCache | None,
) -> bool:
    """Whether the whole loop runs as one op, which attends by our kernels."""
    if attention not in ("auto", "triton") or mask is not None:
        return False
    if update_cache is not None:  # a Python function: nothing that a graph of ops or a backward could hold
        flat = (t for w in weights for part in w for t in part)
        if torch.compiler.is_compiling() or wants_gradient(x, *flat):
            return False
    if not runs_triton("trm_recursion", x, has_kernel=x.dtype != torch.float64):
        return False
    if not any(isinstance(w.mixer, AttentionWeights) for w in weights):
        return True
    sizes = x.shape[2] // num_heads, x.element_size(), x.shape[1]
    return tuning.find_attention("rope_attention_fwd", arch_of(x), *sizes) is not None


def _angles(
    x: Tensor,
    weights: Sequence[LayerWeights],
    num_heads: int,
    positions: Tensor | None,
    rope_theta: float | None,
    query_offset: int | None,
    angles: Angles | None,
) -> Angles | None:
    """RoPE's table, once for all evaluations."""
    if rope_theta is None or not any(isinstance(w.mixer, AttentionWeights) for w in weights):
        return None
    B, T, D = x.shape
    if angles is None:
        if positions is None:
            positions = torch.arange(T, device=x.device)[None] + (query_offset or 0)
        angles = rope_angles(positions, D // num_heads, rope_theta)
    check_angles("trm_recursion", angles, B, T, D // num_heads)
    return angles


def check_key_mask(key_mask: Tensor | None, x: Tensor, room: CacheRoom | None = None) -> None:
    if key_mask is None:
        return
    B, S = x.shape[0], x.shape[1]
    if room is not None:  # where only the device knows how many keys there are, the mask may have any length
        S = key_mask.shape[1] if room.lengths else S + room.seen
    if key_mask.shape != (B, S) or key_mask.dtype != torch.bool:
        raise ValueError(
            f"trm_recursion: expected key_mask {(B, S)} of bool, "
            f"got {tuple(key_mask.shape)} of {key_mask.dtype}."
        )


def check_call(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    num_recursion_steps: int,
    num_cycles: int,
    grad_cycles: int | None,
    save: str,
    regime: str,
) -> None:
    if regime not in ("auto", *tuning.REGIMES):
        raise ValueError(
            f"trm_recursion: expected regime to be auto, {', '.join(tuning.REGIMES)}, got {regime!r}."
        )
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
    if save not in ("auto", *SAVES):
        raise ValueError(f"trm_recursion: expected save to be auto, {', '.join(SAVES)}, got {save!r}.")
