"""How good a language model is at a text: its loss per token, without training."""

import math
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import PreTrainedModel

_IGNORED = -100  # a label that is no token, in transformers and in torch


@dataclass(frozen=True)
class TextLoss:
    """The loss over a text.

    nats     the sum of -ln p(token | the tokens before it), natural logarithm
    tokens   how many tokens were predicted
    """

    nats: float
    tokens: int

    def __add__(self, other: "TextLoss") -> "TextLoss":
        return TextLoss(self.nats + other.nats, self.tokens + other.tokens)

    @property
    def per_token(self) -> float:
        """Nats per token; NaN for no tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """e to the loss per token: among how many equally likely tokens the model is lost."""
        return math.exp(min(self.per_token, 700.0))


@torch.no_grad()
def text_loss(
    model: PreTrainedModel, data: Dataset, batch_size: int, num_recursion_steps: int | None = None
) -> TextLoss:
    """The loss of `model` over every item of `data`, in its order; the model's mode is put back.

    data                  map-style; items {"input_ids": [T] int64, "labels": [T] int64}, -100 = not counted
    batch_size            items in one forward
    num_recursion_steps   a hybrid's n; None takes its config's
    """
    steps = {} if num_recursion_steps is None else {"num_recursion_steps": num_recursion_steps}
    was_training = model.training
    model.eval()
    total = TextLoss(0.0, 0)
    try:
        for batch in DataLoader(data, batch_size=batch_size, collate_fn=default_collate):
            batch = {name: t.to(model.device) for name, t in batch.items()}
            # a model shifts the labels by one: the first of a row is predicted by nothing
            tokens = int((batch["labels"][:, 1:] != _IGNORED).sum())
            if tokens:
                loss = model(**batch, use_cache=False, **steps).loss
                total += TextLoss(loss.item() * tokens, tokens)
    finally:
        model.train(was_training)
    return total
