"""The two training phases: what is trainable, in which precision, at which rate.

Phase 1 trains the TRMs beside a frozen language model, phase 2 everything together. The choice is made
once, before the loop begins; the loop trains whatever requires gradients.
"""

import warnings
from dataclasses import dataclass, replace

import torch

from hybrid.model.hybrid_model import HybridModel
from hybrid.model.quantized_base import is_quantized


@dataclass(frozen=True)
class Phase:
    """One phase of training.

    number          1 or 2
    learning_rate   AdamW's, where none is given
    trains_base     whether the language model's own parameters learn too
    """

    number: int
    learning_rate: float
    trains_base: bool


PHASES = {
    1: Phase(number=1, learning_rate=1e-4, trains_base=False),
    2: Phase(number=2, learning_rate=1e-5, trains_base=True),
}


def enter(model: HybridModel, number: int) -> Phase:
    """Make `model` ready for a phase: choose what requires gradients, and a precision that can learn.

    Parameters that would train in float16 are brought to float32, with one warning: a plain AdamW on
    float16 weights was seen to reach NaN within 20 steps. A frozen float16 base stays as it is.

    Errors: ValueError for a phase that there is not, or that would train a quantized base.
    """
    if number not in PHASES:
        raise ValueError(f"enter: expected a phase of {', '.join(map(str, PHASES))}, got {number!r}.")
    phase = PHASES[number]
    if model.config.lora_rank is not None:  # learns in the base's place
        phase = replace(phase, trains_base=False)
    if phase.trains_base and is_quantized(model.llm_model):
        raise ValueError(
            f"enter: expected a base in float32 or bfloat16 for phase {number}, which trains it, "
            "got a quantized one. Phase 1 trains the TRMs beside it, and with lora_rank also LoRA on it."
        )
    model.freeze_base()
    if phase.trains_base:
        model.requires_grad_(True)
    _bring_to_float32(model, phase)
    return phase


def _bring_to_float32(model: HybridModel, phase: Phase) -> None:
    halves = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if not halves:
        return
    warnings.warn(
        f"Phase {phase.number} trains {len(halves)} float16 tensors ({halves[0]}, ...), and AdamW on float16 "
        "weights reaches NaN within steps: they are brought to float32, at twice the memory.",
        stacklevel=3,
    )
    if phase.trains_base:
        model.float()  # buffers too
    else:
        for parameter in model.trm_parameters():
            parameter.data = parameter.data.float()
    model.config.set_trm_dtype(torch.float32)
