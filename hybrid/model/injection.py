"""One injection point: projection in, recursion, blend back; and the hooks that call it.

A TRM is a child module of the decoder layer it follows (`layer.trm`; `layer.trm_before` for point 0,
on the embeddings), and a forward hook on that layer hands it the hidden state. So the language model
keeps its class, its parameter names and its checkpoints. The hooks are functions of this module: a
closure would point at the original after a deepcopy.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from hybrid.config import HybridConfig
from hybrid.config_checks import TRM_DTYPES
from hybrid.config_values import count_parameters
from hybrid.model.cache import InjectionCache, keeps_steps
from hybrid.model.cache_name import CACHE_NAME, takes_cache
from hybrid.model.call_in_progress import CallInProgress
from hybrid.model.masks import Visible
from hybrid.model.trm_names import INJECTION_NAMES
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


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The language model's decoder layers: the shallowest list of as many modules as it has layers.

    They are of one class; where no list has one class alone (Jamba's layers have two), of several.

    Errors: ValueError when there is no such list, or more than one.
    """
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.get_decoder().named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    lists = [(name, found) for name, found in lists if len({type(layer) for layer in found}) == 1] or lists
    depth = min((name.count(".") for name, _ in lists), default=0)
    shallowest = [module for name, module in lists if name.count(".") == depth]
    if len(shallowest) != 1:
        raise ValueError(
            f"HybridModel: expected one list of {num_layers} decoder layers in {type(model).__name__}, "
            f"got {len(shallowest)}."
        )
    return shallowest[0]


def attach(model: PreTrainedModel, config: HybridConfig) -> None:
    """Make one Injection per point a child of its decoder layer, and hook it in."""
    text_config = model.config.get_text_config(decoder=True)
    layers = decoder_layers(model)
    _check_memory(model, config, text_config.hidden_size)
    for index, point in enumerate(config.injection_layers):
        layer = layers[max(point - 1, 0)]
        injection = Injection(
            config, text_config.hidden_size, text_config.num_hidden_layers, index, _execution_device(layer)
        )
        injection.train(model.training)
        if point == 0:
            layer.trm_before = injection
            layer.register_forward_pre_hook(_before_layer, with_kwargs=True)
        else:
            layer.trm = injection
            layer.register_forward_hook(_after_layer)


@contextmanager
def taken_out(model: PreTrainedModel) -> Iterator[list[Injection]]:
    """Within the block the layers are without their injections, which are given."""
    places = _places(model)
    for layer, name, _ in places:
        delattr(layer, name)
    try:
        yield [injection for _, _, injection in places]
    finally:
        for layer, name, injection in places:
            setattr(layer, name, injection)


