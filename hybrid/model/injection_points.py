"""Where the injections of a language model are: found, put in, taken out; and the hooks that call them.

A TRM is a child module of the decoder layer it follows (`layer.trm`; `layer.trm_before` for point 0,
on the embeddings), and a forward hook on that layer hands it the hidden state. So the language model
keeps its class, its parameter names and its checkpoints. Hooks that the layer came with run before it,
as they complete what the layer answers, but for those of output_hidden_states, which note what the next
layer reads. Our hooks are functions of this module: a closure would point at the original after a deepcopy.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import output_capturing

from hybrid.config import HybridConfig
from hybrid.config_checks import TRM_DTYPES
from hybrid.config_values import count_parameters
from hybrid.model.cache_name import CACHE_NAME
from hybrid.model.injection import Injection, current_call
from hybrid.model.trm_names import INJECTION_NAMES
from trm_kernels.ops.attention.rope import Angles


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
            _let_recorders_run_last(layer)


def _let_recorders_run_last(layer: nn.Module) -> None:
    """transformers' own hooks, which the first call with output_hidden_states gave the layer."""
    for key, hook in list(layer._forward_hooks.items()):
        if getattr(hook, "__module__", None) == output_capturing.__name__:
            layer._forward_hooks[key] = layer._forward_hooks.pop(key)


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
    ours = _before_layer, _after_layer, _for_each_answer
    for layer in decoder_layers(model):
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key in [key for key, hook in hooks.items() if any(hook is one for one in ours)]:
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
