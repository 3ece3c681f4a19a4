"""Deep supervision of a hybrid: the loss is the mean over several answers of the last injection point.

What is above that point runs on one row for each answer, and labels are repeated for them; what a forward
gives back is of the last answer. Which cycles' answers: HybridConfig.supervised_answers.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from hybrid.model.injection import InjectionCall
from hybrid.model.injection_points import repeat_for_answers

if TYPE_CHECKING:
    from hybrid.model.hybrid_model import HybridModel


def answers_of(hybrid: "HybridModel", labels: Tensor | None, is_recorded: bool) -> int:
    """How many answers of the last injection point the loss of this forward is over.

    is_recorded   what is added to each token is recorded, and may be all that the loss is made of

    Errors: ValueError where the loss is made elsewhere, of what is one answer.
    """
    if labels is None and not is_recorded:
        check_labels(hybrid, "a forward without labels")
    is_supervised = hybrid.is_injecting and hybrid.training and labels is not None
    return hybrid.config.supervised_answers if is_supervised else 1


def check_labels(hybrid: "HybridModel", got: str) -> None:
    """Refuse a forward without labels where something is to learn by a loss that the model alone can make."""
    is_learning = hybrid.training and torch.is_grad_enabled()
    if is_learning and hybrid.is_injecting and hybrid.config.supervised_answers > 1:
        raise ValueError(
            "HybridModel: deep_supervision expected the loss to be the model's own, over several answers, so "
            f"labels in each training forward, got {got}. A trainer's label smoothing and loss functions "
            "keep the labels from the model: leave them out, or set config.deep_supervision = False, which "
            "trains on the last answer. Where nothing is to learn, torch.no_grad() or eval()."
        )


def repeat_rows(
    hybrid: "HybridModel", call: InjectionCall, answers: int, labels: Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """Prepare a forward for a row for each answer; its labels, and in `kwargs` what the loss is made with.

    Errors: ValueError for a call with a cache.
    """
    if call.cache is not None:
        raise ValueError("HybridModel: deep_supervision expected no cache in training, got one.")
    repeat_for_answers(hybrid.llm_model, hybrid.config.injection_layers[-1])
    call.answers = answers
    if (shifted := kwargs.get("shift_labels")) is not None:
        kwargs["shift_labels"] = torch.cat([shifted] * answers)
    if (of_batch := kwargs.get("num_items_in_batch")) is not None:  # the loss is a sum over so many
        kwargs["num_items_in_batch"] = of_batch * answers
    return None if labels is None else torch.cat([labels] * answers)


def of_last_rows(output: CausalLMOutputWithPast, rows: int) -> CausalLMOutputWithPast:
    """What belongs to the last answer, of an output that has `rows` rows for each."""
    if output.logits is not None:
        output.logits = output.logits[-rows:]
    for name in ("hidden_states", "attentions"):
        if (of_layers := getattr(output, name, None)) is not None:
            setattr(output, name, tuple(None if t is None else t[-rows:] for t in of_layers))
    return output
