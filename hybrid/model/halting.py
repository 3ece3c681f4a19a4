"""Adaptive recursion: each token stops when its answer stops changing. Rules, and a record of steps taken.

    model(ids, halting=Halting(threshold=0.2))              # the TRM's answer y hardly changes
    model(ids, halting=TokenHalting(patience=2), use_cache=False)     # the likeliest next token stays

    with record_steps() as record:
        model.generate(ids, halting=Halting(threshold=0.2))
    record.mean_steps, record.mean_evaluations

Halting is decided in each TRM: trm_kernels/recursion/adaptive.py says what a token that has stopped is to
the others, and why a cache gives the same. TokenHalting needs the layers above, so it is a loop around whole
forwards: n = 1, 2, ..., and for each token the logits of the first n at which its top token has stayed. It
costs the sum of these forwards, and takes no cache, for each n would need its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from trm_kernels.recursion.adaptive import Halting, Order, check_count

__all__ = ["ForwardSteps", "Halting", "StepRecord", "TokenHalting", "record_steps"]


@dataclass(frozen=True)
class TokenHalting:
    """When a token stops: its top token is the same in so many steps in a row.

    patience    steps in a row in which the top token did not change
    min_steps   no token stops before
    in_order    no token stops before those that it may look at

    Errors: ValueError, with what was expected and what came.
    """

    patience: int = 2
    min_steps: int = 1
    in_order: bool = True

    def __post_init__(self) -> None:
        for name in ("patience", "min_steps"):
            check_count("TokenHalting", name, getattr(self, name))


class ForwardSteps(NamedTuple):
    """What one forward of a HybridModel took, each [B, T] on the CPU.

    steps         float32: recursion steps, the mean over injection points and cycles
    evaluations   float32: how often f was computed for the token, in all cycles and, with TokenHalting, all
                  forwards; the mean over injection points
    is_token      bool, False for padding
    """

    steps: Tensor
    evaluations: Tensor
    is_token: Tensor


@dataclass
class StepRecord:
    """The steps of every forward within record_steps(). A forward of a fixed n is recorded as well."""

    forwards: list[ForwardSteps] = field(default_factory=list)

    @property
    def mean_steps(self) -> float:
        """Recursion steps a token; NaN for no tokens."""
        return self._mean(0)

    @property
    def mean_evaluations(self) -> float:
        """Evaluations of f a token and injection point, answers included; NaN for no tokens."""
        return self._mean(1)

    def steps_by_sequence(self) -> Tensor:
        """[B] float32, recursion steps a token of each sequence, over all forwards; they have one B."""
        kept = [torch.cat([getattr(f, name) for f in self.forwards], dim=1) for name in ("steps", "is_token")]
        steps, is_token = kept[0], kept[1].float()
        return (steps * is_token).sum(dim=1) / is_token.sum(dim=1)

    def _mean(self, which: int) -> float:
        values = [f[which][f.is_token] for f in self.forwards]
        return float(torch.cat(values).mean()) if values else float("nan")


_record: ContextVar[StepRecord | None] = ContextVar("trm_hybrid_step_record", default=None)


@contextmanager
def record_steps() -> Iterator[StepRecord]:
    """Record the steps of every forward of any HybridModel in this thread, but for compiled ones.

    Copies a few numbers a token to the CPU after each forward, and so waits for the device.
    """
    record = StepRecord()
    before = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(before)


def recording() -> StepRecord | None:
    """The record that is open in this thread."""
    return None if torch.compiler.is_compiling() else _record.get()


def mean_over_points(reported: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(steps, evaluations), [B, T] float32 on the CPU, of each point's [num_cycles, B, T] and [B, T]."""
    steps = torch.stack([s.cpu().float().mean(dim=0) for s, _ in reported]).mean(dim=0)
    return steps, torch.stack([e.cpu().float() for _, e in reported]).mean(dim=0)


class Settled(NamedTuple):
    """For each token the logits [B, T, V] where it stopped, and [B, T] that n and the evaluations of f."""

    logits: Tensor
    steps: Tensor
    evaluations: Tensor


def until_settled(
    logits_at: Callable[[int, Tensor], Tensor],
    halting: TokenHalting,
    num_recursion_steps: int,
    is_token: Tensor,
    mask: Tensor | None,
    kept: slice | Tensor,
    cost: Callable[[int], int],
) -> Settled:
    """Run n = 1, 2, ... until every token that is asked for has stopped, sequences that are done left out.

    logits_at             (n, numbers of sequences) -> their logits [sequences, T, V]
    num_recursion_steps   a token that has not stopped by then stops
    is_token              [B, T] bool
    mask                  [B, 1, T, T], a general one; None: tokens look at those before them
    kept                  of T, the tokens that are asked for
    cost                  n -> evaluations of f for a token in a forward
    """
    B, T = is_token.shape
    order = Order(B, T, True, mask, None) if halting.in_order else None
    sequences = torch.arange(B, device=is_token.device)
    going, logits, top = torch.ones_like(is_token), None, None
    steps, evaluations, quiet = (torch.zeros_like(is_token, dtype=torch.int64) for _ in range(3))
    for n in range(1, num_recursion_steps + 1):
        new = logits_at(n, sequences)
        logits = new.new_zeros(B, *new.shape[1:]) if logits is None else logits
        takes = going[sequences]
        logits[sequences] = torch.where(takes[..., None], new, logits[sequences])
        steps[sequences] = torch.where(takes, n, steps[sequences])
        evaluations[sequences] += cost(n)
        now = logits.argmax(dim=-1)
        quiet = torch.where(now == top, quiet + 1, 0) if top is not None else quiet
        top = now
        going = going & is_token
        if n >= halting.min_steps:
            going = going & (quiet < halting.patience)
        if order is not None:
            going = order.keep_waiting(going.reshape(-1), n).view(B, T) & is_token
        sequences = going[:, kept].any(dim=1).nonzero()[:, 0]
        if not len(sequences):
            break
    assert logits is not None
    return Settled(logits, steps, evaluations)