def _places(model: PreTrainedModel) -> list[tuple[nn.Module, str, Any]]:
    """(layer, name in it, injection) of all injections, in the order of the layers' parts."""
    return [
        (layer, name, part)
        for layer in decoder_layers(model)
        for name, part in layer.named_children()
        if name in INJECTION_NAMES
    ]


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`: no hook and no module of ours is left in the language model."""
    ours = {_before_layer, _after_layer, _for_each_answer}
    for layer in decoder_layers(model):
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in ours]:
                del hooks[key]
                layer._forward_pre_hooks_with_kwargs.pop(key, None)
    for layer, name, _ in _places(model):
        delattr(layer, name)


def _check_memory(model: PreTrainedModel, config: HybridConfig, hidden_size: int) -> None:
    """Refuse TRMs that no memory of this machine holds, before any is asked for. Errors: ValueError."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        has = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "cpu" and hasattr(os, "sysconf"):
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    one = count_parameters(
        config.trm_hidden_size,
        config.trm_num_heads,
        config.trm_num_key_value_heads,
        config.trm_num_layers,
        config.trm_intermediate_size,
    )
    count = (one + 2 * hidden_size * config.trm_hidden_size) * len(config.injection_layers)
    needs = count * TRM_DTYPES[config.trm_dtype].itemsize
    if needs > has:
        raise ValueError(
            f"HybridModel: expected TRMs that fit into the {has / 2**30:.1f} GiB of {device.type}, got "
            f"{count:,} parameters, {needs / 2**30:.1f} GiB."
        )


def repeat_for_answers(model: PreTrainedModel, last_point: int) -> None:
    """See that the layers above the last injection point take a row for each answer of deep supervision."""
    for layer in decoder_layers(model)[last_point:]:
        if _for_each_answer not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_for_each_answer, with_kwargs=True)


def keep_call_in_checkpoints(model: nn.Module) -> None:
    """Let every layer that is recomputed in backward see the call its forward saw.

    Newer transformers checkpoint a layer's forward, and our hook runs outside of that, once. Older ones
    (5.17) checkpoint the whole call, hooks included: the hook runs again in backward, after the call is over.
    """
    if "__call__" not in vars(GradientCheckpointingLayer):
        return
    module: Any
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None and getattr(checkpoint, "func", None) is not _checkpoint_in_call:
            module._gradient_checkpointing_func = partial(_checkpoint_in_call, checkpoint)


def _checkpoint_in_call(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    call = current_call.get()

    def in_call(*args: Any) -> Any:
        before = current_call.set(call)
        try:
            return function(*args)
        finally:
            current_call.reset(before)

    return checkpoint(in_call, *args)


def _after_layer(layer: Any, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, tuple):  # falcon, bloom: (hidden state, ...)
        return (_inject(layer.trm, output[0]), *output[1:])
    return _inject(layer.trm, output)


def _before_layer(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if args:
        return (_inject(layer.trm_before, args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": _inject(layer.trm_before, kwargs["hidden_states"])}


def _for_each_answer(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Above the last injection point there are several rows for one: repeat masks and positions for them."""
    call = current_call.get()
    if call is None or call.answers == 1:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]

    def repeated(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(repeated(part) for part in value)
        if isinstance(value, dict):
            return {name: repeated(part) for name, part in value.items()}
        if value is hidden or value is None or isinstance(value, bool | int | float | str):
            return value
        rows = len(hidden) // call.answers
        if not isinstance(value, Tensor) or (value.ndim > 1 and len(value) not in (1, rows)):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"HybridModel: deep_supervision expected what {type(layer).__name__} is given to be numbers "
                f"or tensors of {rows} rows, got {got}: with this language model and attention the last "
                "injection point has to be after the last layer."
            )
        return value if value.ndim < 2 or len(value) < rows else torch.cat([value] * call.answers)

    return repeated(args), repeated(kwargs)


def _inject(injection: nn.Module, h: Tensor) -> Tensor:
    call = current_call.get()
    if call is None:
        return h
    call.done += 1
    blended = injection(
        h,
        call.positions.to(h.device),
        None if call.angles is None else Angles(*(t.to(h.device) for t in call.angles)),
        call.visible.to(h.device),
        call.spec,
        call.strength,
        call.backend,
        call.halting,
        None if call.is_token is None else call.is_token.to(h.device),
        call.steps,
        call.answers > 1 and bool(injection.is_last),
        call.norms_x,
        **{CACHE_NAME: call.cache},
    )
    if call.added is not None:
        call.added.append(_share_added(h, blended))
    return blended


def _share_added(h: Tensor, blended: Tensor) -> Tensor:
    """|h' - h|^2 / |h|^2 of every token, [B, T] float32."""
    h, blended = h.float(), blended.float()
    return (blended - h).pow(2).sum(-1) / h.pow(2).sum(-1).clamp(min=torch.finfo(torch.float32).tiny)


def _execution_device(layer: nn.Module) -> torch.device:
    """Where `layer` computes: its parameters' device, or where an offloading hook brings them."""
    for module in layer.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(layer.parameters()).device
