"""TRM, the module: the weights of the recursive block under the names of the TRM paper's code.

Classic TRM (puzzles): not causal, `y` and `z` passed in and returned, `mlp_t` if wanted. Inside a
language model: causal, with positions, a mask and a cache. The loop itself is `recursion/recursion.py`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trm_kernels.modules.checks import (
    check_choices,
    check_halting,
    check_inputs,
    check_numbers,
    check_sizes,
    check_token_mixer,
)
from trm_kernels.modules.layers import TRMLayer, default_intermediate_size
from trm_kernels.ops.attention.rope import Angles
from trm_kernels.recursion.adaptive import Adapted, Halting, Waiting, adaptive_evaluations, run_adaptive
from trm_kernels.recursion.injection import run_injection
from trm_kernels.recursion.inputs import Attend, AttentionInputs, EvaluationCache
from trm_kernels.recursion.quantize import dequantize_layers, quantize_layers
from trm_kernels.recursion.recursion import run_recursion
from trm_kernels.recursion.spec import RecursionSpec
from trm_kernels.recursion.weights import InjectionPoint, InjectionWeights, LayerWeights
from trm_kernels.runtime.autocast import compute_dtype
from trm_kernels.runtime.gemm_common import wants_gradient

# attributes of a TRM that say how it runs its weights; a call may be given a spec with others
_OF_SPEC = (
    "num_heads",
    "num_key_value_heads",
    "num_recursion_steps",
    "num_cycles",
    "grad_cycles",
    "causal",
    "rope_theta",
    "eps",
    "attention",
    "save",
    "regime",
    "quantize",
    "cache",
)


class TRM(nn.Module):
    """A Tiny Recursive Model: `num_layers` post-norm layers, applied to their own state again and again.

    Source: "Less is More: Recursive Reasoning with Tiny Networks", arXiv 2510.04871.

    Args:
        hidden_size: D, the width of x, y and z.
        num_heads: H; D is a multiple of it.
        num_layers: Layers in f.
        num_key_value_heads: G; H is a multiple of it. Default H.
        intermediate_size: The MLP's inner width; default 8/3 D rounded up to a multiple of 256.
        num_recursion_steps: n, updates of z in a cycle (the paper's L_cycles); a call may choose another.
        num_cycles: T, updates of y (the paper's H_cycles).
        grad_cycles: How many of the last cycles are differentiated; None for all.
        causal: Whether no token attends to a later one.
        rope_theta: RoPE's base; None for no positions.
        mlp_t: Whether a SwiGLU over the token axis mixes tokens instead of attention; needs seq_len.
        seq_len: Tokens in every input; with mlp_t only.
        eps: Added to the mean of squares in every norm.
        attention: One of rope_attention's implementations.
        save: What is kept for backward: "auto", "all", "layer" or "step"; see trm_recursion.
        regime: How a call without gradient is launched: "auto", "per_op", "one_launch" or "per_phase"; see
            trm_recursion. A call with a gradient is launched per op.
        quantize: None, "int8" or "fp8": the matrices in 8 bits, see recursion/quantize.py; for calls without
            gradient only. The copies are made anew when a matrix has changed.
        cache: Which keys and values of a token later ones attend to: "all" or "last", see
            recursion/in_order.py; "last" is causal, goes token after token, and keeps as much whatever n is.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: When the numbers cannot be combined, with what was expected and what came.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_layers: int = 2,
        *,
        num_key_value_heads: int | None = None,
        intermediate_size: int | None = None,
        num_recursion_steps: int = 6,
        num_cycles: int = 1,
        grad_cycles: int | None = 1,
        causal: bool = False,
        rope_theta: float | None = 10000.0,
        mlp_t: bool = False,
        seq_len: int | None = None,
        eps: float = 1e-5,
        attention: str = "auto",
        save: str = "auto",
        regime: str = "auto",
        quantize: str | None = None,
        cache: str = "all",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        key_value_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        check_sizes("TRM", hidden_size, num_heads, key_value_heads, num_layers, rope_theta is not None)
        check_token_mixer(mlp_t, seq_len, causal)
        check_numbers(intermediate_size, seq_len, rope_theta, eps)
        check_choices(attention, save, regime, quantize, cache)
        if cache == "last" and not causal:
            raise ValueError("TRM: cache 'last' expected causal, got tokens that see later ones.")

        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_key_value_heads = key_value_heads
        self.num_recursion_steps = num_recursion_steps
        self.num_cycles = num_cycles
        self.grad_cycles = grad_cycles
        self.causal = causal
        self.rope_theta = rope_theta
        self.seq_len = seq_len
        self.eps = eps
        self.attention = attention
        self.save = save
        self.regime = regime
        self.quantize = quantize
        self.cache = cache
        self._in_8_bits: tuple[Any, list[LayerWeights], list[LayerWeights]] | None = None  # (of what, ...)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = default_intermediate_size(hidden_size) if intermediate_size is None else intermediate_size
        self.layers = nn.ModuleList(
            TRMLayer(hidden_size, num_heads, key_value_heads, inner, seq_len, **factory)
            for _ in range(num_layers)
        )
        self.y_init = nn.Parameter(torch.empty(hidden_size, **factory))
        self.z_init = nn.Parameter(torch.empty(hidden_size, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial state of unit size, like everything a norm gives out. The matrices reset themselves."""
        nn.init.normal_(self.y_init)
        nn.init.normal_(self.z_init)

    @property
    def spec(self) -> RecursionSpec:
        """What the attributes say now: the spec of a call that is given no other."""
        return RecursionSpec(**{name: getattr(self, name) for name in _OF_SPEC})

    def evaluations(self, num_recursion_steps: int | None = None, halting: Halting | None = None) -> int:
        """The most evaluations of a layer in one call: with cache "all" the key/value slabs that are kept."""
        n = num_recursion_steps or self.num_recursion_steps
        return adaptive_evaluations(len(self.layers), n, self.num_cycles, halting)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        z: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        update_cache: EvaluationCache | None = None,
        num_recursion_steps: int | None = None,
        num_cycles: int | None = None,
        angles: Angles | None = None,
        halting: Halting | None = None,
        is_token: Tensor | None = None,
        steps_before: Tensor | None = None,
        report_steps: Callable[[Tensor, Tensor], None] | None = None,
        injection: InjectionWeights | None = None,
        strength: float = 1.0,
        spec: RecursionSpec | None = None,
        norms_x: bool = False,
        attend: Attend | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Runs the recursion; weights of another dtype are cast to x's for the call.

        With `injection` the call is a whole injection point, see recursion/injection.py: x is the language
        model's hidden state. It starts from y_init and z_init, and no token halts.

        Args:
            x: [B, T, D].
            y: [B, T, D], the answer to start from; None starts from y_init.
            z: [B, T, D], the latent state to start from; None starts from z_init.
            positions: [B, T] or [1, T] for RoPE, in tokens; None counts from 0.
            mask: General mask, see ops/attention/rope_attention.py.
            key_mask: [B, S] bool, False for keys that no query attends to.
            update_cache: Keeps keys and values, see recursion/inputs.py.
            num_recursion_steps: n for this call; None takes the spec's.
            num_cycles: T for this call; None takes the spec's. At most so many are differentiated.
            angles: rope_angles of the positions, for a caller with more than one call.
            halting: When a token stops before n, see recursion/adaptive.py; None: never.
            is_token: [B, T] bool, False for padding, for which no token waits; with halting.
            steps_before: [num_cycles, B, S], the steps of the tokens in the cache; with halting.
            report_steps: With halting, is called with steps [num_cycles, B, T] and evaluations of f [B, T].
            injection: The projections and the gate, in x's dtype.
            strength: With injection, the factor of what is added.
            spec: Of this call; None takes the module's attributes.
            norms_x: With injection, whether its x is normed, see ops/injection_in.py.
            attend: Does the attention of every evaluation, see recursion/inputs.py; not with halting.

        Returns:
            (y, z), each [B, T, D] in x's dtype, or in autocast's; with injection h', of x's shape and dtype.

        Raises:
            ValueError: For an x of other sizes, for what nothing would read (a mask with mlp_t, is_token
                without halting), or with halting for a regime of one launch.
            RuntimeError: With halting for a call with gradient or under torch.compile.
        """
        spec = self._spec_of(spec, num_recursion_steps, num_cycles)
        inputs = AttentionInputs(positions, angles, mask, key_mask, update_cache, attend)
        check_halting(halting, is_token=is_token, steps_before=steps_before, report_steps=report_steps)
        if halting is not None and attend is not None:
            raise ValueError("TRM: expected attend without halting, got both.")
        if injection is not None:
            assert y is z is halting is None and (positions is None) == (attend is not None)
            return self._inject(x, InjectionPoint(injection, strength, norms_x), spec, inputs)
        if halting is None:
            return self._cycles(spec, x, y, z, inputs)
        adapted = self._adapt(x, y, z, spec, inputs, halting, Waiting(is_token, steps_before))
        if report_steps is not None:
            report_steps(adapted.steps, adapted.evaluations)
        return adapted.y, adapted.z

    def _spec_of(
        self, spec: RecursionSpec | None, num_recursion_steps: int | None, num_cycles: int | None
    ) -> RecursionSpec:
        """The spec of a call; heads and causal are the module's."""
        spec = self.spec if spec is None else spec
        spec = spec if num_cycles is None else spec.of_cycles(num_cycles)
        n = spec.num_recursion_steps if num_recursion_steps is None else num_recursion_steps
        H, G = self.num_heads, self.num_key_value_heads
        return replace(spec, num_heads=H, num_key_value_heads=G, causal=self.causal, num_recursion_steps=n)

    def each_cycle(
        self,
        x: Tensor,
        y: Tensor | None = None,
        z: Tensor | None = None,
        *,
        num_recursion_steps: int | None = None,
        num_cycles: int | None = None,
        spec: RecursionSpec | None = None,
        **inputs: Any,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs the cycles one by one; a loss may be taken after each differentiated one.

        Gradients flow from each cycle to the one before. The last (y, z) are what a call returns, but for
        rounding.

        Args:
            x: [B, T, D].
            y: [B, T, D], as in a call.
            z: [B, T, D], as in a call.
            num_recursion_steps: n for this call; None takes the spec's.
            num_cycles: T for this call; None takes the spec's. At most so many are differentiated.
            spec: Of this call; None takes the module's attributes.
            inputs: Of a call, those that attention reads, but for update_cache.

        Yields:
            (y, z) after each differentiated cycle.
        """
        spec, given = self._spec_of(spec, num_recursion_steps, num_cycles), AttentionInputs(**inputs)
        passing = spec.differentiated_cycles
        if spec.cache == "last" and passing > 1:
            raise ValueError(
                "TRM: each_cycle expected cache 'all', got 'last': a token's first cycle reads what the "
                "tokens before it ended their last one with."
            )
        until_first = replace(spec, num_cycles=spec.num_cycles - passing + 1, grad_cycles=1)
        y, z = self._cycles(until_first, x, y, z, given)
        yield y, z
        for _ in range(passing - 1):
            y, z = self._cycles(replace(spec, num_cycles=1, grad_cycles=1), x, y, z, given)
            yield y, z

    def supervision_steps(
        self,
        x: Tensor | Callable[[], Tensor],
        steps: int,
        y: Tensor | None = None,
        z: Tensor | None = None,
        **arguments: Any,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs `steps` calls; each starts from the y and z of the one before, detached.

        Deep supervision as in the paper's figure 3: a loss, a backward and an optimizer step after each.

            for y, z in trm.supervision_steps(lambda: embed(puzzle), 16):
                loss(y).backward(); optimizer.step(); optimizer.zero_grad()

        Args:
            x: [B, T, D], or a function that makes it anew for each call. A function is needed where x has
                parameters of its own and the losses are not summed for one backward.
            steps: Calls.
            y: [B, T, D], as in a call.
            z: [B, T, D], as in a call.
            arguments: Of a call, but for update_cache.

        Yields:
            (y, z) after each call.

        Raises:
            ValueError: For less than one step, when the first is asked for.
        """
        if steps < 1:
            raise ValueError(f"TRM: supervision_steps expected steps of at least 1, got {steps}.")
        for _ in range(steps):
            y, z = self(x if isinstance(x, Tensor) else x(), y, z, **arguments)
            yield y, z
            y, z = y.detach(), z.detach()

    def _cycles(
        self, spec: RecursionSpec, x: Tensor, y: Tensor | None, z: Tensor | None, inputs: AttentionInputs
    ) -> tuple[Tensor, Tensor]:
        """The recursion with the module's weights."""
        y, z = self._start(x, y, z)
        weights = self._weights(compute_dtype(x), wants_gradient(x, *self.parameters()), spec.quantize)
        spec = _per_op_with_gradient(spec, wants_gradient(x, y, z, *self.parameters()))
        return run_recursion(x, y, z, *weights, spec, inputs)

    def _inject(
        self, h: Tensor, point: InjectionPoint, spec: RecursionSpec, inputs: AttentionInputs
    ) -> Tensor:
        """h' of an injection point with the module's weights."""
        has_gradient = wants_gradient(h, *self.parameters(), *point.weights)
        dtype = compute_dtype(h)
        weights = self._weights(dtype, has_gradient, spec.quantize)
        size = (*h.shape[:2], self.hidden_size)
        y, z = (t.to(dtype).expand(size) for t in (self.y_init, self.z_init))
        return run_injection(h, point, y, z, *weights, _per_op_with_gradient(spec, has_gradient), inputs)

    def _adapt(
        self,
        x: Tensor,
        y: Tensor | None,
        z: Tensor | None,
        spec: RecursionSpec,
        inputs: AttentionInputs,
        halting: Halting,
        waiting: Waiting,
    ) -> Adapted:
        """The recursion in which tokens stop by themselves, with the module's weights."""
        if spec.regime not in ("auto", "per_op"):
            raise ValueError(
                f"TRM: halting expected regime auto or per_op, got {spec.regime!r}: one launch cannot ask "
                "after every step which tokens go on."
            )
        if spec.cache == "last":
            raise ValueError("TRM: halting expected cache 'all', got 'last'.")
        y, z = self._start(x, y, z)
        dtype = compute_dtype(x)
        layers, scales = self._weights(dtype, wants_gradient(x, *self.parameters()), spec.quantize)
        layers = layers if scales is None else dequantize_layers(layers, scales, dtype)
        return run_adaptive(x, y, z, layers, spec, inputs, halting, waiting)

    def _start(self, x: Tensor, y: Tensor | None, z: Tensor | None) -> tuple[Tensor, Tensor]:
        """The state to start from. Errors: ValueError for an x of other sizes."""
        check_inputs(x, y, z, self.hidden_size, self.seq_len)
        return (
            self.y_init.to(compute_dtype(x)).expand_as(x) if y is None else y,
            self.z_init.to(compute_dtype(x)).expand_as(x) if z is None else z,
        )

    def _weights(
        self, dtype: torch.dtype, has_gradient: bool, quantize: str | None
    ) -> tuple[list[LayerWeights], list[LayerWeights] | None]:
        """The matrices in `dtype`; or in 8 bits, and their scales."""
        if quantize is None:
            return [layer(dtype) for layer in self.layers], None
        if has_gradient:
            raise RuntimeError(
                f"TRM: quantize={quantize!r} expected a call without gradient (torch.no_grad()), got "
                "one with: rounded weights cannot be trained."
            )
        known = self._in_8_bits
        if torch.compiler.is_compiling():
            if known is None or known[0][0] != quantize:
                raise RuntimeError(
                    f"TRM: quantize={quantize!r} expected one call before torch.compile, in which the "
                    "copies in 8 bits are made."
                )
            return known[1], known[2]
        versions = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.layers.parameters()]
        state = (quantize, versions)
        if known is None or known[0] != state:
            layers = [layer(next(layer.parameters()).dtype) for layer in self.layers]
            self._in_8_bits = known = (state, *quantize_layers(layers, quantize))
        return known[1], known[2]

    def load_reference_state_dict(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Loads a state dict of the TRM paper's code.

        `L_level.layers.{i}...` becomes `layers.{i}...`, `H_init` and `L_init` become `y_init` and `z_init`,
        whatever their prefix (`model.inner.`, `_orig_mod.`).

        Args:
            state_dict: Tensors by the paper's names.

        Returns:
            The keys that were not loaded (embeddings, heads), sorted.

        Raises:
            ValueError: When a weight is missing, comes twice or has another shape; nothing is loaded then.
        """
        wanted = self.state_dict()
        if state_dict.keys() == wanted.keys():
            raise ValueError(
                "load_reference_state_dict: expected the names of the paper's code, got this TRM's own, "
                "which load_state_dict loads."
            )
        ours, left_alone = {}, []
        for key, tensor in state_dict.items():
            name = _reference_name(key)
            if name is None:
                left_alone.append(key)
            elif name in ours:
                raise ValueError(f"load_reference_state_dict: expected {name} once, got it twice ({key}).")
            else:
                ours[name] = tensor
        for name in wanted.keys() | ours.keys():
            got = tuple(ours[name].shape) if name in ours else "no such tensor"
            expected = tuple(wanted[name].shape) if name in wanted else "no such tensor"
            if got != expected:
                raise ValueError(f"load_reference_state_dict: {name}: expected {expected}, got {got}.")
        self.load_state_dict(ours)
        return sorted(left_alone)


def _reference_name(key: str) -> str | None:
    """Our name of a tensor of the TRM paper's code; None for one that is not part of the recursion."""
    if found := re.search(r"(?:^|\.)L_level\.(layers\..+)$", key):
        return found[1]
    if found := re.search(r"(?:^|\.)(H|L)_init$", key):
        return {"H": "y_init", "L": "z_init"}[found[1]]
    return None


def _per_op_with_gradient(spec: RecursionSpec, has_gradient: bool) -> RecursionSpec:
    """A TRM's regime is for calls without gradient; one with a gradient is launched per op."""
    return replace(spec, regime="per_op") if has_gradient else spec
