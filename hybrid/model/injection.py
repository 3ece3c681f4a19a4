"""One injection point: projection in, recursion, blend back; and what all points of one forward share."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from hybrid.config import HybridConfig
from hybrid.config_checks import TRM_DTYPES
from hybrid.model.cache import InjectionCache, keeps_steps
from hybrid.model.cache_name import takes_cache
from hybrid.model.call_in_progress import CallInProgress
from hybrid.model.masks import Visible
from hybrid.serving.paged_keys import PagedInjectionKeys, PagedKeys
from trm_kernels import TRM, injection_blend, injection_in
from trm_kernels.modules.layers import Matrix
from trm_kernels.ops.attention.rope import Angles
from trm_kernels.recursion.adaptive import Halting, adaptive_evaluations
from trm_kernels.recursion.spec import RecursionSpec
from trm_kernels.recursion.weights import InjectionWeights
from trm_kernels.runtime.autocast import compute_dtype
from trm_kernels.runtime.backend import backend


@dataclass
class InjectionCall:
    """What all injection points of one forward share; settled once, in HybridModel.forward."""

    positions: Tensor  # [B, T] or [1, T], in tokens
    angles: Angles | None  # RoPE's table of them; None where each injection makes it in its own launch
    visible: Visible
    cache: Cache | PagedKeys | None
    spec: RecursionSpec  # of this forward, whatever the config is set to before its backward
    strength: float
    norms_x: bool  # trm_input_norm
    # of this forward: autograd's threads, which repeat checkpointed parts of it, have chosen none
    backend: str
    halting: Halting | None = None
    is_token: Tensor | None = None  # [B, T] bool, with halting; None: all are
    answers: int = 1  # of the last injection point, stacked along the batch; more than one: deep supervision
    done: int = 0  # injections so far
    steps: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # with halting, what each point reported
    added: list[Tensor] | None = None  # is given how much each point added to each token, if somebody asks


# The call in progress in this thread; None means that the language model runs by itself.
current_call = CallInProgress("trm_hybrid_call")


def _set_on_the_config(field: str) -> Any:
    """An attribute that shows a field of the hybrid's config, and is not set but there."""

    def read(module: Any) -> Any:
        return getattr(module.config, field)

    def refuse(module: Any, value: Any) -> None:
        if value != read(module):
            raise ValueError(
                f"HybridModel: expected {field} to be set on model.config, which is saved, for all injection "
                f"points; got {value!r} on one {type(module).__name__}."
            )

    return property(read, refuse)


class InjectedTRM(TRM):
    """A TRM whose settings are the hybrid's config's."""

    num_recursion_steps = _set_on_the_config("num_recursion_steps")
    num_cycles = _set_on_the_config("num_cycles")
    grad_cycles = _set_on_the_config("grad_cycles")
    rope_theta = _set_on_the_config("trm_rope_theta")
    eps = _set_on_the_config("trm_rms_norm_eps")
    attention = _set_on_the_config("trm_attention")
    save = _set_on_the_config("trm_save")
    regime = _set_on_the_config("trm_regime")
    quantize = _set_on_the_config("trm_quantize")
    cache = _set_on_the_config("trm_cache")

    def __init__(self, config: HybridConfig, **factory: Any) -> None:
        self.config = config
        spec = config.recursion_spec
        super().__init__(
            config.trm_hidden_size,
            spec.num_heads,
            config.trm_num_layers,
            num_key_value_heads=spec.num_key_value_heads,
            intermediate_size=config.trm_intermediate_size,
            num_recursion_steps=spec.num_recursion_steps,
            num_cycles=spec.num_cycles,
            grad_cycles=spec.grad_cycles,
            causal=spec.causal,
            rope_theta=spec.rope_theta,
            eps=spec.eps,
            attention=spec.attention,
            save=spec.save,
            regime=spec.regime,
            quantize=spec.quantize,
            cache=spec.cache,
            **factory,
        )


