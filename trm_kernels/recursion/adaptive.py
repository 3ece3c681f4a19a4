"""adaptive_recursion: the loop of recursion.py, in which each token stops when its answer no longer changes

    repeat num_cycles times:
        repeat at most num_recursion_steps times, for the tokens that are active, while there are any:
            z = f(z + (y + x))
            a = f(y + z)                        # the answer, had this step been the last
            stop where |a - a before| <= threshold * |a|, patience times in a row, and, in_order, where no
            token that this one attends to is active
        y = a

A token that stopped keeps its z and its a. In later steps other tokens attend to the keys and values of its
last step: in an evaluation at step s each token's keys are those of step min(s, its last). So whether a token
stops depends on itself and on the tokens it attends to. In causal attention those are the earlier ones.
Therefore one call over all tokens, calls over parts of them with a cache, and token-by-token calls give the
same answers after the same steps: the cache holds repeated keys in the place of skipped ones. For in_order it
holds the numbers of steps as well. Without early halting the result equals trm_recursion's.

Saved work: f is computed for active tokens only, attention for sequences with an active token, and the loop
ends when no token is active. Cost: `a` is computed at every step, so 2 evaluations of f a step, where a fixed
n takes n + 1. `watch="latent"` watches the change of z instead, and computes `a` once, at the end.

Shapes   x, y, z [B, T, D]; weights of a layer: see recursion/weights.py, attention only.
Dtypes   as recursion/recursion.py; changes in float32 (float64 for float64).
Errors   ValueError for what recursion/recursion.py refuses, and for mlp_t, which mixes tokens by no keys;
         RuntimeError for a call with gradient or under torch.compile.
Runs     op by op, on either backend: after every step the host asks the device which tokens are active, so
         that neither one launch nor a graph (CUDA's, torch.compile's) can hold the loop.
Source   stopping where a state saturates, and copying it to the depths that were skipped: "Confident Adaptive
         Language Modeling", Schuster et al., 2022; patience: "BERT Loses Patience", Zhou et al., 2020.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from trm_kernels.ops.attention.rope import Angles
from trm_kernels.recursion.inputs import AttentionInputs, EvaluationCache
from trm_kernels.recursion.recursion import apply_layer, attend_to, rope_table
from trm_kernels.recursion.spec import RecursionSpec, evaluations, states_like
from trm_kernels.recursion.weights import AttentionWeights, LayerWeights, flat_weights, in_dtype
from trm_kernels.runtime.autocast import as_autocast
from trm_kernels.runtime.gemm_common import wants_gradient
from trm_kernels.runtime.precision import wide

WATCHED = ("answer", "latent")


@dataclass(frozen=True)
class Halting:
    """When a token stops. A change is known from the second step on.

    Attributes:
        threshold: Relative change that counts as none: |new - old| <= threshold * |new|.
        patience: Steps in a row without a change after which a token stops.
        min_steps: No token stops before so many steps.
        watch: "answer" watches y; "latent" watches z, for half the evaluations.
        in_order: No token stops before the tokens it attends to. A token whose inputs are unfinished can look
            converged, and would stop too early.

    Raises:
        ValueError: With what was expected and what came.
    """

    threshold: float
    patience: int = 1
    min_steps: int = 1
    watch: str = "answer"
    in_order: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float):
            raise ValueError(f"Halting: expected threshold to be a number, got {self.threshold!r}.")
        if not self.threshold >= 0:
            raise ValueError(f"Halting: expected threshold of at least 0, got {self.threshold}.")
        for name in ("patience", "min_steps"):
            check_count("Halting", name, getattr(self, name))
        if self.watch not in WATCHED:
            raise ValueError(
                f"Halting: expected watch to be one of {', '.join(WATCHED)}, got {self.watch!r}."
            )


def check_count(who: str, name: str, value: object) -> None:
    """Refuse all but whole numbers of at least 1. Errors: ValueError with what was expected and what came."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{who}: expected {name} to be a count of at least 1, got {value!r}.")


class Adapted(NamedTuple):
    """What a call returns.

    Attributes:
        y: [B, T, D], the answer.
        z: [B, T, D], the latent state.
        steps: [num_cycles, B, T] int64, steps until the token stopped.
        evaluations: [B, T] int64, how often f was computed for the token, answers included, in all cycles.
    """

    y: Tensor
    z: Tensor
    steps: Tensor
    evaluations: Tensor


def adaptive_evaluations(
    num_layers: int, num_recursion_steps: int, num_cycles: int, halting: Halting | None
) -> int:
    """How many key/value slabs a cache needs; without a halting rule as many as trm_recursion fills."""
    if halting is not None and halting.watch == "answer":
        return num_cycles * 2 * num_recursion_steps * num_layers
    return evaluations(num_layers, num_recursion_steps, num_cycles)


