"""patch_reference_trm: the fused recursion inside a model of the TRM paper's code, in one line

    patch = patch_reference_trm(model)      # `patch.undo()`, or `with patch_reference_trm(model): ...`

That code calls its reasoning module `L_level` from Python, H_cycles (L_cycles + 1) times a step. What can be
fused is the loop around it, so it is the forward of the module that holds `L_level` that is replaced:

    x = _input_embeddings(...);  z_H, z_L = trm_recursion(x, z_H, z_L, ...);  lm_head(z_H), q_head(z_H)

z_H is y and z_L is z; H_cycles is num_cycles, of which the last is differentiated; L_cycles is
num_recursion_steps; both are read at every call. `L_level` stays where it is and keeps the weights:
parameters, their names and an optimiser's state do not change. Hooks on `L_level` and below no longer run.
Patch before `torch.compile`; a forward that was compiled already is compiled again.

Errors   ValueError when there is no such module inside, or more than one; when it holds what the recursion
         does not compute; when its forward and the one that replaces it differ on random numbers, outputs or
         gradients (reference_trial.py, tried when patching). It says what differs; nothing is patched then.
Source   "Less is More: Recursive Reasoning with Tiny Networks", arXiv 2510.04871, figure 3; the names are
         those of its code, github.com/SamsungSAILMontreal/TinyRecursiveModels.
"""

import inspect
from dataclasses import replace
from types import MethodType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from trm_kernels.modules.reference_trial import what_differs
from trm_kernels.recursion.recursion import trm_recursion
from trm_kernels.recursion.weights import AttentionWeights, LayerWeights, SwiGLUWeights

_EXPECTED = ("L_level", "_input_embeddings", "lm_head", "q_head", "puzzle_emb_len", "config")
_CONFIG = ("H_cycles", "L_cycles", "rms_norm_eps", "rope_theta", "seq_len", "hidden_size")


class patch_reference_trm:  # noqa: N801  used like a function, as torch.no_grad is
    """Replaces the recursion inside a model, until `undo()` or the end of a `with` block.

    Args:
        model: The paper's model, or a module around it: its ACT wrapper, its loss head.

    Raises:
        ValueError: When the recursion in it is not one that can be replaced; nothing is patched then.
    """

    def __init__(self, model: nn.Module) -> None:
        self.inner = _find(model)
        _check(self.inner)
        # a bound method, so that a deep copy (for a moving average of the weights) runs on its own weights
        self.inner.forward = MethodType(_forward, self.inner)

    def undo(self) -> None:
        """Restores the forward of the paper's code; a second call does nothing."""
        self.inner.__dict__.pop("forward", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def _forward(inner: Any, carry: Any, batch: dict[str, Tensor]) -> tuple[Any, Tensor, tuple[Tensor, Tensor]]:
    """(carry, logits [B, T - puzzle_emb_len, V], (q of halting [B], q of going on [B])), as in that code."""
    x = inner._input_embeddings(batch["inputs"], batch["puzzle_identifiers"])
    z_H, z_L = _recursion(inner, x, carry.z_H, carry.z_L, inner.config.L_cycles, inner.config.H_cycles)
    logits = inner.lm_head(z_H)[:, inner.puzzle_emb_len :]
    q = inner.q_head(z_H[:, 0]).float()
    return replace(carry, z_H=z_H.detach(), z_L=z_L.detach()), logits, (q[..., 0], q[..., 1])


def _recursion(
    inner: Any, x: Tensor, y: Tensor, z: Tensor, num_recursion_steps: int, num_cycles: int
) -> tuple[Tensor, Tensor]:
    layers = inner.L_level.layers
    attention = getattr(layers[0], "self_attn", None)
    return trm_recursion(
        x,
        y,
        z,
        [_weights(layer, x.dtype) for layer in layers],
        num_heads=attention.num_heads if attention is not None else 1,
        num_key_value_heads=attention.num_key_value_heads if attention is not None else 1,
        num_recursion_steps=num_recursion_steps,
        num_cycles=num_cycles,
        grad_cycles=1,
        causal=attention is not None and attention.causal,
        rope_theta=inner.config.rope_theta if hasattr(inner, "rotary_emb") else None,
        eps=inner.config.rms_norm_eps,
    )


def _weights(layer: Any, dtype: torch.dtype) -> LayerWeights:
    """The layer's own parameters, cast for the call as its own modules cast them."""
    mlp = SwiGLUWeights(layer.mlp.gate_up_proj.weight.to(dtype), layer.mlp.down_proj.weight.to(dtype))
    if hasattr(layer, "mlp_t"):
        mixer = layer.mlp_t
        return LayerWeights(
            SwiGLUWeights(mixer.gate_up_proj.weight.to(dtype), mixer.down_proj.weight.to(dtype)), mlp
        )
    mixer = layer.self_attn
    return LayerWeights(AttentionWeights(mixer.qkv_proj.weight.to(dtype), mixer.o_proj.weight.to(dtype)), mlp)


def _find(model: nn.Module) -> nn.Module:
    """The one module that holds `L_level`."""
    found = [module for module in model.modules() if "L_level" in module._modules]
    if len(found) != 1:
        raise _error(
            f"one module with L_level (the inner model of the TRM paper's code) in {type(model).__name__}",
            len(found),
        )
    return found[0]


def _check(inner: Any) -> None:
    """Refuse what the recursion does not compute."""
    name = type(inner).__name__
    if "forward" in vars(inner):
        raise _error(f"{name} with the forward of its class", "one patched before")
    if hasattr(inner, "H_level"):
        raise _error(f"{name} with L_level alone (TRM)", "H_level too (HRM)")
    lacking = [part for part in _EXPECTED if not hasattr(inner, part)]
    lacking += [f"config.{field}" for field in _CONFIG if not hasattr(getattr(inner, "config", None), field)]
    if lacking:
        raise _error(f"{name} of the TRM paper's code", f"one without {', '.join(lacking)}")
    layers = list(getattr(inner.L_level, "layers", ()))
    if not layers or len({hasattr(layer, "mlp_t") for layer in layers}) != 1:
        raise _error("layers that all have self_attn or all have mlp_t", f"{len(layers)} layers, not so")
    for layer in layers:
        mixer = (
            ("mlp_t.gate_up", "mlp_t.down") if hasattr(layer, "mlp_t") else ("self_attn.qkv", "self_attn.o")
        )
        wanted = {f"{part}_proj.weight" for part in (*mixer, "mlp.gate_up", "mlp.down")}
        if (names := {name for name, _ in layer.named_parameters()}) != wanted:
            raise _error(f"layers with the parameters {sorted(wanted)}", sorted(names))
    accepted = list(inspect.signature(type(inner).forward).parameters)[1:]
    if accepted != ["carry", "batch"]:
        raise _error(f"{name}.forward of (carry, batch)", f"one of ({', '.join(accepted)})")
    if difference := what_differs(inner, type(inner).forward, _forward):
        raise _error(f"the forward of {name} to compute what the patched one does", difference)


def _error(expected: str, got: object) -> ValueError:
    return ValueError(f"patch_reference_trm: expected {expected}, got {got}.")