class Injection(GradientCheckpointingLayer):
    """h' = h + injection_strength * gate * (y W_out^T), with y the TRM's answer to x = rms(h) W_in^T
    or, with trm_input_norm, to rms(x).

    hidden_size          D, the language model's width
    first_cache_layer    the cache's layer of evaluation 0 is first_cache_layer + index * evaluations
    index                which injection point this is, from 0
    """

    strength = _set_on_the_config("injection_strength")
    eps = _set_on_the_config("trm_rms_norm_eps")

    def __init__(
        self, config: HybridConfig, hidden_size: int, first_cache_layer: int, index: int, device: torch.device
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": TRM_DTYPES[config.trm_dtype]}
        d = config.trm_hidden_size
        self.first_cache_layer = first_cache_layer
        self.index = index
        self.config = config
        self.in_proj = Matrix(d, hidden_size, **factory)
        self.recursion = InjectedTRM(config, **factory)
        self.out_proj = Matrix(hidden_size, d, **factory)
        if config.blending_strategy == "gated":
            self.gate_weight = nn.Parameter(torch.empty(1, d, **factory))
            self.gate_bias = nn.Parameter(torch.empty(1, **factory))
        self.is_last = index == len(config.injection_layers) - 1
        self.is_gated = config.blending_strategy == "gated"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W_out and the gate's score start at zero: a fresh hybrid is its base, the gate half open."""
        nn.init.zeros_(self.out_proj.weight)
        if self.is_gated:
            nn.init.zeros_(self.gate_weight)
            nn.init.zeros_(self.gate_bias)

    @takes_cache
    def forward(
        self,
        h: Tensor,
        positions: Tensor,
        angles: Angles | None,
        visible: Visible,
        spec: RecursionSpec,
        strength: float,
        backend_name: str,
        halting: Halting | None = None,
        is_token: Tensor | None = None,
        steps: list[tuple[Tensor, Tensor]] | None = None,
        each_cycle: bool = False,
        norms_x: bool = False,
        past_key_values: Cache | PagedKeys | None = None,
    ) -> Tensor:
        """h' [B, T, D] in h's dtype and on its device; weights are cast to it for the call.

        spec, strength      how the TRM runs, and the factor of what is added
        halting, is_token   see trm_kernels/recursion/adaptive.py
        steps               with halting, is added to: the call's (steps, evaluations)
        each_cycle   h' [C B, T, D] with the answers of the C cycles that pass gradients, the last at the end

        The cache comes as a keyword because gradient checkpointing takes it away by its name.
        """
        mask, key_mask, num_keys = visible
        update_cache: Any = self._keys_in(past_key_values, spec, halting, num_keys)

        def report(taken: Tensor, evaluations: Tensor) -> None:
            if update_cache is not None:
                update_cache.keep_steps(taken)
            if steps is not None:
                steps.append((taken, evaluations))

        # a traced graph keeps the backend in force while it is traced
        with nullcontext() if torch.compiler.is_compiling() else backend(backend_name):
            dtype = compute_dtype(h)
            w_in, w_out = self.in_proj().to(dtype), self.out_proj().to(dtype)
            gate = (self.gate_weight.to(dtype), self.gate_bias.to(dtype)) if self.is_gated else ()
            given: dict[str, Any] = {"positions": positions, "angles": angles}
            given |= {"mask": mask, "key_mask": key_mask, "spec": spec}
            if halting is None and not each_cycle:
                given |= {"injection": InjectionWeights(w_in, w_out, *gate), "strength": strength}
                given["norms_x"] = norms_x
                return self.recursion(h, update_cache=update_cache, **given)
            x = injection_in(h, w_in, spec.eps, norms_x=norms_x)
            if each_cycle:
                ys = [y for y, _ in self.recursion.each_cycle(x, **given)]
            else:
                y, _ = self.recursion(
                    x,
                    update_cache=update_cache,
                    halting=halting,
                    is_token=is_token,
                    steps_before=None if update_cache is None else update_cache.steps_before(h.device),
                    report_steps=report,
                    **given,
                )
                ys = [y]
            blended = [injection_blend(h, y, w_out, strength, *gate) for y in ys]
            return torch.cat(blended) if each_cycle else blended[0]

    def _keys_in(
        self,
        cache: Cache | PagedKeys | None,
        spec: RecursionSpec,
        halting: Halting | None,
        num_keys: int | None,
    ) -> InjectionCache | PagedInjectionKeys | None:
        """This point's part of a cache."""
        if cache is None:
            return None
        evaluations = trm_evaluations(self.config, spec, halting)
        if isinstance(cache, PagedKeys):
            return cache.of_injection(self.index, evaluations)
        first = self.first_cache_layer + self.index * (evaluations + keeps_steps(halting))
        steps_layer = first + evaluations if keeps_steps(halting) else None
        return InjectionCache(cache, first, num_keys, steps_layer)


def trm_evaluations(config: HybridConfig, spec: RecursionSpec, halting: Halting | None) -> int:
    """Evaluations of a layer in one call of one TRM whose keys are kept, the most: the layers of a cache."""
    if halting is None:
        return spec.slabs(config.trm_num_layers)
    n, num_cycles = spec.num_recursion_steps, spec.num_cycles
    return adaptive_evaluations(config.trm_num_layers, n, num_cycles, halting)
