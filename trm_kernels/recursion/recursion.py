"""trm_recursion: the loop, one shared block applied to its own latent state

    repeat num_cycles times:
        repeat num_recursion_steps times:
            z = f(z + (y + x))
        y = f(y + z)

    f(v): for each layer:  v = rms(v + mix(v));  v = rms(v + swiglu(v))

mix is attention or, with mlp_t weights, a SwiGLU over the token axis; then the rms before the MLP
runs over the token axis as well, as in TRM's own code.

On the triton backend the whole loop is one op, custom_op.py. It runs op by op elsewhere, and where attention
is not done by our kernels alone: with a general mask, by a library, with a cache under torch.compile. Without
gradient it may be one launch, one_launch/launchers.py.

Shapes   x, y, z [B, T, D]; weights of a layer: see recursion/weights.py; y and z are returned.
Dtypes   one floating dtype for all (autocast: see autocast.py); norms and softmax in float32 (float64 for
         float64).
Gradient flows through the last `grad_cycles` cycles; None means through all of them.
Errors   ValueError for counts below one, no layers, or shapes that disagree.
Source   TRM, "Less is More: Recursive Reasoning with Tiny Networks", arXiv 2510.04871, figure 3.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trm_kernels.ops.add_rms_norm import add_rms_norm
from trm_kernels.ops.attention.rope import Angles, check_angles, rope_angles
from trm_kernels.ops.attention.rope_attention import rope_attention
from trm_kernels.ops.linear_swiglu import linear_swiglu
from trm_kernels.recursion.custom_op import fused_recursion, fused_recursion_with_cache
from trm_kernels.recursion.in_order import recursion_in_order
from trm_kernels.recursion.inputs import Attend, AttentionInputs, EvaluationCache, check_key_mask
from trm_kernels.recursion.one_launch.choice import choose_regime
from trm_kernels.recursion.one_launch.launchers import LaunchOptions, one_launch_recursion
from trm_kernels.recursion.quantize import dequantize_layers
from trm_kernels.recursion.saved_bytes import choose_save
from trm_kernels.recursion.spec import RecursionSpec, check_call, states_like
from trm_kernels.recursion.weights import (
    AttentionWeights,
    LayerWeights,
    SwiGLUWeights,
    flat_weights,
    in_dtype,
    map_weights,
)
from trm_kernels.runtime import tuning
from trm_kernels.runtime.autocast import as_autocast, is_on
from trm_kernels.runtime.backend import backend, current_backend, runs_triton
from trm_kernels.runtime.gemm_common import rows_of, wants_gradient
from trm_kernels.runtime.launch import arch_of


def trm_recursion_ref(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    spec: RecursionSpec,
    attend: Attend,
) -> tuple[Tensor, Tensor]:
    """The meaning of the op: the loop, op by op. What `save` does not keep is computed again in backward."""
    evaluation = 0

    def keep(size: str, function: Callable[..., Tensor], *args: object) -> Tensor:
        if spec.policy.computes_again == size and torch.is_grad_enabled():
            if not torch.compiler.is_compiling():  # a traced graph has the backend's code in it
                function = partial(_on_backend, current_backend(), function)
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def f(v: Tensor, first_evaluation: int) -> Tensor:
        for i, layer in enumerate(weights):
            v = keep("layer", apply_layer, v, layer, attend, first_evaluation + i, spec.eps)
        return v

    def next_f(v: Tensor) -> Tensor:
        nonlocal evaluation
        first_evaluation, evaluation = evaluation, evaluation + len(weights)
        return keep("f", f, v, first_evaluation)

    first = spec.num_cycles - spec.differentiated_cycles
    for cycle in range(spec.num_cycles):
        with torch.set_grad_enabled(torch.is_grad_enabled() and cycle >= first):
            y_and_x = y + x
            for _ in range(spec.num_recursion_steps):
                z = next_f(z + y_and_x)
            y = next_f(y + z)
    return y, z


def _on_backend(name: str, function: Callable[..., Tensor], *args: object) -> Tensor:
    """Recomputation uses the forward's backend: backward may run in a thread that chose none."""
    with backend(name):
        return function(*args)


