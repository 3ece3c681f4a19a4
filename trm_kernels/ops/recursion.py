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
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from trm_kernels.ops.add_rms_norm import add_rms_norm
from trm_kernels.ops.linear_swiglu import linear_swiglu
from trm_kernels.ops.rope_attention import rope_attention

# (evaluation, keys, values) -> all keys and values so far. Evaluations of a layer are counted from 0
# through one call: cycle by cycle, step by step, layer by layer.
EvaluationCache = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LayerWeights:
    """One layer's matrices, each [out, in]. A layer mixes tokens by attention or by mlp_t, never by both."""

    gate_up_proj: Tensor  # [2F, D]
    down_proj: Tensor  # [D, F]
    qkv_proj: Tensor | None = None  # [(H + 2G) K, D]
    o_proj: Tensor | None = None  # [D, H K]
    mlp_t_gate_up_proj: Tensor | None = None  # [2P, T], P the inner width over the token axis
    mlp_t_down_proj: Tensor | None = None  # [T, P]

    def to(self, dtype: torch.dtype) -> "LayerWeights":
        """The same matrices in another dtype; gradients flow back to these."""
        matrices = {field.name: getattr(self, field.name) for field in fields(self)}
        return LayerWeights(**{n: None if m is None else m.to(dtype) for n, m in matrices.items()})


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
) -> tuple[Tensor, Tensor]:
    """(y, z) after all cycles. See the top of this file; attention's arguments are rope_attention's.

    num_recursion_steps   n: updates of z in a cycle
    num_cycles            T: updates of y
    grad_cycles           how many of the last cycles pass gradients; None = all
    update_cache          keeps keys and values of every evaluation of a layer (decoding)
    """
    _check(x, y, z, weights, num_recursion_steps, num_cycles, grad_cycles)
    evaluation = 0

    def f(v: Tensor) -> Tensor:
        nonlocal evaluation
        for layer in weights:
            if layer.mlp_t_gate_up_proj is not None:
                v = _mix_tokens(v, layer, eps)
            else:
                at = evaluation  # bound now: the cache is asked while this evaluation runs
                o = rope_attention(
                    F.linear(v, layer.qkv_proj),
                    positions,
                    num_heads,
                    num_key_value_heads,
                    mask,
                    causal,
                    rope_theta,
                    None if update_cache is None else lambda k, u, at=at: update_cache(at, k, u),
                )
                v = add_rms_norm(v, F.linear(o, layer.o_proj), eps)
            v = add_rms_norm(v, F.linear(linear_swiglu(v, layer.gate_up_proj), layer.down_proj), eps)
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


def _mix_tokens(v: Tensor, layer: LayerWeights, eps: float) -> Tensor:
    """rms(v + swiglu(v)) along the token axis: the same two ops on the transposed state [B, D, T]."""
    u = v.transpose(1, 2)
    mixed = F.linear(linear_swiglu(u, layer.mlp_t_gate_up_proj), layer.mlp_t_down_proj)
    return add_rms_norm(u, mixed, eps).transpose(1, 2)


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
