"""What is measured of an arm that has learned a task, on texts that were held out."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evidence_real.arms import Arm
from evidence_real.cached import Part
from evidence_real.tasks import Task
from hybrid import HybridModel
from hybrid.demo.real.questions import NOTHING, AskedText
from hybrid.demo.real.training import Model

N = (1, 2, 4, 8, 12, 16)  # recursion steps at inference
GENERATED = 20  # texts for each question at the end
_ROWS = 32


def rounded(shares: list[float]) -> list[float]:
    return [round(share, 4) for share in shares]


class Measures:
    """All measures of one model. parts: of the task; texts: of ordinary text."""

    def __init__(self, model: Model, task: Task, parts: dict[str, Part], texts: dict[str, Part]) -> None:
        self.model, self.task, self.parts, self.texts = model, task, parts, texts

    @torch.no_grad()
    def right(self, part: Part, n: int | None = None, among: Tensor | None = None) -> Tensor:
        """[N, T]: 1 where the likeliest token is the answer, 0 where not, NaN where nothing is asked.

        among   the tokens, sorted, that are looked at; None: all
        """
        found = []
        head = self.model.head if among is None else self.model.head[among]
        for rows in torch.arange(len(part["ids"])).split(_ROWS):
            h = part[f"h{self.model.layer}"][rows] if self.model.layer else None
            asked = part["asked"][rows]
            _, states = self.model.last_states(part["ids"][rows], h, n)
            right = torch.full(asked.shape, torch.nan)
            is_asked = asked != NOTHING
            likeliest = (states[is_asked] @ head.T).argmax(-1)
            likeliest = likeliest if among is None else among[likeliest]
            right[is_asked] = (likeliest == asked[is_asked]).float()
            found.append(right)
        return torch.cat(found)

    def by_moves(self, n: int | None = None, among_answers: bool = False) -> list[float]:
        """Accuracy after move 1, 2, ...: held-out games that go on beyond the training's length.

        among_answers   the likeliest of the task's answers counts, not of all tokens
        """
        part = self.parts["longer"]
        among = part["asked"][part["asked"] != NOTHING].unique() if among_answers else None
        right = self.right(part, n, among)
        answers = right[~right.isnan()].view(len(right), -1)
        return rounded(answers.mean(0)[:-1].tolist())  # the last is the question at the end

    def closing(self, n: int | None = None) -> list[float]:
        """Accuracy of each question at the end, games of the training's lengths."""
        shares = []
        for number in range(len(self.task.closings)):
            right = self.right(self.parts[f"closing {number}"], n)
            last = (~right.isnan()).cumsum(1).argmax(1)
            shares.append(right[torch.arange(len(right)), last].mean().item())
        return rounded(shares)

    @torch.no_grad()
    def generated(self, tokenizer: Any, texts: dict[int, list[AskedText]]) -> list[float]:
        """The share of texts that `generate` goes on with the right answer, for each question at the end.

        The base computes in float32 here, and nothing is cached: a stack of layers takes no cache.
        """
        shares = []
        for some in texts.values():
            some = some[:GENERATED]
            batch = tokenizer(
                [text.prompt for text in some], padding=True, padding_side="left", return_tensors="pt"
            )
            given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            ids = self.model.whole.generate(**given, max_new_tokens=1, do_sample=False, use_cache=False)
            said = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :])
            right = [one.startswith(str(text.answers[-1])) for one, text in zip(said, some, strict=True)]
            shares.append(sum(right) / len(right))
        return rounded(shares)

    @torch.no_grad()
    def loss(self, part: Part) -> float:
        """Of ordinary text, nats per token, over the whole vocabulary."""
        losses = []
        for rows in torch.arange(len(part["ids"])).split(4):
            h = part[f"h{self.model.layer}"][rows] if self.model.layer else None
            _, states = self.model.last_states(part["ids"][rows], h)
            losses.append(
                F.cross_entropy((states @ self.model.head.T).flatten(0, 1), part["asked"][rows].flatten())
            )
        return round(torch.stack(losses).mean().item(), 4)

    def all(self, arm: Arm, tokenizer: Any, texts: dict[int, list[AskedText]]) -> dict[str, Any]:
        """As JSON has it."""
        result: dict[str, Any] = {"closing": self.closing(), "generate": self.generated(tokenizer, texts)}
        result |= {name: self.loss(self.texts[name]) for name in ("help texts", "Python sources")}
        if self.task.asks_often:
            result["by_moves"] = self.by_moves()
            result["by_moves_among_answers"] = self.by_moves(among_answers=True)
        if isinstance(self.model.whole, HybridModel) and arm.learns == "recursion":
            result["by_n"] = {
                str(n): {
                    "closing": self.closing(n),
                    "by_moves": self.by_moves(n) if self.task.asks_often else [],
                }
                for n in N
            }
        return result