class Waiting(NamedTuple):
    """What a halting rule reads besides the state.

    Attributes:
        is_token: [B, T] bool, False for padding, for which no token waits; None: all are tokens.
        steps_before: [num_cycles, B, S], the `steps` of the tokens in the cache, in any dtype, 0 in empty
            slots. A rule with in_order needs them.
    """

    is_token: Tensor | None = None
    steps_before: Tensor | None = None


def adaptive_recursion(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    *,
    halting: Halting,
    num_heads: int,
    num_key_value_heads: int | None = None,
    num_recursion_steps: int,
    num_cycles: int = 1,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    rope_theta: float | None = 10000.0,
    eps: float = 1e-5,
    update_cache: EvaluationCache | None = None,
    key_mask: Tensor | None = None,
    attention: str = "auto",
    angles: Angles | None = None,
    is_token: Tensor | None = None,
    steps_before: Tensor | None = None,
) -> Adapted:
    """Runs the recursion until every token has stopped. Formula, dtypes and source: the top of this file.

    Arguments that are not here are trm_recursion's.

    Args:
        x: [B, T, D].
        y: [B, T, D].
        z: [B, T, D].
        weights: The layers' matrices, with attention.
        halting: When a token stops.
        num_recursion_steps: n: a token that has not stopped by then stops.
        update_cache: Keeps keys and values of adaptive_evaluations(...) evaluations of a layer, cycle by
            cycle and step by step; in a step z's come before the answer's.
        is_token: [B, T] bool, False for padding, for which no token waits; None: all are tokens.
        steps_before: [num_cycles, B, S], the `steps` of the tokens in the cache, in any dtype, 0 in empty
            slots. A rule with in_order needs them.

    Raises:
        ValueError: For counts below one, mlp_t, or shapes that disagree.
        RuntimeError: For a call with gradient or under torch.compile.
    """
    spec = RecursionSpec(
        num_heads,
        num_key_value_heads or num_heads,
        num_recursion_steps,
        num_cycles,
        None,
        causal,
        rope_theta,
        eps,
        attention,
    )
    inputs = AttentionInputs(positions, angles, mask, key_mask, update_cache)
    return run_adaptive(x, y, z, weights, spec, inputs, halting, Waiting(is_token, steps_before))


def run_adaptive(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    spec: RecursionSpec,
    inputs: AttentionInputs,
    halting: Halting,
    waiting: Waiting,
) -> Adapted:
    """adaptive_recursion with its settings and attention inputs as one value each."""
    _check(x, y, z, weights, spec, waiting.is_token)
    (B, T, D), num_cycles = x.shape, spec.num_cycles
    inputs = inputs._replace(angles=rope_table(x, weights, spec, inputs))
    x, y, z = as_autocast(x, y, z)
    y, z = states_like(x, y, z)
    block = _AdaptiveBlock(in_dtype(weights, x.dtype), spec, inputs, x)
    x, y, z = (t.reshape(B * T, D) for t in (x, y, z))
    is_token = (
        x.new_ones(B * T, dtype=torch.bool) if waiting.is_token is None else waiting.is_token.reshape(-1)
    )

    steps = torch.zeros(num_cycles, B * T, dtype=torch.int64, device=x.device)
    for cycle in range(num_cycles):
        before = None if waiting.steps_before is None else waiting.steps_before[cycle]
        order = Order(B, T, spec.causal, inputs.mask, before) if halting.in_order else None
        y, z = _cycle(x, y, z, block, halting, is_token, steps[cycle], order)
    y, z = (t.view(B, T, D) for t in (y, z))
    return Adapted(y, z, steps.view(num_cycles, B, T), block.computed.view(B, T))


def _check(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    spec: RecursionSpec,
    is_token: Tensor | None,
) -> None:
    check_count("adaptive_recursion", "num_recursion_steps", spec.num_recursion_steps)
    check_count("adaptive_recursion", "num_cycles", spec.num_cycles)
    if not (x.ndim == 3 and x.shape == y.shape == z.shape):
        got = ", ".join(str(tuple(t.shape)) for t in (x, y, z))
        raise ValueError(f"adaptive_recursion: expected x, y and z of one shape [B, T, D], got {got}.")
    if not weights or not all(isinstance(w.mixer, AttentionWeights) for w in weights):
        raise ValueError("adaptive_recursion: expected layers with attention, got none or mlp_t.")
    B, T, _ = x.shape
    if is_token is not None and (is_token.shape != (B, T) or is_token.dtype != torch.bool):
        raise ValueError(
            f"adaptive_recursion: expected is_token {(B, T)} of bool, "
            f"got {tuple(is_token.shape)} of {is_token.dtype}."
        )
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "adaptive_recursion: expected no torch.compile (for generate() disable_compile=True), got one: a "
            "graph cannot ask after every step which tokens go on."
        )
    if wants_gradient(x, y, z, *flat_weights(weights)):
        raise RuntimeError(
            "adaptive_recursion: expected a call without gradient (torch.no_grad()), got one with: tokens "
            "that stop are for inference."
        )


