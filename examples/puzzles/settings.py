"""Settings: what may be chosen about a puzzle model and its training, as one value"""

import math
from dataclasses import dataclass, fields

from trm_kernels import Depth, RecursionCurriculum

_MAY_BE_0 = ("steps", "warmup_steps")


@dataclass(frozen=True)
class Settings:
    """The defaults are the paper's for Sudoku-Extreme, but for the steps."""

    hidden_size: int = 512
    num_heads: int = 8  # without mlp_t
    prefix: int = 16  # tokens in front; they hold the puzzle embedding
    mlp_t: bool = True  # cells are mixed by an MLP over them, the paper's choice for Sudoku, not by attention
    n: int = 6  # updates of z in a cycle
    cycles: int = 3  # updates of y; gradients pass through the last
    supervision_steps: int = 16  # at most, for one puzzle in training
    steps: int = 20_000  # of the optimiser
    batch_size: int = 768
    learning_rate: float = 1e-4
    embedding_rate: float = 1e-2  # the learning rate of the puzzle embeddings
    warmup_steps: int = 2000
    weight_decay: float = 1.0  # of all weights, puzzle embeddings among them
    ema: float = 0.999  # how much of the average of the weights stays in a step
    average_embeddings: bool = False  # whether puzzle embeddings are averaged too; not in the paper's code
    recursion_curriculum: str | None = None  # FIRST:STEPS, see RecursionCurriculum.from_text

    def __post_init__(self) -> None:
        """Errors: ValueError for a number that makes no training, by its flag."""
        for field in fields(self):
            value, flag = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if field.type is int and value < (least := 0 if field.name in _MAY_BE_0 else 1):
                why = ": the puzzle embedding stands there" if field.name == "prefix" else ""
                raise ValueError(f"{flag}: expected at least {least}{why}, got {value}.")
            if field.type is float and not (0 <= value < math.inf):
                raise ValueError(f"{flag}: expected a number of at least 0, got {value}.")
        if self.ema >= 1:
            raise ValueError(f"--ema: expected a number from 0 to below 1, got {self.ema}.")


def depth_at(settings: Settings, step: int) -> Depth:
    """n and T of training step `step`, from 0. Errors: ValueError for a curriculum that cannot be."""
    last, text = Depth(settings.n, settings.cycles), settings.recursion_curriculum
    if text is None:
        return last
    curriculum = RecursionCurriculum.from_text(text, last)
    if curriculum.steps > settings.steps:
        raise ValueError(
            f"expected a curriculum within {settings.steps} steps (--steps), got {curriculum.steps}."
        )
    return curriculum.at(step)


# what the paper's code trains each benchmark with (its README), but for the steps
PAPERS = {
    "sudoku": Settings(embedding_rate=1e-4),
    "maze": Settings(mlp_t=False, n=4, embedding_rate=1e-4),
    "arc": Settings(mlp_t=False, n=4, weight_decay=0.1),
}
