"""How often recursion_sampling="uniform" has drawn, kept in the state of transformers' Trainer.

A resumed run goes on counting, whatever Trainer wraps the hybrid in and however it writes the weights: by
PEFT, DeepSpeed or FSDP. registration.py brings it among the callbacks that every Trainer begins with.
"""

from typing import Any

from torch import nn
from transformers import trainer
from transformers.trainer_callback import TrainerCallback

from hybrid.model.hybrid_model import HybridModel
from hybrid.training.depth import check_curriculum
from trm_kernels.modules.curriculum import RecursionCurriculum


def _hybrid_in(model: nn.Module | None) -> HybridModel | None:
    """The hybrid, whatever Trainer wraps it in."""
    parts = () if model is None else model.modules()
    return next((part for part in parts if isinstance(part, HybridModel)), None)


class KeepDraws(TrainerCallback):
    """Does nothing where there is no hybrid inside of the model."""

    def __init__(self) -> None:
        self._hybrid: HybridModel | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        self._hybrid = _hybrid_in(model)
        if self._hybrid is None:
            return
        self._hybrid.training_depth = None  # a training that an error ended left its own
        if (kept := state.stateful_callbacks.get(type(self).__name__)) is not None:
            self._hybrid.draws = kept["attributes"]["draws"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """In the form in which Trainer keeps what callbacks know."""
        if self._hybrid is not None and self._hybrid.draws:
            attributes = {"draws": self._hybrid.draws}
            state.stateful_callbacks[type(self).__name__] = {"args": {}, "attributes": attributes}


class DeepenRecursion(TrainerCallback):
    """A recursion that begins shallow: `Trainer(..., callbacks=[DeepenRecursion(curriculum)])`.

    The depth is a function of `state.global_step`, so a resumed training goes on at the depth where it was.

    Errors: ValueError at the beginning of the training, for a model without a hybrid inside, and as
    check_curriculum says.
    """

    def __init__(self, curriculum: RecursionCurriculum) -> None:
        self.curriculum = curriculum
        self._hybrid: HybridModel | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        self._hybrid = _hybrid_in(model)
        if self._hybrid is None:
            raise ValueError(f"DeepenRecursion: expected a HybridModel inside, got {type(model).__name__}.")
        check_curriculum(self.curriculum, self._hybrid.config)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._hybrid is not None
        self._hybrid.training_depth = self.curriculum.at(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._hybrid is not None
        self._hybrid.training_depth = None


def add_to_every_trainer() -> None:
    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    if KeepDraws not in callbacks:
        callbacks.append(KeepDraws)
