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
from dataclasses import replace

from torch import Tensor

from trm_kernels.ops.attention.rope import Angles
from trm_kernels.ops.injection_blend import injection_blend
from trm_kernels.ops.injection_in import injection_in
from trm_kernels.recursion.inputs import Attend, AttentionInputs, EvaluationCache, check_key_mask
from trm_kernels.recursion.one_launch.choice import choose_regime
from trm_kernels.recursion.one_launch.launchers import LaunchOptions, one_launch_injection
from trm_kernels.recursion.recursion import run_recursion
from trm_kernels.recursion.spec import RecursionSpec, check_call
from trm_kernels.recursion.weights import InjectionPoint, InjectionWeights, LayerWeights, in_dtype
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
    positions: Tensor | None,
    mask: Tensor | None = None,
    causal: bool = True,
    rope_theta: float | None = 10000.0,
    eps: float = 1e-5,
    update_cache: EvaluationCache | None = None,
    key_mask: Tensor | None = None,
    attention: str = "auto",
    save: str = "auto",
    angles: Angles | None = None,
    regime: str = "auto",
    scales: Sequence[LayerWeights] | None = None,
    norms_x: bool = False,
    attend: Attend | None = None,
    cache: str = "all",
) -> Tensor:
    """Runs a whole injection point. Formula, dtypes and source: the top of this file.

    Arguments that are not here are trm_recursion's; eps is that of all norms.

    Args:
        h: [B, T, D], the language model's hidden state.
        injection: The projections and the gate.
        strength: The factor of what is added to h.
        y: [B, T, d], the answer to start from.
        z: [B, T, d], the latent state to start from.
        weights: The layers' matrices; see weights.py.
        positions: [B, T] or [1, T] whole numbers, for RoPE; None with attend.
        angles: RoPE's table of these positions, for the three ops. One launch makes its own.
        norms_x: Whether x is normed as well, see ops/injection_in.py.

    Returns:
        h', [B, T, D], in h's dtype.

    Raises:
        ValueError: As the three ops do.
        RuntimeError: For a regime that was asked for and cannot run.
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
        regime=regime,
        cache=cache,
    )
    inputs = AttentionInputs(positions, angles, mask, key_mask, update_cache, attend)
    return run_injection(h, InjectionPoint(injection, strength, norms_x), y, z, weights, scales, spec, inputs)


def run_injection(
    h: Tensor,
    point: InjectionPoint,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    scales: Sequence[LayerWeights] | None,
    spec: RecursionSpec,
    inputs: AttentionInputs,
) -> Tensor:
    """trm_injection with its settings and attention inputs as one value each."""
    injection = point.weights
    if is_on(h):
        y, z = as_autocast(y, z)
        injection = InjectionWeights._make(None if t is None else t.to(y.dtype) for t in injection)
        weights = weights if scales is not None else in_dtype(weights, y.dtype)
    check_call(y, y, z, weights, spec)
    around = [t for t in injection if t is not None]
    regime, room = choose_regime(y, weights, scales, spec, inputs, (h, y, z, *around), around[:2])
    if regime == "per_op":
        x = injection_in(h, injection.in_proj, spec.eps, norms_x=point.norms_x)
        y, _ = run_recursion(x, y, z, weights, scales, replace(spec, regime=regime), inputs)
        gate = () if injection.gate_weight is None else (injection.gate_weight, injection.gate_bias)
        return injection_blend(h, y, injection.out_proj, point.strength, *gate)
    check_key_mask(inputs.key_mask, y, room)
    blended = one_launch_injection(
        h,
        point._replace(weights=injection),
        (y, z),
        (weights, scales),
        replace(spec, regime=regime),
        inputs,
        LaunchOptions(room, may_fall_back=spec.regime == "auto"),
    )
    if inputs.update_cache is not None:
        inputs.update_cache.written(h.shape[1])  # type: ignore[attr-defined]  # it had room
    return blended