def _cycle(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    block: "_AdaptiveBlock",
    halting: Halting,
    is_token: Tensor,
    steps: Tensor,
    order: "Order | None",
) -> tuple[Tensor, Tensor]:
    """(y, z) after one cycle, all [B T, D]; counts in `steps` [B T]."""
    y_and_x, watches_z, n = y + x, halting.watch == "latent", block.spec.num_recursion_steps
    answer: Tensor | None = None
    quiet = torch.zeros_like(steps)  # steps in a row without a change
    block.go_on(None)
    for step in range(1, n + 1):
        going, before = block.going, z if watches_z else answer
        z = _replaced(z, going, block.f("z", _of(z, going) + _of(y_and_x, going)))
        if not watches_z:
            answer = _replaced(answer, going, block.f("answer", _of(y, going) + _of(z, going)))
        steps += 1 if going is None else torch.zeros_like(steps).index_fill_(0, going, 1)
        if step == n:
            break
        goes_on = is_token & (steps == step)
        after = z if watches_z else answer
        if step > 1 and before is not None and after is not None:
            quiet = torch.where(_is_unchanged(before, after, halting.threshold), quiet + 1, 0)
            if step >= halting.min_steps:
                goes_on &= quiet < halting.patience
        if order is not None:
            goes_on = order.keep_waiting(goes_on, step) & is_token
        if not block.go_on(goes_on):
            break
    block.repeat_keys(n - step, *(("z",) if watches_z else ("z", "answer")))
    if answer is None:
        block.go_on(None)
        answer = block.f("answer", y + z)
    return answer, z


class Order:
    """Which tokens wait for others: those that attend to an active one."""

    def __init__(
        self, B: int, T: int, causal: bool, mask: Tensor | None, steps_before: Tensor | None
    ) -> None:
        self.B, self.T, self.causal = B, T, causal
        self.longest = None if steps_before is None or not steps_before.shape[1] else steps_before.amax(dim=1)
        self.visible: Tensor | None = None
        if mask is not None:
            if self.longest is not None or mask.shape[-1] != T:
                raise ValueError(
                    "adaptive_recursion: in_order expected a general mask without a cache, got one with: "
                    "which tokens its tokens wait for is not known. Halting(in_order=False) waits for none."
                )
            mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
            self.visible = mask if mask.ndim < 4 else mask.any(dim=1)  # [B, T, T], or what broadcasts to it

    def keep_waiting(self, goes_on: Tensor, step: int) -> Tensor:
        """[B T] bool: the tokens that are active after `step`, and those that attend to one of them."""
        waits = goes_on.view(self.B, self.T)
        if self.visible is not None:
            fewer = None
            while fewer is None or not torch.equal(fewer, waits):
                fewer, waits = waits, waits | (self.visible & waits[:, None, :]).any(dim=-1)
        elif self.causal:
            waits = waits.cummax(dim=1).values
        else:
            waits = waits.any(dim=1, keepdim=True).expand(-1, self.T)
        if self.longest is not None:
            waits = waits | (self.longest > step)[:, None]
        return waits.reshape(-1)


def _is_unchanged(before: Tensor, after: Tensor, threshold: float) -> Tensor:
    """[M] bool, for rows [M, D]."""
    before, after = wide(before), wide(after)
    return (after - before).norm(dim=-1) <= threshold * after.norm(dim=-1)


def _of(rows: Tensor, which: Tensor | None) -> Tensor:
    return rows if which is None else rows[which]


def _replaced(rows: Tensor | None, which: Tensor | None, new: Tensor) -> Tensor:
    if which is None or rows is None:
        return new
    return rows.index_copy(0, which, new)


def _of_sequences(inputs: AttentionInputs, sequences: Tensor) -> AttentionInputs:
    """The attention inputs of the sequences with these numbers."""

    def pick(t: Tensor) -> Tensor:
        return t[sequences] if t.shape[0] > 1 else t  # one row is all sequences'

    has_rows = inputs.mask is not None and inputs.mask.ndim == 4
    return inputs._replace(
        mask=pick(inputs.mask) if has_rows else inputs.mask,  # type: ignore[arg-type]
        key_mask=None if inputs.key_mask is None else inputs.key_mask[sequences],
        angles=None if inputs.angles is None else Angles(*map(pick, inputs.angles)),
    )


