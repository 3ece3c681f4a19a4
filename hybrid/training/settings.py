"""TrainSettings: how to train, as a value and as options of the command line. Imports nothing heavy."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hybrid.extras import installed
from hybrid.options import option

if TYPE_CHECKING:
    from hybrid.training.batches import LengthCurriculum
    from trm_kernels.modules.curriculum import RecursionCurriculum
else:
    LengthCurriculum = RecursionCurriculum = Any

CACHE_DTYPES = ("float32", "bfloat16")
KEEP_TARGETS = ("labels", "base")
SCHEDULES = ("cosine", "constant-then-decay")
_LONGEST_RISE = 300  # steps, where none are given: see docs/decisions/real-base.md
_DECAY = 0.2  # of the steps after the warm-up: those in which a constant rate falls


def first_and_steps(text: str) -> tuple[int, int]:
    """A length curriculum as it is typed, FIRST:STEPS."""
    first, _, steps = text.partition(":")
    try:
        return int(first), int(steps)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected FIRST:STEPS, two whole numbers such as 8:500, got {text!r}"
        ) from None


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Counts of steps are optimizer steps. Each field that has help is an option of `train`.

    length_curriculum     short items first, see batches.py; None: all items whole in all steps
    recursion_curriculum  a shallow recursion first, see depth.py; None: the config's n and T in all steps
    cache_hidden_states   see hidden_states.py

    Errors: ValueError, with what was expected and what came.
    """

    output_dir: Path | str = option(help="folder of the run", flag="--output")
    steps: int = option(help="optimizer steps in all")
    batch_size: int = option(8, "sequences in one forward of a process")
    accumulate: int = option(1, "forwards of a process in a step")
    learning_rate: float = option(
        1e-4, "AdamW's, at its highest", cli_default=None, shown="1e-4 in phase 1, 1e-5 in phase 2"
    )
    warmup_steps: int | None = option(
        None, "steps in which the rate rises to it, evenly", shown=f"a fifth of them, at most {_LONGEST_RISE}"
    )
    weight_decay: float = option(0.01, "AdamW's")
    betas: tuple[float, float] = option((0.9, 0.95), "AdamW's", nargs=2)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this Euclidean norm")
    schedule: Literal["cosine", "constant-then-decay"] = option(
        "cosine",
        "how the rate falls: along a cosine from the warm-up on; or not before the last fifth of the steps, "
        "then evenly",
    )
    final_rate_fraction: float = option(0.1, "the rate falls to this fraction of itself")
    seed: int = option(0, "of the data's order and of dropout")
    save_every: int | None = option(None, "steps between checkpoints", shown="one at the end")
    eval_every: int | None = option(None, "steps between held-out losses", shown="before and after")
    log_every: int = option(10, "steps between lines of metrics.jsonl")
    keep_checkpoints: int = option(2, "so many of the newest stay")
    shard: bool = option(False, "split the model among the processes (FSDP2) instead of copying it to each")
    mixed_precision: Literal["no", "bf16"] | None = option(
        None, "bf16: compute in it what is kept in float32", shown="as accelerate says"
    )
    max_skipped_steps: int = option(
        5, "so many in a row whose loss or gradient is NaN or infinite end the run"
    )
    length_curriculum: "LengthCurriculum | None" = option(
        None,
        "short first: sequences are cut to FIRST tokens in the first step, to ever more within STEPS steps, "
        "then not at all; a row that has no label so early is left for later",
        shown="none",
        metavar="FIRST:STEPS",
        type=first_and_steps,
    )
    recursion_curriculum: "RecursionCurriculum | None" = option(
        None,
        "shallow first: the recursion has FIRST steps in the first training step, or FIRST steps and CYCLES "
        "cycles, ever more within STEPS training steps, then all that the block has",
        shown="none",
        metavar="FIRST[xCYCLES]:STEPS",
        type=str,
    )
    stochastic_rounding: bool = option(
        False, "keep what trains in phase 2 in bfloat16; small steps count on average (torchao)"
    )
    keep_ratio: float | None = option(
        None, "share of a step's sequences, and of its loss, that --keep has", shown="none", metavar="R"
    )
    keep_target: Literal["labels", "base"] = option(
        "labels",
        "what is learned of --keep: labels, its text; base, that the hybrid is its base there (its loss is "
        "how much the injections add to a hidden state, |h' - h|^2 / |h|^2)",
    )
    cache_hidden_states: Path | str | None = option(
        None,
        "phase 1: a folder: keep there what comes out of the layers below the first injection point, and "
        "read it from the second pass over the data on",
        shown="none",
        metavar="FOLDER",
    )
    report_to: tuple[str, ...] = option(
        (),
        "accelerate's trackers, which get the metrics as well: tensorboard (files in --output), wandb, ...",
        shown="none",
        metavar="TRACKER",
    )
    cache_dtype: Literal["float32", "bfloat16"] | None = option(
        None, "what --cache-hidden-states keeps", shown="what is computed in"
    )

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "save_every",
            "eval_every",
            "log_every",
            "keep_checkpoints",
        ):
            count = getattr(self, name)
            if count is None and name in ("save_every", "eval_every"):
                continue
            if not isinstance(count, int) or count < 1:
                raise ValueError(
                    f"TrainSettings: expected {name} to be a count of at least 1, got {count!r}."
                )
        if self.report_to:
            from hybrid.training import trackers

            trackers.check(self.report_to)
        if self.warmup_steps is not None and not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"TrainSettings: expected warmup_steps in 0..{self.steps} (steps), got {self.warmup_steps!r}."
            )
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"TrainSettings: expected {name} above 0, got {getattr(self, name)!r}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"TrainSettings: expected weight_decay from 0 on, got {self.weight_decay!r}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"TrainSettings: expected betas of at least 0 and below 1, got {self.betas!r}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"TrainSettings: expected schedule to be one of {', '.join(SCHEDULES)}, "
                f"got {self.schedule!r}."
            )
        if not 0 <= self.final_rate_fraction <= 1:
            raise ValueError(
                f"TrainSettings: expected final_rate_fraction in 0..1, got {self.final_rate_fraction!r}."
            )
        if self.length_curriculum is not None and self.length_curriculum.steps > self.steps:
            raise ValueError(
                f"TrainSettings: expected a length_curriculum within {self.steps} steps (steps), "
                f"got {self.length_curriculum.steps}."
            )
        if self.recursion_curriculum is not None and self.recursion_curriculum.steps > self.steps:
            raise ValueError(
                f"TrainSettings: expected a recursion_curriculum within {self.steps} steps (steps), "
                f"got {self.recursion_curriculum.steps}."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"TrainSettings: expected seed in 0..2^32-1, got {self.seed!r}.")
        self._check_kept()
        if self.stochastic_rounding:
            installed("torchao", "stochastic rounding")

    def _check_kept(self) -> None:
        if self.keep_target not in KEEP_TARGETS:
            raise ValueError(
                f"TrainSettings: expected keep_target to be one of {', '.join(KEEP_TARGETS)}, "
                f"got {self.keep_target!r}."
            )
        if self.keep_target != "labels" and self.keep_ratio is None:
            raise ValueError(
                f"TrainSettings: keep_target={self.keep_target!r} expected a keep_ratio, got none."
            )
        if self.cache_dtype is not None and self.cache_hidden_states is None:
            raise ValueError(
                f"TrainSettings: cache_dtype expected cache_hidden_states, got {self.cache_dtype!r} alone."
            )
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            raise ValueError(
                f"TrainSettings: expected cache_dtype to be None, {', '.join(CACHE_DTYPES)}, "
                f"got {self.cache_dtype!r}."
            )

    def rate_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0: a linear rise, then as the schedule says."""
        rising = self.warmup_steps
        if rising is None:
            rising = min(_LONGEST_RISE, self.steps // 5)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        falling = max(1, self.steps - rising)
        if self.schedule == "cosine":
            height = (1 + math.cos(math.pi * (step - rising) / falling)) / 2
        else:
            height = min(1.0, (self.steps - step) / (_DECAY * falling))
        return self.learning_rate * (self.final_rate_fraction + (1 - self.final_rate_fraction) * height)
