"""What autograd keeps for backward, counted: the model runs its own forward on tensors without memory.

On the meta device a forward of a 70B takes a second. The TRMs run as their Triton kernels would on a GPU, or
as the reference does on a CPU; the language model's attention keeps what flash attention keeps (queries,
keys, values, the output and one float32 a row), where its family goes through transformers' attention
interface.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from hybrid.model.hybrid_model import HybridModel
from hybrid.model.injection import Injection
from trm_kernels.runtime.launch import record

ATTENTION = "trm_plan"
# older transformers (5.17) checkpoint a layer together with its hooks, so with the TRM after it
_NESTED = "__call__" in vars(GradientCheckpointingLayer)
_ARCH = "sm90"  # whose launch settings are recorded; what is kept does not depend on it


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd holds between forward and backward, parameters and buffers left out.

    everything     without gradient checkpointing
    checkpointed   with it: what enters each layer and each TRM, and what lies outside of them
    by_layer       of what a single layer keeps, the most
    by_trm         of what a single TRM keeps, the most
    """

    everything: int
    checkpointed: int
    by_layer: int
    by_trm: int

    @property
    def largest(self) -> int:
        return max(self.by_layer, self.by_trm)


def storages_kept(run: Callable[[], Any], own: Iterable[Tensor]) -> list[Tensor]:
    """One tensor for each storage that autograd holds after `run`, besides those of the tensors in `own`."""
    kept = _Storages(_addresses(own))
    with kept.watching():
        _ = run()
    return list(kept.found.values())


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the whole storages of these tensors."""
    return sum(t.untyped_storage().nbytes() for t in tensors)


def kept_by_step(model: HybridModel, batch_size: int, sequence_length: int, is_fused: bool = True) -> Kept:
    """What a training step of a model on the meta device keeps.

    is_fused   the TRMs run as Triton kernels; else as the reference
    """
    own = _addresses([*model.parameters(), *model.buffers()])
    units = _Units(own)
    outside = _Storages(own)
    ids = torch.zeros(batch_size, sequence_length, dtype=torch.long, device="meta")
    with _each_unit(model, units), record(_ARCH) if is_fused else nullcontext(), outside.watching():
        masks = _masks(model, batch_size, sequence_length)
        loss = model.train()(input_ids=ids, attention_mask=masks, labels=ids, use_cache=False).loss
    del loss
    return Kept(
        everything=nbytes((outside.found | units.kept.found).values()) + units.bytes_inside,
        checkpointed=nbytes((outside.found | units.entering.found).values()),
        by_layer=units.most[False],
        by_trm=units.most[True],
    )


def _masks(model: HybridModel, B: int, T: int) -> dict[str, Tensor | None] | None:
    """Ready masks for attention that needs them: what makes them reads positions, and here are none."""
    if model.llm_model.config._attn_implementation == ATTENTION:
        return None
    return {"base": torch.zeros(B, 1, T, T, dtype=model.dtype, device="meta"), "trm": None}


@dataclass
class _Inside:
    """What one unit keeps: bytes of its own making, and which of the tensors that enter it."""

    bytes_made: int
    entering_kept: list[bool]
    has_gradient: bool


class _Units:
    """Stands in for the checkpoints of layers and TRMs: notes what goes in and what is kept inside.

    Units of equal parameters and inputs keep equally much, so only the first of them runs.
    """

    def __init__(self, own: set[int]) -> None:
        self.own = own
        self.entering, self.kept = _Storages(own), _Storages(own)  # tensors that enter: all, those kept
        self.bytes_inside = 0
        self.most = {True: 0, False: 0}  # bytes that one keeps, by whether it is a TRM
        self._known: dict[Any, _Inside] = {}
        self._running: list[bool] = []  # of each unit that runs now: whether one inside of it has a gradient

    def __call__(self, layer: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
        leaves = tree_leaves((args, getattr(function, "keywords", {})))
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        flags = [leaf for leaf in leaves if isinstance(leaf, bool)]  # whether it answers each cycle
        key = (type(layer), *map(_kind, layer.parameters()), *map(_kind, tensors), *flags)
        if _NESTED and any(isinstance(m, Injection) for m in layer.modules()):
            key = (layer,)
        unit = self._known.get(key)
        if unit is None:
            unit, out = self._run(tensors, function, args)
            if isinstance(out, Tensor) and out.shape == args[0].shape:
                self._known[key] = unit
        else:
            out = torch.empty_like(args[0]) if not args[0].requires_grad else args[0].clone()
            out = out.requires_grad_() if unit.has_gradient and out.is_leaf else out
        if unit.has_gradient:  # else backward does not come here
            kept = [t for t, is_kept in zip(tensors, unit.entering_kept, strict=True) if is_kept]
            entering = tensors
            if self._running:  # of a checkpoint inside of another the arguments are computed anew, too
                self._running[-1] = True
                entering = [t for t in tensors if not any(t is arg for arg in args)]
            for t in entering:
                self.entering.add(t)
            for t in kept:
                self.kept.add(t)
            self.bytes_inside += unit.bytes_made
            is_trm = isinstance(layer, Injection)
            entered = nbytes({a: t for a, t in _by_address(kept).items() if a not in self.own}.values())
            self.most[is_trm] = max(self.most[is_trm], unit.bytes_made + entered)
        return out

    def _run(
        self, tensors: list[Tensor], function: Callable[..., Any], args: tuple[Any, ...]
    ) -> tuple[_Inside, Any]:
        inside = _Storages(self.own)
        self._running.append(False)
        with inside.watching():
            out = function(*args)
        has_gradient = self._running.pop() or bool(inside.found)
        entering = _addresses(tensors)
        made = [t for address, t in inside.found.items() if address not in entering]
        entering_kept = [t.untyped_storage()._cdata in inside.found for t in tensors]
        return _Inside(nbytes(made), entering_kept, has_gradient), out


def _kind(t: Tensor) -> tuple[Any, ...]:
    return (t.shape, t.dtype, t.requires_grad)


def _by_address(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    return {t.untyped_storage()._cdata: t for t in tensors}


def _addresses(tensors: Iterable[Tensor]) -> set[int]:
    return set(_by_address(tensors))


class _Storages:
    """Storages by address, each once, but for those at some addresses."""

    def __init__(self, own: set[int]) -> None:
        self._own = own
        self.found: dict[int, Tensor] = {}

    def add(self, t: Tensor) -> Tensor:
        if (address := t.untyped_storage()._cdata) not in self._own:
            self.found[address] = t  # held, so that its address is not given to another
        return t

    def watching(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.add, lambda t: t)


@contextmanager
def _each_unit(model: HybridModel, units: _Units) -> Iterator[None]:
    """Every layer and TRM is called through `units`, as with gradient checkpointing."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(units, layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = False


def _flash(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Shapes of flash attention; PyTorch's own would choose attention by plain products on meta tensors."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, *_ = flash(query, key, value, 0.0, True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _flash)
