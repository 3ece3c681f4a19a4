"""Folders of puzzles in the layout of the TRM paper's code, of every kind: read, written, drawn from

    FOLDER/identifiers.json              names of kinds of puzzles; 0 is <blank>
    FOLDER/test_puzzles.json             ARC alone: {name: {"train": [...], "test": [...]}} of what is tested
    FOLDER/train|test/dataset.json       sizes and what tokens mean
    FOLDER/train|test/all__inputs.npy, all__labels.npy                       [examples, cells]
    FOLDER/train|test/all__puzzle_identifiers.npy, all__puzzle_indices.npy   [puzzles], [puzzles + 1]
    FOLDER/train|test/all__group_indices.npy                                 [groups + 1]

A puzzle has examples, of one kind; a group is a puzzle and its variants. dataset.json may have one field that
the paper's code does not know and does not mind, "grid", [rows, columns] of a grid that is no square.

Source   dataset/build_arc_dataset.py and puzzle_dataset.py of
         github.com/SamsungSAILMontreal/TinyRecursiveModels.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from puzzles.training import IGNORED, Batch

Tokens = NDArray[np.uint8]  # [cells], or [rows, columns]
Example = tuple[Tokens, Tokens]  # input, label
_ARRAYS = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")


class Puzzle(NamedTuple):
    """Examples of one kind."""

    kind: int
    examples: Sequence[Example]


class Split(NamedTuple):
    """What is to train on, or to test."""

    inputs: NDArray[Any]  # [examples, cells], as labels
    labels: NDArray[Any]
    kinds: NDArray[Any]  # [examples]
    puzzle_indices: NDArray[Any]  # [puzzles + 1], into examples
    group_indices: NDArray[Any]  # [groups + 1], into puzzles
    about: dict[str, Any]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.about.get("grid") or [math.isqrt(self.about["seq_len"])] * 2
        return rows, columns

    def batch(self, rows: NDArray[Any] | slice) -> Batch:
        """Examples as the model takes them: labels that are not counted become -100."""
        inputs, labels, kinds = (
            torch.from_numpy(array[rows].astype(np.int64)) for array in (self.inputs, self.labels, self.kinds)
        )
        ignored = self.about["ignore_label_id"]
        return Batch(inputs, labels if ignored is None else labels.where(labels != ignored, IGNORED), kinds)

    def draw(self, size: int, generator: np.random.Generator) -> NDArray[Any]:
        """[size] examples: of groups in a random order a puzzle, all of its examples, until there are enough.

        So does the paper's code. But it goes through all groups once before it shuffles them anew.
        """
        drawn: list[int] = []
        while True:
            for group in generator.permutation(len(self.group_indices) - 1):
                puzzle = generator.integers(self.group_indices[group], self.group_indices[group + 1])
                examples = np.arange(self.puzzle_indices[puzzle], self.puzzle_indices[puzzle + 1])
                drawn += generator.permutation(examples).tolist()
                if len(drawn) >= size:
                    return np.array(drawn[:size])


def read(folder: Path, split: str) -> Split:
    """`split` is "train" or "test". Errors: ValueError for what is no such folder."""
    part = folder / split
    try:
        about = json.loads((part / "dataset.json").read_text())
        sets = [
            [np.load(part / f"{name}__{what}.npy", allow_pickle=False) for what in _ARRAYS]
            for name in about["sets"]
        ]
        arrays = [np.concatenate([one[i] for one in sets]) for i in range(3)]
        # what points into the arrays of a set points behind those of the sets before
        puzzles, groups = (_one_after_the_other([one[i] for one in sets]) for i in (3, 4))
        sizes = {name: int(about[name]) for name in ("seq_len", "vocab_size", "num_puzzle_identifiers")}
        about |= {"ignore_label_id": about["ignore_label_id"], **sizes}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{part}: expected a folder of the TRM paper's layout, got {error!r}.") from error
    inputs, labels, kinds = arrays
    _check(part, arrays, puzzles, groups, about)
    return Split(inputs, labels, np.repeat(kinds, np.diff(puzzles)), puzzles, groups, about)


def _one_after_the_other(indices: list[NDArray[Any]]) -> NDArray[Any]:
    whole = indices[0]
    for more in indices[1:]:
        whole = np.concatenate([whole, whole[-1] + more[1:]])
    return whole


def _check(
    part: Path, arrays: list[NDArray[Any]], puzzles: NDArray[Any], groups: NDArray[Any], about: dict[str, Any]
) -> None:
    (inputs, labels, kinds), cells = arrays, about["seq_len"]
    if inputs.ndim != 2 or inputs.shape != labels.shape or inputs.shape[1] != cells or not len(inputs):
        raise ValueError(
            f"{part}: expected inputs and labels [examples, {cells}], got {inputs.shape}, {labels.shape}."
        )
    if min(inputs.min(), labels.min()) < 0 or max(inputs.max(), labels.max()) >= about["vocab_size"]:
        raise ValueError(f"{part}: expected tokens 0..{about['vocab_size'] - 1}, got others.")
    if kinds.min() < 0 or kinds.max() >= about["num_puzzle_identifiers"]:
        raise ValueError(
            f"{part}: expected identifiers 0..{about['num_puzzle_identifiers'] - 1}, got others."
        )
    for name, indices, end in (("puzzle", puzzles, len(inputs)), ("group", groups, len(kinds))):
        if indices[0] != 0 or indices[-1] != end or (np.diff(indices) < 1).any():
            raise ValueError(f"{part}: expected {name}_indices that rise from 0 to {end}, got others.")
    if len(puzzles) != len(kinds) + 1:
        raise ValueError(f"{part}: expected {len(kinds)} puzzles, got {len(puzzles) - 1}.")
    if math.prod(about.get("grid") or [math.isqrt(cells)] * 2) != cells:
        raise ValueError(f"{part}: expected a square grid, or its rows and columns, got {cells} cells.")


def write(
    folder: Path,
    split: str,
    groups: Sequence[Sequence[Puzzle]],
    vocabulary: int,
    names: Sequence[str] = ("<blank>",),
    ignored: int | None = 0,
) -> None:
    """A split, and the names of all kinds. Examples are [rows, columns] tokens, all of one size."""
    if not groups:
        raise ValueError(f"{folder / split}: expected puzzles, got none.")
    part, puzzles = folder / split, [puzzle for group in groups for puzzle in group]
    part.mkdir(parents=True, exist_ok=True)
    examples = [example for puzzle in puzzles for example in puzzle.examples]
    arrays: dict[str, NDArray[Any]] = {
        "inputs": np.stack([given.ravel() for given, _ in examples]),
        "labels": np.stack([wanted.ravel() for _, wanted in examples]),
        "puzzle_identifiers": np.array([puzzle.kind for puzzle in puzzles], np.int32),
        "puzzle_indices": np.cumsum([0, *(len(puzzle.examples) for puzzle in puzzles)], dtype=np.int32),
        "group_indices": np.cumsum([0, *(len(group) for group in groups)], dtype=np.int32),
    }
    for name, array in arrays.items():
        np.save(part / f"all__{name}.npy", array)
    rows, columns = examples[0][0].shape
    about = {
        "pad_id": 0,
        "ignore_label_id": ignored,
        "blank_identifier_id": 0,
        "vocab_size": vocabulary,
        "seq_len": rows * columns,
        "num_puzzle_identifiers": len(names),
        "total_groups": len(groups),
        "mean_puzzle_examples": len(examples) / len(puzzles),
        "total_puzzles": len(puzzles),
        "sets": ["all"],
    }
    (part / "dataset.json").write_text(
        json.dumps(about | ({"grid": [rows, columns]} if rows != columns else {}))
    )
    (folder / "identifiers.json").write_text(json.dumps(list(names)))


def what_of(about: dict[str, Any]) -> str:
    """Which of the paper's benchmarks a folder holds, "arc", "maze" or "sudoku": its sizes tell."""
    if about["vocab_size"] == 12:
        return "arc"
    return "sudoku" if about["seq_len"] == (about["vocab_size"] - 2) ** 2 else "maze"
