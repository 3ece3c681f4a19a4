"""How many puzzles a model solves: whole, by cells, and as ARC counts"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from puzzles import arc
from puzzles.layout import Split, names_in
from puzzles.model import PuzzleModel
from puzzles.pictures import Shown
from puzzles.training import IGNORED, all_right
from puzzles.voting import Votes


class Answers(NamedTuple):
    """To the first examples of a split."""

    tokens: NDArray[Any]  # [examples, cells]
    q: NDArray[Any]  # [examples], above 0 where the model says that it is right
    right: NDArray[np.bool_]  # [examples] whether all counted cells are
    cells: float  # the share of counted cells that are right, examples counting alike


@torch.no_grad()
def answered(model: PuzzleModel, split: Split, supervision_steps: int, rows: int) -> Answers:
    """The answers after all supervision steps, `rows` examples together."""
    parts = list(_parts(model, split, supervision_steps, rows))
    tokens, q, right, cells = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    return Answers(tokens, q, right, float(cells.mean()))


def _parts(
    model: PuzzleModel, split: Split, supervision_steps: int, rows: int
) -> Iterator[tuple[torch.Tensor, ...]]:
    place = next(model.parameters()).device
    for begin in range(0, len(split.inputs), rows):
        batch = split.batch(slice(begin, begin + rows)).to(place)
        for y, _ in model.trm.supervision_steps(model.embed(batch.inputs, batch.kinds), supervision_steps):
            last = y
        logits, q = model.read(last)
        counted = batch.labels != IGNORED
        hits = (logits.argmax(-1) == batch.labels) & counted
        shares = hits.sum(-1) / counted.sum(-1).clamp(min=1)
        yield logits.argmax(-1).to(torch.uint8), q, all_right(logits, batch.labels), shares


def report(folder: Path, split: Split, answers: Answers, is_whole: bool = True) -> dict[str, float]:
    """What was found, by name; of ARC also pass@1 and pass@2, which need the folder's names and tests.

    is_whole   a task of the folder that the split has no examples of is not solved; else it is not counted
    """
    shares = {
        "whole puzzles right": float(answers.right.mean()),
        "cells right": answers.cells,
        "says that it is right": float((answers.q > 0).mean()),
    }
    if split.what == "arc":
        names, tasks = names_in(folder, int(split.kinds.max()) + 1), arc.tasks_in(folder)
        if not is_whole:
            asked = {arc.parsed(names[kind])[0] for kind in split.kinds}
            tasks = {name: task for name, task in tasks.items() if name in asked}
        if not tasks:
            raise ValueError(f"{folder}/test_puzzles.json: expected the tasks that are tested, got none.")
        votes = Votes(names, split.grid)
        for row, (tokens, q) in enumerate(zip(answers.tokens, answers.q, strict=True)):
            sure = float(1 / (1 + np.exp(-q.astype(np.float64))))
            votes.add(split.kinds[row], split.inputs[row], tokens, sure)
        shares |= {f"pass@{most}": votes.pass_at(most, tasks) for most in (1, 2)}
    return shares


def shown(split: Split, answers: Answers, right: bool, most: int) -> list[Shown]:
    """(input, answer, solution) of the first examples that are right, or wrong, for pictures.page."""
    rows = np.flatnonzero(answers.right == right)[:most]
    made = []
    for row in rows:
        given, answer, wanted = (
            tokens[row].reshape(split.grid) for tokens in (split.inputs, answers.tokens, split.labels)
        )
        if split.what == "arc":  # what a model says outside of its grid does not count
            answer = arc.placed(arc.found(answer), split.grid)
        made.append((given, answer, wanted))
    return made
