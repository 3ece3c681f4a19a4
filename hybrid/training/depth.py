"""How deep the recursion of a training step runs: a RecursionCurriculum on a hybrid

The loop and trainer_callback.py set `hybrid.training_depth` before each step, from the step's number alone,
which both keep in their checkpoints. Forwards in eval mode have the config's depth throughout.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from hybrid.config import HybridConfig
from hybrid.model.hybrid_model import HybridModel
from trm_kernels.modules.curriculum import RecursionCurriculum


def check_model(curriculum: RecursionCurriculum | None, model: PreTrainedModel) -> None:
    """Refuse a curriculum for a model without a recursion, and as check_curriculum does."""
    if curriculum is None:
        return
    if not isinstance(model, HybridModel):
        raise ValueError(f"train: a recursion_curriculum expected a HybridModel, got {type(model).__name__}.")
    check_curriculum(curriculum, model.config)


@contextmanager
def full_depth_afterwards(model: PreTrainedModel) -> Iterator[None]:
    """Whatever ends the run, the model's next training forward has the config's n and T."""
    try:
        yield
    finally:
        if isinstance(model, HybridModel):
            model.training_depth = None


def check_curriculum(curriculum: RecursionCurriculum, config: HybridConfig) -> None:
    """Refuse a curriculum that does not end at the config's n and T, or that says what the config says too.

    Errors: ValueError, with what was expected and what came.
    """
    last = (config.num_recursion_steps, config.num_cycles)
    if tuple(curriculum.last) != last:
        raise ValueError(
            f"train: expected a recursion_curriculum that ends at the config's num_recursion_steps and "
            f"num_cycles, {last[0]} and {last[1]}, got {curriculum.last[0]} and {curriculum.last[1]}."
        )
    if config.recursion_sampling != "fixed":
        raise ValueError(
            "train: expected a recursion_curriculum or recursion_sampling='uniform', got both: each says "
            "how many steps the recursion has."
        )
    if curriculum.first.num_cycles < config.supervised_answers:
        raise ValueError(
            "train: with deep_supervision a recursion_curriculum expected a first T of at least "
            f"{config.supervised_answers}, the answers of the loss, got {curriculum.first.num_cycles}."
        )