class _AdaptiveBlock:
    """f for the active tokens, and the keys and values that the stopped ones left.

    Attributes:
        going: [M] int64, the numbers of the active tokens, from 0 to B T - 1; None for all.
        computed: [B T] int64, evaluations of f so far.
    """

    def __init__(
        self,
        weights: Sequence[LayerWeights],
        spec: RecursionSpec,
        inputs: AttentionInputs,
        x: Tensor,
    ) -> None:
        self.weights, self.spec, self.update_cache = weights, spec, inputs.update_cache
        self.B, self.T = x.shape[:2]
        self.computed = torch.zeros(self.B * self.T, dtype=torch.int64, device=x.device)
        self.going: Tensor | None = None
        self._all, self._inputs = inputs, inputs
        self._sequences: Tensor | None = None  # numbers of those with an active token; None: all
        self._places: Tensor | None = None  # [M], of these tokens among the tokens of these sequences
        self._keeps: Tensor | None = None  # [sequences, 1, T, 1] bool: tokens whose keys stay as they are
        self._kept: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}  # keys and values [B, G, T, K] of all
        self._evaluation = 0

    def go_on(self, which: Tensor | None) -> bool:
        """Sets the active tokens [B T] bool, or all; returns whether there are any. Waits for the device."""
        self.going = self._sequences = self._places = self._keeps = None
        self._inputs = self._all
        if which is None:
            return True
        going = which.nonzero()[:, 0]
        if len(going) in (0, len(which)):
            return len(going) > 0
        of_sequences = which.view(self.B, self.T)
        sequences = of_sequences.any(dim=1).nonzero()[:, 0]
        places = which.new_zeros(self.B, dtype=torch.int64)
        places[sequences] = torch.arange(len(sequences), device=which.device)
        self.going = going
        self._places = places[going // self.T] * self.T + going % self.T
        self._keeps = ~of_sequences[sequences][:, None, :, None]
        if len(sequences) < self.B:
            self._sequences, self._inputs = sequences, _of_sequences(self._all, sequences)
        return True

    def f(self, kind: str, v: Tensor) -> Tensor:
        """f of the active tokens, [M, D].

        kind is "z" or "answer": of stopped tokens, the keys of their last evaluation of this kind are used.
        """
        v = v[None]
        for i, layer in enumerate(self.weights):
            attend = partial(self._attend, (kind, i))
            v = apply_layer(v, layer, attend, self._evaluation, self.spec.eps)
            self._evaluation += 1
        if self.going is None:
            self.computed += 1
        else:
            self.computed[self.going] += 1
        return v[0]

    def repeat_keys(self, steps: int, *kinds: str) -> None:
        """Pads the cache for skipped steps."""
        for _ in range(steps):
            for kind in kinds:
                for i in range(len(self.weights)):
                    if self.update_cache is not None:
                        self.update_cache(self._evaluation, *self._kept[kind, i])
                    self._evaluation += 1

    def _attend(self, slot: tuple[str, int], evaluation: int, qkv: Tensor) -> Tensor:
        """o [1, M, H K] of qkv [1, M, (H + 2G) K]."""
        sequences = self.B if self._sequences is None else len(self._sequences)
        if self._places is None:
            rows = qkv[0]
        else:  # queries of stopped tokens are zero
            rows = qkv.new_zeros(sequences * self.T, qkv.shape[2]).index_copy_(0, self._places, qkv[0])
        update = partial(self._update, slot, evaluation)
        o = attend_to(rows.view(sequences, self.T, -1), self.spec, self._inputs, update).flatten(0, 1)
        return (o if self._places is None else o[self._places])[None]

    def _update(self, slot: tuple[str, int], evaluation: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [sequences, G, S, K] of all tokens so far, after the new ones were added."""
        if self._keeps is not None:
            k, v = map(self._with_kept, (k, v), self._kept[slot])
        self._kept[slot] = k, v
        if self.update_cache is not None:
            k, v = self.update_cache(evaluation, k, v)
        return (k, v) if self._sequences is None else (k[self._sequences], v[self._sequences])

    def _with_kept(self, new: Tensor, kept: Tensor) -> Tensor:
        """Those of all tokens, from those of the sequences that have an active token."""
        assert self._keeps is not None
        if self._sequences is None:
            return torch.where(self._keeps, kept, new)
        return kept.index_copy(0, self._sequences, torch.where(self._keeps, kept[self._sequences], new))