def apply_layer(v: Tensor, layer: LayerWeights, attend: Attend, evaluation: int, eps: float) -> Tensor:
    """One layer op by op: v [B, T, D] -> [B, T, D]; `attend` mixes the tokens where there is no mlp_t."""
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
    attention: str = "auto",
    save: str = "auto",
    candidate: str | None = None,
    angles: Angles | None = None,
    regime: str = "auto",
    scales: Sequence[LayerWeights] | None = None,
    attend: Attend | None = None,
    cache: str = "all",
) -> tuple[Tensor, Tensor]:
    """Runs the whole recursion. Formula, dtypes and source: the top of this file.

    Args:
        x: [B, T, D], the input, added in every step.
        y: [B, T, D], the answer so far.
        z: [B, T, D], the latent state so far.
        weights: The layers' matrices; see weights.py.
        num_heads: H, query heads; D is a multiple of it.
        num_key_value_heads: G, heads of keys and values; None for H.
        num_recursion_steps: n, updates of z in a cycle.
        num_cycles: T, updates of y.
        grad_cycles: How many of the last cycles are differentiated; None for all.
        positions: [B, T] or [1, T] for RoPE, in tokens; None counts from 0.
        mask: General mask, see ops/attention/rope_attention.py.
        causal: Whether no token attends to a later one.
        rope_theta: RoPE's base; None for no positions.
        eps: Added to the mean of squares in every norm.
        update_cache: Keeps keys and values of every evaluation of a layer, for decoding.
        key_mask: [B, S] bool, False for keys that no query attends to.
        attention: rope_attention's implementation; "auto" fuses the loop wherever it can be, and
            takes ours or PyTorch's flash attention in it, by the settings table.
        save: What is kept for backward: "all", "layer" or "step", see fused_recursion.py; "auto": all if a
            share of the free memory holds it, else step.
        candidate: Of the products with epilogues, "fused" or "mm"; None takes the settings table's.
        angles: RoPE's table, for a caller with more than one call; else it is made of positions.
        regime: How it is launched: "per_op", "one_launch" or "per_phase", see one_launch/launchers.py.
            "auto" takes the settings table's; per op where that cannot run, and, with a warning, per phase
            where a cooperative launch is impossible.
        scales: Of weights in 8 bits, see quantize.py.
        attend: Does the attention of every evaluation, see inputs.py; per op, and without gradient.
        cache: Which keys and values of a token later ones attend to: "all" or "last", see in_order.py. With
            "last" no token attends to a later one, whatever `mask` says.

    Returns:
        y and z after all cycles, [B, T, D] each.

    Raises:
        ValueError: For counts below one, no layers, shapes that disagree, or a cache and gradient with a save
            that computes again in backward.
        RuntimeError: For a regime or a candidate that was asked for and cannot run.
    """
    spec = RecursionSpec(
        num_heads,
        num_key_value_heads or num_heads,
        num_recursion_steps,
        num_cycles,
        grad_cycles,
        causal,
        rope_theta,
        eps,
        attention,
        save,
        candidate,
        regime,
        cache=cache,
    )
    inputs = AttentionInputs(positions, angles, mask, key_mask, update_cache, attend)
    return run_recursion(x, y, z, weights, scales, spec, inputs)


