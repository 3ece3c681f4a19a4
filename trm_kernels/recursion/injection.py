"""trm_injection: an injection point, from a language model's hidden state back to it

    x = rms(h) W_in^T, or its norm
    y, _ = trm_recursion(x, y, z, ...)
    h' = h + strength * gate * (y W_out^T)

Three ops: ops/injection_in.py, recursion/recursion.py, ops/injection_blend.py. Or, without gradient, all
of it in one launch, RoPE's table included: recursion/one_launch/launchers.py.

Shapes   h, h' [B, T, D]; y, z [B, T, d]; the injection's weights: see recursion/weights.py.
Dtypes   one floating dtype for all; under autocast h and h' keep theirs, see autocast.py. Norms, gate and
         softmax in float32. The layers' weights may be in 8 bits.
Errors   those of the three ops; RuntimeError for a regime that was asked for and cannot run.
Source   the mathematics in README.md, "What is computed".
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from trm_kernels.ops.attention.rope import Angles
from trm_kernels.ops.injection_blend import injection_blend
from trm_kernels.ops.injection_in import injection_in
from trm_kernels.recursion.one_launch.choice import choose_regime
from trm_kernels.recursion.one_launch.launchers import one_launch_injection
from trm_kernels.recursion.recursion import (
    EvaluationCache,
    check_call,
    check_key_mask,
    evaluations,
    room_in,
    trm_recursion,
)
from trm_kernels.recursion.weights import InjectionWeights, LayerWeights, in_dtype
from trm_kernels.runtime.autocast import as_autocast, is_on


def trm_injection(
    h: Tensor,
    injection: InjectionWeights,
    strength: float,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    *,
    num_heads: int,
    num_key_value_heads: int | None = None,
    num_recursion_steps: int,
    num_cycles: int = 1,
    grad_cycles: int | None = 1,
    positions: Tensor,
    mask: Tensor | None = None,
    causal: bool = True,
    rope_theta: float | None = 10000.0,
    eps: float = 1e-5,
    update_cache: EvaluationCache | None = None,
    key_mask: Tensor | None = None,
    query_offset: int | None = None,
    attention: str = "auto",
    save: str = "auto",
    angles: Angles | None = None,
    regime: str = "auto",
    scales: Sequence[LayerWeights] | None = None,
    norms_x: bool = False,
) -> Tensor:
    """h'. See the top of this file; the named arguments are trm_recursion's, and eps that of all norms.

    norms_x     whether x is normed as well, see ops/injection_in.py
    positions   [B, T] or [1, T] whole numbers, for RoPE
    angles      RoPE's table of these positions, for the three ops; in one launch it is not read
    """
    if is_on(h):
        y, z = as_autocast(y, z)
        injection = InjectionWeights._make(None if t is None else t.to(y.dtype) for t in injection)
        weights = weights if scales is not None else in_dtype(weights, y.dtype)
    check_call(y, y, z, weights, num_recursion_steps, num_cycles, grad_cycles, save, regime)
    G, count = num_key_value_heads or num_heads, evaluations(len(weights), num_recursion_steps, num_cycles)
    find_room = partial(room_in, update_cache, y, G, y.shape[2] // num_heads, count)
    taken, room = choose_regime(
        regime,
        y,
        weights,
        scales,
        (h, y, z, *(t for t in injection if t is not None)),
        None if update_cache is None else find_room,
        num_heads=num_heads,
        mask=mask,
        query_offset=query_offset,
        attention=attention,
        candidate=None,
        projections=(injection.in_proj, injection.out_proj),
    )
    if taken == "per_op":
        x = injection_in(h, injection.in_proj, eps, norms_x=norms_x)
        y, _ = trm_recursion(
            x,
            y,
            z,
            weights,
            num_heads=num_heads,
            num_key_value_heads=G,
            num_recursion_steps=num_recursion_steps,
            num_cycles=num_cycles,
            grad_cycles=grad_cycles,
            positions=positions,
            mask=mask,
            causal=causal,
            rope_theta=rope_theta,
            eps=eps,
            update_cache=update_cache,
            key_mask=key_mask,
            query_offset=query_offset,
            attention=attention,
            save=save,
            angles=angles,
            regime=taken,
            scales=scales,
        )
        gate = () if injection.gate_weight is None else (injection.gate_weight, injection.gate_bias)
        return injection_blend(h, y, injection.out_proj, strength, *gate)
    check_key_mask(key_mask, y, room)
    blended = one_launch_injection(
        h,
        injection,
        strength,
        y,
        z,
        weights,
        None if rope_theta is None else positions,
        rope_theta or 1.0,
        key_mask,
        room,
        scales=scales,
        num_heads=num_heads,
        num_key_value_heads=G,
        causal=causal,
        eps=eps,
        num_recursion_steps=num_recursion_steps,
        num_cycles=num_cycles,
        regime=taken,
        may_fall_back=regime == "auto",
        norms_x=norms_x,
    )
    if update_cache is not None:
        update_cache.written(h.shape[1])  # type: ignore[attr-defined]  # it had room
    return blended
