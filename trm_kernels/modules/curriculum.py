"""RecursionCurriculum: a shallow recursion first, then a deeper one: n and T as functions of the step

    depth(s) = first + floor((last - first) s / steps) for s < steps, last from then on;  n and T alike

Nothing but the number of the step decides, so a resumed training goes on at the depth where it stopped.

Source   "Accelerating Training Speed of Tiny Recursive Models with Curriculum Guided Adaptive Recursion",
         arXiv 2511.08653, has three stages, (n, T) = (2, 1), (4, 2), (6, 3); here the depth rises evenly.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple


class Depth(NamedTuple):
    """How deep a recursion runs; its fields are arguments of a TRM's call, `trm(x, **depth._asdict())`.

    Attributes:
        num_recursion_steps: n, updates of z in a cycle.
        num_cycles: T, updates of y.
    """

    num_recursion_steps: int
    num_cycles: int


@dataclass(frozen=True)
class RecursionCurriculum:
    """The depth of each training step.

        curriculum = RecursionCurriculum(first=Depth(1, 1), last=Depth(6, 3), steps=1000)
        y, z = trm(x, y, z, **curriculum.at(step)._asdict())

    Attributes:
        first: In step 0.
        last: From step `steps` on.
        steps: Optimizer steps in which the depth rises, evenly.

    Raises:
        ValueError: When a number is below 1, the first depth is above the last, or both are the same.
    """

    first: Depth
    last: Depth
    steps: int

    def __post_init__(self) -> None:
        numbers = (*self.first, *self.last, self.steps)
        are_pairs = len(self.first) == len(self.last) == 2
        if not are_pairs or not all(type(number) is int and number >= 1 for number in numbers):
            raise ValueError(
                "RecursionCurriculum: expected n, T and steps to be counts of at least 1, "
                f"got first {_text(self.first)}, last {_text(self.last)}, {self.steps} steps."
            )
        if any(first > last for first, last in zip(self.first, self.last, strict=True)):
            raise ValueError(
                f"RecursionCurriculum: expected a first n and T of at most {_text(self.last)}, "
                f"got {_text(self.first)}."
            )
        if tuple(self.first) == tuple(self.last):
            raise ValueError(
                f"RecursionCurriculum: expected a first depth below {_text(self.last)}, got the same: "
                "it would have no effect."
            )
        for name in ("first", "last"):  # plain pairs will do
            object.__setattr__(self, name, Depth(*getattr(self, name)))

    @classmethod
    def from_text(cls, text: str, last: Depth) -> "RecursionCurriculum":
        """A curriculum as it is typed.

        Args:
            text: FIRST:STEPS, where FIRST is the first n, T being the last one throughout, or nxT.
            last: From step STEPS on.

        Raises:
            ValueError: When the text says something else, or for numbers that make no curriculum.
        """
        if (found := re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?:(\d{1,9})", text, re.ASCII)) is None:
            raise ValueError(f"expected FIRST:STEPS, such as 2:500 (n) or 2x1:500 (n and T), got {text!r}.")
        n, cycles, steps = found.groups()
        return cls(Depth(int(n), int(cycles or last.num_cycles)), last, int(steps))

    def at(self, step: int) -> Depth:
        """The depth of training step `step`, counted from 0. Errors: ValueError for a step below 0."""
        if step < 0:
            raise ValueError(f"RecursionCurriculum: expected a step of at least 0, got {step}.")
        done = min(step, self.steps)
        pairs = zip(self.first, self.last, strict=True)
        return Depth(*(first + (last - first) * done // self.steps for first, last in pairs))


def _text(depth: Depth) -> str:
    return "x".join(str(number) for number in depth)