def run_recursion(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    scales: Sequence[LayerWeights] | None,
    spec: RecursionSpec,
    inputs: AttentionInputs,
) -> tuple[Tensor, Tensor]:
    """trm_recursion with its settings and attention inputs as one value each."""
    check_call(x, y, z, weights, spec)
    _check_attend(x, y, z, weights, inputs)
    _check_something_attends(weights, inputs)
    if spec.cache == "last":
        _check_in_order(weights, spec, inputs)
    if is_on(x):
        x, y, z = as_autocast(x, y, z)
        weights = weights if scales is not None else in_dtype(weights, x.dtype)
    y, z = states_like(x, y, z)
    inputs = inputs._replace(angles=rope_table(x, weights, spec, inputs))
    regime, room = choose_regime(x, weights, scales, spec, inputs, (x, y, z))
    if regime != "per_op":
        check_key_mask(inputs.key_mask, x, room)
        options = LaunchOptions(room, may_fall_back=spec.regime == "auto")
        y, z = one_launch_recursion(
            x, (y, z), (weights, scales), replace(spec, regime=regime), inputs, options
        )
        if inputs.update_cache is not None:
            inputs.update_cache.written(x.shape[1])  # type: ignore[attr-defined]  # it had room
        return y, z
    if scales is not None:
        weights = dequantize_layers(weights, scales, x.dtype)
    if spec.cache == "last":
        _check_nothing_is_cached_twice(x, y, z, weights, spec, inputs)

        def of_tokens(x: Tensor, y: Tensor, z: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
            return _per_op(x, y, z, weights, spec, inputs)

        return recursion_in_order(x, y, z, spec, len(weights), inputs, of_tokens)
    return _per_op(x, y, z, weights, spec, inputs)


def _per_op(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    spec: RecursionSpec,
    inputs: AttentionInputs,
) -> tuple[Tensor, Tensor]:
    """As one op whose kernels are the single ops' where that can be; else op by op."""

    def attend(evaluation: int, qkv: Tensor) -> Tensor:
        if inputs.attend is not None:
            return inputs.attend(evaluation, qkv)
        update = None if inputs.update_cache is None else partial(inputs.update_cache, evaluation)
        return attend_to(qkv, spec, inputs, update)

    if not _is_fused(x, weights, spec, inputs):
        if spec.candidate is not None:
            raise RuntimeError(
                f"trm_recursion: the candidate {spec.candidate!r} was asked for, and the loop runs op by op "
                "here."
            )
        if spec.cache == "all":  # in order, the loop over tokens has checked it
            _check_nothing_is_cached_twice(x, y, z, weights, spec, inputs)
        return trm_recursion_ref(x, y, z, weights, spec, attend)
    weights = [map_weights(lambda t: rows_of(t.to(x.dtype)), w) for w in weights]
    spec = replace(spec, save=choose_save(spec.save, x, weights, spec.num_heads, spec.differentiated_fs))
    if inputs.update_cache is not None or inputs.attend is not None:
        return fused_recursion_with_cache(x, y, z, weights, spec, attend)
    check_key_mask(inputs.key_mask, x)
    return fused_recursion(x, y, z, weights, spec, inputs.angles, inputs.key_mask)


def _check_attend(
    x: Tensor, y: Tensor, z: Tensor, weights: Sequence[LayerWeights], inputs: AttentionInputs
) -> None:
    """Attention of a caller's own reads none of our inputs, and has no gradient."""
    if inputs.attend is None:
        return
    given = [name for name, value in inputs._asdict().items() if name != "attend" and value is not None]
    if given:
        raise ValueError(f"trm_recursion: expected attend by itself, got it with {', '.join(given)}.")
    if wants_gradient(x, y, z, *flat_weights(weights)):
        raise ValueError(
            "trm_recursion: expected attend in a call without gradient (torch.no_grad()), got one."
        )


def _check_something_attends(weights: Sequence[LayerWeights], inputs: AttentionInputs) -> None:
    """Refuse masks, positions and caches where nothing reads them. Errors: ValueError."""
    given = [name for name, value in inputs._asdict().items() if value is not None]
    if given and not any(isinstance(w.mixer, AttentionWeights) for w in weights):
        raise ValueError(
            f"trm_recursion: expected layers with attention for {', '.join(given)}, got mlp_t alone, which "
            "mixes all tokens and reads none of these."
        )


def _check_in_order(weights: Sequence[LayerWeights], spec: RecursionSpec, inputs: AttentionInputs) -> None:
    """Refuse what cannot go token after token. Errors: ValueError with what was expected and what came."""
    if not spec.causal or not all(isinstance(w.mixer, AttentionWeights) for w in weights):
        raise ValueError(
            "trm_recursion: cache 'last' expected causal attention, got a recursion in which tokens see "
            "later ones."
        )
    if inputs.attend is not None and not hasattr(inputs.attend, "rounds"):
        raise ValueError("trm_recursion: cache 'last' expected an attend that has rounds, got none.")
    cache = inputs.update_cache
    if cache is not None and not (hasattr(cache, "so_far") or hasattr(cache, "rounds")):
        raise ValueError(
            "trm_recursion: cache 'last' expected an update_cache that tells what it has, so_far(slab), got "
            f"{type(cache).__name__}."
        )


def _check_nothing_is_cached_twice(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    spec: RecursionSpec,
    inputs: AttentionInputs,
) -> None:
    """Backward that computes an evaluation again would hand its keys and values to the cache again."""
    computes_again = spec.policy.computes_again is not None and wants_gradient(
        x, y, z, *flat_weights(weights)
    )
    if inputs.update_cache is not None and computes_again:
        raise ValueError(
            "trm_recursion: expected save 'auto' or 'all' with update_cache and gradient, got "
            f"{spec.save!r}: what backward computes again would be added to the cache again."
        )


def attend_to(
    qkv: Tensor,
    spec: RecursionSpec,
    inputs: AttentionInputs,
    update_cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
) -> Tensor:
    """rope_attention of qkv [B, T, (H + 2G) K] in a recursion; update_cache is that of one evaluation."""
    return rope_attention(
        qkv,
        None,
        spec.num_heads,
        spec.num_key_value_heads,
        inputs.mask,
        spec.causal,
        None,
        update_cache,
        key_mask=inputs.key_mask,
        angles=inputs.angles,
        implementation=spec.attention,
    )


def _is_fused(
    x: Tensor, weights: Sequence[LayerWeights], spec: RecursionSpec, inputs: AttentionInputs
) -> bool:
    """Whether the whole loop runs as one op, which attends by our kernels."""
    if spec.attention not in ("auto", "triton") or inputs.mask is not None:
        return False
    # a cache is a Python function, which neither a graph nor a backward can hold
    must_hold = torch.compiler.is_compiling() or wants_gradient(x, *flat_weights(weights))
    if (inputs.update_cache is not None or inputs.attend is not None) and must_hold:
        return False
    if not runs_triton("trm_recursion", x, has_kernel=x.dtype != torch.float64):
        return False
    if inputs.attend is not None or not any(isinstance(w.mixer, AttentionWeights) for w in weights):
        return True
    sizes = x.shape[2] // spec.num_heads, x.element_size(), x.shape[1]
    return tuning.find_attention("rope_attention_fwd", arch_of(x), *sizes) is not None


def rope_table(
    x: Tensor, weights: Sequence[LayerWeights], spec: RecursionSpec, inputs: AttentionInputs
) -> Angles | None:
    """RoPE's table, once for all evaluations; None where there are no positions or no attention."""
    if spec.rope_theta is None or not any(isinstance(w.mixer, AttentionWeights) for w in weights):
        return None
    if inputs.attend is not None:
        return None  # it rotates as well
    (B, T, D), angles, positions = x.shape, inputs.angles, inputs.positions
    if angles is None:
        positions = torch.arange(T, device=x.device)[None] if positions is None else positions
        angles = rope_angles(positions, D // spec.num_heads, spec.rope_theta)
    check_angles("trm_recursion", angles, B, T, D // spec.num_heads)
    return angles
