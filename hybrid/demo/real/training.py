"""The loop of the demonstration on a real base: cached hidden states in, the loss of answers out.

A step takes games from cached hidden states; what learns lies above them. The head of a real base is large
(49,152 tokens), it is frozen, and over all of it the loss would cost more than all else. So the loss is over
the answers' tokens and those that the base finds likely there: docs/decisions/real-base.md.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid.demo.real.questions import NOTHING, Questions
from hybrid.demo.real.states import given
from hybrid.training.optimizer import adamw, set_rate
from hybrid.training.settings import TrainSettings

_LIKELY = 500  # tokens of the vocabulary that the base finds likely where something is asked


@dataclass(frozen=True)
class Known:
    """Texts, and what comes out of the base's layer `layer` for them, [N, T, D]."""

    questions: Questions
    layer: int
    h: Tensor


class Model:
    """A language model of which something learns, above `layer` of the base inside.

    whole        HybridModel, a PeftModel, ...: what is called
    base         the language model inside: its layers, its norm, its head
    layer        up to which hidden states are given; 0: none, all layers are computed
    draws_steps  whether each step of the training draws n
    trained_in   the dtype of its products while it is trained (autocast); weights and all else are float32
    """

    def __init__(
        self,
        whole: Any,
        base: Any,
        layer: int,
        draws_steps: bool = False,
        trained_in: torch.dtype = torch.float32,
    ) -> None:
        self.whole, self.base, self.layer, self.draws_steps = whole, base, layer, draws_steps
        self.trained_in = trained_in
        self.head: Tensor = base.get_output_embeddings().weight

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.whole.named_parameters() if p.requires_grad}

    def last_states(self, ids: Tensor, h: Tensor | None, n: int | None = None) -> tuple[Tensor, Tensor]:
        """(what goes into the last norm, what goes into the head), [B, T, D] each.

        h   what comes out of layer `layer`; n   recursion steps
        """
        known = nullcontext() if h is None else given(self.base, self.layer, h.float())
        with known:
            return self._called(ids, **({} if n is None else {"num_recursion_steps": n}))

    def _called(self, ids: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []
        handle = self.base.model.norm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        head, self.base.lm_head = self.base.lm_head, nn.Identity()
        narrow = self.whole.training and self.trained_in != torch.float32
        try:
            with torch.autocast("cpu", self.trained_in, enabled=narrow):
                out = self.whole(input_ids=ids, use_cache=False, **inputs).logits
        finally:
            handle.remove()
            self.base.lm_head = head
        return found[0].float(), out.float()


class AnswerLoss:
    """Cross-entropy of the answers, over some of the vocabulary.

    head     [V, D]
    tokens   [C]: those that it is over, sorted
    """

    def __init__(self, head: Tensor, tokens: Tensor) -> None:
        self.head, self.tokens = head[tokens], tokens

    @staticmethod
    @torch.no_grad()
    def likely(head: Tensor, states: Tensor, answers: Tensor) -> Tensor:
        """The tokens among `answers`, and those that are likely after `states` [P, D]; sorted."""
        top = (states @ head.T).topk(20).indices.flatten().bincount(minlength=len(head))
        return torch.cat([top.topk(min(_LIKELY, len(head))).indices, answers.unique()]).unique()

    def __call__(self, states: Tensor, answers: Tensor) -> Tensor:
        """[P], nats, of states [P, D] and answers [P], each one of `tokens`."""
        logits = states @ self.head.T
        return F.cross_entropy(logits, torch.searchsorted(self.tokens, answers), reduction="none")


@dataclass(frozen=True)
class TrainingPlan:
    """How an arm is trained.

    closing   weight of the question at the end, as a share of the loss
    growing   share of the steps in which the longest game drawn grows, from one move to all; 0: at once
    kept      rows of ordinary text in each step, which the model shall leave as the base has it; 0: none
    seconds   of CPU time after which it ends, whatever the steps; None: never
    """

    steps: int = 3000
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup_steps: int = 50
    schedule: str = "constant-then-decay"
    closing: float = 0.2
    growing: float = 0.0
    kept: int = 0
    seconds: float | None = None
    seed: int = 0


def train(
    model: Model,
    data: Known,
    plan: TrainingPlan,
    kept: tuple[Tensor, Tensor, Tensor] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, float]:
    """Train what requires gradients; {"steps", "cpu_seconds", "loss"}.

    kept   (ids [K, T], what comes out of layer `layer`, what goes into the base's last norm), [K, T, D] each
    """
    settings = TrainSettings(
        "",
        plan.steps,
        learning_rate=plan.learning_rate,
        warmup_steps=min(plan.warmup_steps, plan.steps // 4),
        schedule=plan.schedule,  # type: ignore[arg-type]
    )
    parameters = list(model.trained().values())
    optimizer = adamw(model.trained(), plan.learning_rate, settings.betas, plan.weight_decay)
    generator = torch.Generator().manual_seed(plan.seed)
    model.whole.train()
    loss_of = _Loss(model, data, plan, kept, generator)
    began, losses = time.process_time(), []
    for step in range(plan.steps):
        set_rate(optimizer, settings.rate_at(step))
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
        if on_step is not None:
            paused = time.process_time()
            on_step(step + 1, losses[-1])
            began += time.process_time() - paused
        if plan.seconds is not None and time.process_time() - began > plan.seconds:
            break
    model.whole.eval()
    last = losses[-50:]
    return {
        "steps": len(losses),
        "cpu_seconds": time.process_time() - began,
        "loss": sum(last) / len(last),
    }


class _Loss:
    """The loss of a step; what it needs for that."""

    def __init__(
        self,
        model: Model,
        data: Known,
        plan: TrainingPlan,
        kept: tuple[Tensor, Tensor, Tensor] | None,
        generator: torch.Generator,
    ) -> None:
        self.model, self.data, self.plan, self.kept, self.generator = model, data, plan, kept, generator
        self.closing = data.questions.closing()
        self.moves = (data.questions.asked != NOTHING).sum(1) - 1
        first = slice(0, 64)
        with torch.no_grad():
            model.whole.eval()
            _, states = model.last_states(
                data.questions.ids[first], self._h(torch.arange(64)[: len(data.h)]), None
            )
            model.whole.train()
        asked = data.questions.asked
        is_asked = asked[first] != NOTHING
        tokens = AnswerLoss.likely(model.head, states[is_asked], asked[asked != NOTHING])
        self.of_answers = AnswerLoss(model.head.detach(), tokens)

    def __call__(self, step: int) -> Tensor:
        plan, questions = self.plan, self.data.questions
        rows = self.rows_of(step)
        n = self.model.whole.draw_recursion_steps(step) if self.model.draws_steps else None
        asked = questions.asked[rows]
        is_asked = asked != NOTHING
        length = int(is_asked.any(0).nonzero().max()) + 1
        is_asked = is_asked[:, :length]
        _, states = self.model.last_states(questions.ids[rows, :length], self._h(rows, length), n)
        losses = self.of_answers(states[is_asked], asked[:, :length][is_asked])
        is_closing = self.closing[rows, :length][is_asked]
        loss = plan.closing * losses[is_closing].mean()
        if not is_closing.all():
            loss = loss + (1 - plan.closing) * losses[~is_closing].mean()
        if plan.kept and self.kept is not None:
            loss = loss + self._stillness(n)
        return loss

    def rows_of(self, step: int) -> Tensor:
        """Those of a step, drawn from the games that are short enough for it."""
        plan, longest = self.plan, int(self.moves.max())
        if plan.growing:
            longest = min(longest, int(self.moves.min()) + int(longest * step / (plan.growing * plan.steps)))
        (some,) = (self.moves <= longest).nonzero(as_tuple=True)
        return some[torch.randint(len(some), (plan.batch_size,), generator=self.generator)]

    def _stillness(self, n: int | None) -> Tensor:
        """|h' - h|^2 / |h|^2 of what goes into the last norm, for rows of the text that is kept."""
        assert self.kept is not None
        ids, h, last = self.kept
        rows = torch.randint(len(ids), (self.plan.kept,), generator=self.generator)
        given_h = h[rows] if self.model.layer else None
        changed, _ = self.model.last_states(ids[rows], given_h, n)
        wanted = last[rows].float()
        return ((changed - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()

    def _h(self, rows: Tensor, length: int | None = None) -> Tensor | None:
        return self.data.h[rows, :length] if self.model.layer else None
