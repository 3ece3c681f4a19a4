"""What is said once in training: float16 that learns, and a TRM that does not while something else does."""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hybrid.model.injection import Injection
from hybrid.model.trm_names import is_injection_name


class TrainingWarnings:
    """The warnings that one model has given already; `look` gives those that are due."""

    def __init__(self) -> None:
        self._float16 = self._frozen = False

    def look(self, model: nn.Module, inputs: Tensor, is_injecting: bool) -> None:
        """Look at which parameters of `model` learn; nothing in evaluation, without gradient, or compiling.

        inputs   ids [B, T], or embeddings [B, T, D], which may come from something that learns
        """
        if not (model.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return
        if not self._float16 and (name := _learning_in_float16(model)):
            self._float16 = True
            warnings.warn(
                f"HybridModel: training float16 parameters ({name}, ...): a plain AdamW was seen to "
                "reach NaN within 20 steps. Keep them in float32 or bfloat16, or freeze them.",
                stacklevel=4,
            )
        if not self._frozen and is_injecting and (name := _trm_left_out(model, inputs)):
            self._frozen = True
            warnings.warn(
                f"HybridModel: the TRM {name} learns nothing in this training, as all its parameters are "
                "frozen. PEFT freezes what its config does not name: with point 0 "
                'LoraConfig(..., modules_to_save=["trm", "trm_before"]), else with "trm" alone, it learns '
                "beside the adapter; without PEFT, after freeze_base(). If it is meant to stay as it is, all "
                "is well.",
                stacklevel=4,
            )


def _learning_in_float16(model: nn.Module) -> str | None:
    """The name of a parameter that does."""
    learning = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return next((name for name, p in learning if p.dtype == torch.float16), None)


def _trm_left_out(model: nn.Module, inputs: Tensor) -> str | None:
    """The name of a TRM that is frozen whole, in a forward from which something learns."""
    frozen = (name for name, point in _points(model) if not _learns(point))
    name = next(frozen, None)
    return name if name is not None and (inputs.requires_grad or _learns(model)) else None


def _points(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What stands at each injection point, and its name: a TRM, or PEFT's wrapper of it and its copies."""
    for name, module in model.named_modules():
        if is_injection_name(name) and any(isinstance(part, Injection) for part in module.modules()):
            yield name, module


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
