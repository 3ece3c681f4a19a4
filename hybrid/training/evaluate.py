"""How good a language model is at a text: its loss per token, without training."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybrid.data.collate import IGNORED, collate
from hybrid.training.batches import count


@dataclass(frozen=True)
class TextLoss:
    """The loss over a text.

    nats     the sum of -ln p(token | the tokens before it), natural logarithm
    tokens   how many tokens were predicted
    right    of how many the likeliest token was the label
    rows     in how many items it was that of all labels, and there were any
    """

    nats: float
    tokens: int
    right: int = 0
    rows: int = 0

    def __add__(self, other: "TextLoss") -> "TextLoss":
        nats, tokens = self.nats + other.nats, self.tokens + other.tokens
        return TextLoss(nats, tokens, self.right + other.right, self.rows + other.rows)

    @property
    def per_token(self) -> float:
        """Nats per token; NaN for no tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """e to the loss per token: among how many equally likely tokens the model is lost."""
        return math.exp(min(self.per_token, 700.0))

    @property
    def accuracy(self) -> float:
        """The share of the tokens that were the likeliest of all; NaN for no tokens."""
        return self.right / self.tokens if self.tokens else math.nan


@torch.no_grad()
def text_loss(model: PreTrainedModel, data: Dataset, batch_size: int) -> TextLoss:
    """The loss of `model` over every item of `data`, in its order; the model's mode is put back.

    data         map-style; items {"input_ids": [T] int64, "labels": [T] int64}, -100 = not counted; those of
                 one forward are padded to the longest
    batch_size   items in one forward
    """
    was_training = model.training
    model.eval()
    total = TextLoss(0.0, 0)
    try:
        for batch in DataLoader(data, batch_size=batch_size, collate_fn=collate):
            batch = {name: t.to(model.device) for name, t in batch.items()}
            # a model shifts the labels by one: the first of a row is predicted by nothing
            labels = batch["labels"][:, 1:]
            tokens = int((labels != IGNORED).sum())
            output = model(**batch, use_cache=False)  # also of no tokens: others may be waiting in it
            if tokens:
                is_right, counts = output.logits[:, :-1].argmax(-1) == labels, labels != IGNORED
                rows = int(((is_right | ~counts).all(1) & counts.any(1)).sum())
                total += TextLoss(output.loss.item() * tokens, tokens, int(is_right.sum()), rows)
    finally:
        model.train(was_training)
    return total


@torch.no_grad()
def text_loss_of_all(model: PreTrainedModel, data: Dataset, batch_size: int) -> TextLoss:
    """text_loss of all of `data`, of which each process takes a part; every process calls it."""
    processes = PartialState()
    mine = _PartOfRank(data, processes.process_index, processes.num_processes)
    return sum(gather_object([text_loss(model, mine, batch_size)]), start=TextLoss(0.0, 0))


class _PartOfRank(Dataset):
    """One process's part of `data`; all parts are of one length, as all have to call a split model equally.

    What is missing to that is an item of which no token counts.
    """

    def __init__(self, data: Dataset, rank: int, processes: int) -> None:
        self.data, self.rank, self.processes = data, rank, processes

    def __len__(self) -> int:
        return -(-count(self.data) // self.processes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = index * self.processes + self.rank
        if number < count(self.data):
            return self.data[number]
        filler = self.data[0]
        return filler | {"labels": torch.full_like(filler["labels"], IGNORED)}


def check_separate(model: PreTrainedModel) -> None:
    """See that documents in one sequence do not look at each other where position ids start again.

    Errors: ValueError where they do: some families and attention implementations pass position ids over.
    """
    was_training = model.training
    model.eval()
    try:
        tokens = torch.arange(1, 17, device=model.device)[None].repeat(2, 1)
        positions = torch.arange(8, device=model.device).repeat(2)[None].expand(2, -1)
        one = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, 8:].float()
        tokens[:, :8] += 1
        other = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, 8:].float()
    finally:
        model.train(was_training)
    if not (one - other).abs().max() <= 1e-3 * one.abs().max():
        base = getattr(model, "llm_model", model)
        raise ValueError(
            f"expected a model in which documents can be separate, got {type(base).__name__} with attention "
            f"by {base.config._attn_implementation}, which passes over position ids that start again: "
            "--documents joined lets them look at each other."
        )


# of lm-eval's results: what is said of a task, and is no measure of the model
_OF_A_TASK = {"name", "alias", "sample_len", "sample_count"}


def task_results(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    batch_size: int,
    apply_chat_template: bool = False,
) -> dict[str, dict[str, Any]]:
    """task -> measure -> value, as lm-eval gives them.

    tasks                names, or paths of YAML files
    apply_chat_template  a question is what a user says, rendered by the tokenizer's chat template

    Errors: ValueError when lm-eval is not installed, or has no such task, and for a template that is missing.
    """
    if apply_chat_template and not tokenizer.chat_template:
        raise ValueError(
            "eval: expected a tokenizer with a chat template for --apply-chat-template, got one without; "
            "--chat-template gives it one."
        )
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise ValueError(
            "eval: expected lm-eval for --tasks (pip install 'trm-hybrid[eval]'), got no such package."
        ) from None
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = lm_eval.simple_evaluate(model=wrapped, tasks=tasks, apply_chat_template=apply_chat_template)
        return {
            task: {name: value for name, value in measures.items() if name not in _OF_A_TASK}
            for task, measures in found["results"].items()
        }
    except KeyError as error:  # how it says that there is no such task
        if not (unknown := [task for task in tasks if repr(task) in str(error)]):
            raise
        raise ValueError(f"eval: expected --tasks that lm-eval has, got {unknown[0]!r}.") from error
