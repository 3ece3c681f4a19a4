"""How a recursion runs: all settings of a call as one value.

A `RecursionSpec` is made once, by the public function, by TRM or by a hybrid's config, and handed on as it
is. Custom ops take its fields one by one (runtime/launch.py); nobody else unpacks it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from trm_kernels.recursion.saved_bytes import POLICIES, SAVES, SavePolicy
from trm_kernels.recursion.weights import LayerWeights
from trm_kernels.runtime.tuning import REGIMES


@dataclass(frozen=True)
class RecursionSpec:
    """Settings of one call of the recursion. Numbers are counts unless they say otherwise.

    Attributes:
        num_heads: H, query heads.
        num_key_value_heads: G, heads of keys and values; H is a multiple of it.
        num_recursion_steps: n, updates of z in a cycle.
        num_cycles: T, updates of y.
        grad_cycles: How many of the last cycles are differentiated; None for all.
        causal: Whether no token attends to a later one.
        rope_theta: RoPE's base; None for no positions.
        eps: Added to the mean of squares in every norm.
        attention: One of rope_attention's implementations.
        save: What is kept for backward: "auto", "all", "layer" or "step"; see saved_bytes.py.
        candidate: Of the products with epilogues, "fused" or "mm"; None takes the settings table's.
        regime: How the recursion is launched: "auto", "per_op", "one_launch" or "per_phase"; see
            one_launch/choice.py.
        quantize: None, "int8" or "fp8": how TRM holds its matrices. A recursion sees it by its weights.
        cache: Which keys and values of a token later tokens attend to: "all", in each evaluation those of the
            same one, or "last", those of its last evaluation, see in_order.py.
    """

    num_heads: int
    num_key_value_heads: int
    num_recursion_steps: int
    num_cycles: int = 1
    grad_cycles: int | None = 1
    causal: bool = False
    rope_theta: float | None = 10000.0
    eps: float = 1e-5
    attention: str = "auto"
    save: str = "auto"
    candidate: str | None = None
    regime: str = "auto"
    quantize: str | None = None
    cache: str = "all"

    @property
    def differentiated_cycles(self) -> int:
        """How many of the last cycles are differentiated, as a number."""
        return self.num_cycles if self.grad_cycles is None else self.grad_cycles

    @property
    def differentiated_fs(self) -> int:
        """How many evaluations of f are differentiated."""
        return self.differentiated_cycles * (self.num_recursion_steps + 1)

    def of_cycles(self, num_cycles: int) -> "RecursionSpec":
        """The same with another T; where more of its cycles were to be differentiated, all are."""
        grad_cycles = None if self.grad_cycles is None else min(self.grad_cycles, num_cycles)
        return replace(self, num_cycles=num_cycles, grad_cycles=grad_cycles)

    @property
    def policy(self) -> SavePolicy:
        """What `save` says; op by op "auto" keeps all, and for the kernels choose_save has settled it."""
        return POLICIES["all" if self.save == "auto" else self.save]

    @property
    def fields(self) -> tuple[Any, ...]:
        """All of it as a custom op takes it: one by one, in the order above."""
        return tuple(getattr(self, name) for name in _FIELDS)

    def evaluations(self, num_layers: int) -> int:
        """Evaluations of a layer in one call."""
        return evaluations(num_layers, self.num_recursion_steps, self.num_cycles)

    def slabs(self, num_layers: int) -> int:
        """Key/value slabs that a cache needs: one for each evaluation of a layer, or one for each layer."""
        return num_layers if self.cache == "last" else self.evaluations(num_layers)


CACHES = ("all", "last")
_FIELDS = tuple(field.name for field in fields(RecursionSpec))


def evaluations(num_layers: int, num_recursion_steps: int, num_cycles: int) -> int:
    """How many times a layer is evaluated in one call."""
    return num_cycles * (num_recursion_steps + 1) * num_layers


def check_call(x: Tensor, y: Tensor, z: Tensor, weights: Sequence[LayerWeights], spec: RecursionSpec) -> None:
    """Refuse what no recursion can run. Errors: ValueError with what was expected and what came."""
    if spec.regime not in ("auto", *REGIMES):
        raise ValueError(
            f"trm_recursion: expected regime to be auto, {', '.join(REGIMES)}, got {spec.regime!r}."
        )
    if not (x.ndim == 3 and x.shape == y.shape == z.shape):
        got = ", ".join(str(tuple(t.shape)) for t in (x, y, z))
        raise ValueError(f"trm_recursion: expected x, y and z of one shape [B, T, D], got {got}.")
    if not weights:
        raise ValueError("trm_recursion: expected the weights of at least one layer, got none.")
    counts = spec.num_recursion_steps, spec.num_cycles
    if any(isinstance(count, float | str) or count < 1 for count in counts):
        raise ValueError(
            "trm_recursion: expected num_recursion_steps and num_cycles of at least 1, "
            f"got {counts[0]} and {counts[1]}."
        )
    if spec.grad_cycles is not None and not 1 <= spec.grad_cycles <= spec.num_cycles:
        raise ValueError(
            f"trm_recursion: expected grad_cycles in 1..{spec.num_cycles} (num_cycles) or None, "
            f"got {spec.grad_cycles}."
        )
    if spec.cache not in CACHES:
        raise ValueError(f"trm_recursion: expected cache to be {' or '.join(CACHES)}, got {spec.cache!r}.")
    if spec.save not in ("auto", *SAVES):
        raise ValueError(f"trm_recursion: expected save to be auto, {', '.join(SAVES)}, got {spec.save!r}.")


def states_like(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """y and z in x's dtype: a state that a call under autocast gave out may go into one without.

    Errors: ValueError for a state of a wider dtype, which would be rounded.
    """
    if x.dtype == y.dtype == z.dtype:  # promote_types is a call of its own in each forward
        return y, z
    if any(torch.promote_types(t.dtype, x.dtype) != x.dtype for t in (y, z)):
        raise ValueError(
            f"trm_recursion: expected y and z of x's dtype or a narrower one, got {y.dtype} and {z.dtype} "
            f"with x of {x.dtype}."
        )
    return y.to(x.dtype), z.to(x.dtype)
