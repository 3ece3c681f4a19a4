"""Logits only where a label counts: a model's head is given these places of the hidden state, and no others.

    labels [B, T], N of them counted  ->  hidden state [B, T, D] -> [1, N + 1, D]  ->  head  ->  loss

A vocabulary is large: the logits of a row and their gradient may cost more than all else in a training step.
The model's own forward goes on, with its own loss and what it does to its logits (a cap, a scale). It shifts
the labels by one: the first of N + 1 counts for nothing, and so does the last row of logits.

Where the logits of the N places would be too many as well, the loss comes from linear_cross_entropy, which
makes some at a time. That takes a model that leaves the head's logits as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from hybrid.data.collate import IGNORED
from hybrid.model.linear_cross_entropy import linear_cross_entropy
from hybrid.model.quantized_base import is_quantized_tensor

_LARGE = 2**14  # tokens in a vocabulary; the loss of a smaller one is always made at once
_MOST_LOGITS = 2**26  # of a forward: 256 MiB in float32, and as much for their gradient


class LabelledPlaces:
    """The head of `model`, or of the base inside a hybrid. A model without one stays as it is.

    Every process of a split model has to make it: with a large vocabulary it takes a forward of two tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._base: Any = getattr(model, "llm_model", model)
        self._head = self._base.get_output_embeddings()
        self._vocabulary = self._base.config.get_text_config(decoder=True).vocab_size
        self._goes_in_parts = self._vocabulary >= _LARGE and self._answers_with_its_heads_logits(model)

    @contextmanager
    def only(self, inputs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Within the block the model's loss of what this gives is that of `inputs`; its logits are others.

        inputs   {"input_ids": [B, T], "labels": [B, T], ...}: a label stands beside its own token
        """
        if self._head is None:
            yield inputs
            return
        labels = inputs["labels"]
        asked = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()  # of each token: what comes next
        places = (asked != IGNORED).nonzero()[:, 0]
        asked = F.pad(asked[places], (1, 0), value=IGNORED)
        given = inputs | {"labels": asked[None]}
        rows = _Rows(labels.numel(), F.pad(places, (0, 1)))
        if self._goes_in_parts and len(places) * self._vocabulary > _MOST_LOGITS:
            with self._loss_in_parts(rows):
                yield given
            return
        handle = self._head.register_forward_pre_hook(lambda head, args: (rows.of(args[0]), *args[1:]))
        try:
            yield given
        finally:
            handle.remove()

    @contextmanager
    def _loss_in_parts(self, rows: "_Rows") -> Iterator[None]:
        """The head makes two rows of logits, for the model's forward to go on; the loss needs none."""
        found: list[Tensor] = []

        def keep(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            found.append(rows.of(args[0]))
            return (found[0][:, :2].detach(), *args[1:])

        def loss(logits: Tensor, labels: Tensor, *_: Any, **__: Any) -> Tensor:
            h, target = found[0][:, :-1], labels[:, 1:]
            return linear_cross_entropy(
                h.flatten(0, 1), self._head.weight, self._head.bias, target.flatten().to(h.device)
            )

        handle = self._head.register_forward_pre_hook(keep)
        self._base.loss_function = loss
        try:
            yield
        finally:
            handle.remove()
            del self._base._loss_function

    @torch.no_grad()
    def _answers_with_its_heads_logits(self, model: PreTrainedModel) -> bool:
        """Whether the model's logits are what its head answers, and its loss is the usual one."""
        is_offloaded = hasattr(self._head, "_hf_hook")  # its weight is there during its forward only
        has_usual_loss = self._base.loss_function is ForCausalLMLoss
        # an adapter's or a quantized one's class is another
        is_linear = type(self._head) is nn.Linear and not is_quantized_tensor(self._head.weight)
        if not is_linear or is_offloaded or not has_usual_loss:
            return False
        found: list[Tensor] = []
        was_training = model.training
        handle = self._head.register_forward_hook(lambda head, args, logits: found.append(logits))
        try:
            tokens = torch.arange(2, device=model.device)[None]
            logits = model.eval()(input_ids=tokens, use_cache=False).logits
        finally:
            handle.remove()
            model.train(was_training)
        return len(found) == 1 and torch.equal(found[0].float(), logits.float())


class _Rows:
    """Which rows of a hidden state are asked for."""

    def __init__(self, tokens: int, places: Tensor) -> None:
        self.tokens, self.places = tokens, places

    def of(self, h: Tensor) -> Tensor:
        """[A, N + 1, D] of h [A B, T, D]: with deep supervision there are A answers for each token."""
        if h.ndim != 3 or h.shape[0] * h.shape[1] % self.tokens:
            raise ValueError(
                f"train: expected a head that is given the hidden state of all {self.tokens} tokens, "
                f"got one of shape {list(h.shape)}."
            )
        return h.view(-1, self.tokens, h.shape[2])[:, self.places.to(h.device)]
