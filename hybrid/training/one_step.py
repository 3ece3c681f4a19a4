"""One step of training: forward -> loss -> backward -> clip -> optimizer, over the batches of one process."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from hybrid.data.collate import IGNORED
from hybrid.model.hybrid_model import HybridModel
from hybrid.model.labelled_places import LabelledPlaces
from hybrid.training import shard
from hybrid.training.batches import Batch, Share
from hybrid.training.hidden_states import HiddenStates
from hybrid.training.optimizer import set_rate
from hybrid.training.processes import seed_everything
from hybrid.training.settings import TrainSettings

_ROUNDING = 1  # beside (seed, step, rank): a separate random stream


class Taken(NamedTuple):
    """What came of a step, the same on every process.

    loss        float32 scalar, the mean over the tokens of all processes
    grad_norm   of all gradients, before clipping
    tokens      in the batches of all processes
    is_good     loss and gradient are numbers; else the optimizer did nothing
    """

    loss: Tensor
    grad_norm: Tensor
    tokens: int
    is_good: bool


class OneStep:
    """The steps of a run, one a call.

    parallel_model   `model`, or what accelerate made of it; its forward is called
    share            of a step, over all that is trained on
    keep_share       of what is not to be forgotten; None: there is none
    hidden_states    caches for the data and for what is kept; none: all layers compute
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parallel_model: Any,
        optimizer: Optimizer,
        accelerator: Accelerator,
        settings: TrainSettings,
        share: Share,
        keep_share: Share | None,
        hidden_states: list[HiddenStates],
    ) -> None:
        self.hybrid = model if isinstance(model, HybridModel) else None
        self.parallel_model, self.optimizer, self.accelerator = parallel_model, optimizer, accelerator
        self.settings, self.share, self.keep_share = settings, share, keep_share
        self.hidden_states = hidden_states
        self.labelled_places = LabelledPlaces(model)

    def take(self, index: int, batches: list[Batch], kept: list[Batch]) -> Taken:
        """Step `index`, from 0; every process calls it.

        kept   batches of what is not to be forgotten, whose mean weighs keep_ratio of it
        """
        settings, accelerator = self.settings, self.accelerator
        seed_everything(settings.seed, index, accelerator.process_index)
        steps = {}
        if self.hybrid is not None and self.hybrid.config.recursion_sampling == "uniform":
            steps["num_recursion_steps"] = self.hybrid.draw_recursion_steps(index)
        if self.hybrid is not None and settings.recursion_curriculum is not None:
            self.hybrid.training_depth = settings.recursion_curriculum.at(index)
        set_rate(self.optimizer, settings.rate_at(index))

        given = [
            {name: t.to(accelerator.device) for name, t in batch.inputs.items()} for batch in batches + kept
        ]
        weights = self._weights(given[: len(batches)])
        if self.keep_share is not None:
            of_keep = self.keep_share.items_per_step / self.share.items_per_step
            weights = [weight * (1 - of_keep) for weight in weights]
            weights += [weight * of_keep for weight in self._weights(given[len(batches) :])]
        lower_layers = [self._lower_layers(batch, is_kept=False) for batch in batches]
        lower_layers += [self._lower_layers(batch, is_kept=True) for batch in kept]
        still = range(len(batches), len(given)) if settings.keep_target == "base" else ()
        loss = torch.zeros((), device=accelerator.device)
        for number, inputs in enumerate(given):
            with self._gradients_meet(number == len(given) - 1), lower_layers[number]:
                loss_of = self._stillness if number in still else self._loss
                part = loss_of(inputs, steps) * weights[number]
                accelerator.backward(part)
            loss += part.detach()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = shard.whole(torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm))
        loss = accelerator.reduce(loss, "mean")
        # both are the same on every process, so that all of them take the step or none does
        if is_good := math.isfinite(loss.item()) and math.isfinite(grad_norm.item()):
            if settings.stochastic_rounding:
                # parts of a split model are rounded apart, copies of a whole one stay equal
                rank = accelerator.process_index if settings.shard else 0
                seed_everything(settings.seed, index, rank, _ROUNDING)
            self.optimizer.step()
        self.optimizer.zero_grad()

        tokens = sum(inputs["input_ids"].numel() for inputs in given)
        return Taken(loss, grad_norm, tokens * accelerator.num_processes, is_good)

    def _loss(self, inputs: dict[str, Tensor], steps: dict[str, int]) -> Tensor:
        with self.labelled_places.only(inputs) as asked:
            loss: Tensor = self.parallel_model(**asked, use_cache=False, **steps).loss
        return loss

    def _stillness(self, inputs: dict[str, Tensor], steps: dict[str, int]) -> Tensor:
        """How much the injections add to the tokens of `inputs`, in the mean over points and tokens."""
        assert self.hybrid is not None
        inputs = {name: t for name, t in inputs.items() if name != "labels"}
        with self.hybrid.recording_what_is_added() as added:
            self.parallel_model(**inputs, use_cache=False, logits_to_keep=1, **steps)
        is_token = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).to(added[0].device)
        of_tokens = [(t * is_token.to(t.device)).sum() / is_token.sum().to(t.device) for t in added]
        return torch.stack([t.to(added[0].device) for t in of_tokens]).mean()

    def _weights(self, batches: list[dict[str, Tensor]]) -> list[Tensor]:
        """Each batch's share of the tokens that are predicted in those of all processes."""
        # a model shifts the labels by one: the first of a row is predicted by nothing
        predicted = [(batch["labels"][:, 1:] != IGNORED).sum() for batch in batches]
        none = torch.zeros((), dtype=torch.int64, device=self.accelerator.device)
        # gradients are averaged over the processes, so that each token weighs the same
        all_predicted = self.accelerator.reduce(sum(predicted, none), "sum") / self.accelerator.num_processes
        return [tokens / all_predicted for tokens in predicted]

    def _gradients_meet(self, together: bool) -> AbstractContextManager[Any]:
        """Whether this backward averages the gradients over the processes, or only adds to this one's."""
        if self.settings.shard:
            self.parallel_model.set_requires_gradient_sync(together)
            return nullcontext()
        return nullcontext() if together else self.accelerator.no_sync(self.parallel_model)

    def _lower_layers(self, batch: Batch, is_kept: bool) -> AbstractContextManager[Any]:
        """Whether this forward and backward compute the layers below the first injection point."""
        return self.hidden_states[is_kept].around(batch) if self.hidden_states else nullcontext()
