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

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from puzzle_folder import UNREADABLE, check_shapes

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

    @property
    def what(self) -> str:
        """Which of the paper's benchmarks it is of, "arc", "maze" or "sudoku".

        Sizes alone do not tell: a maze of 4x4 has those of a Sudoku. Its token of a wall is the blank of a
        Sudoku, which stands in puzzles and never in solutions.

        Errors: ValueError where it is none of them.
        """
        tokens, (rows, columns) = self.about["vocab_size"], self.grid
        if tokens == 12:
            return "arc"
        is_filled_in = self.inputs.min() == 1 and self.labels.min() > 1
        if tokens == rows + 2 == columns + 2 and is_filled_in:
            return "sudoku"
        if tokens == 6 and all(((self.inputs == end).sum(1) == 1).all() for end in (3, 4)):
            return "maze"
        raise ValueError(
            "expected ARC (12 tokens), Sudoku (blanks in puzzles, none in solutions) or mazes (6 tokens, one "
            f"start and one goal), got others, of {tokens} tokens in {rows}x{columns} cells."
        )

    @property
    def kind(self) -> str:
        """What a run's puzzles have in common, such as "maze of 6x6 cells". Errors: as `what`."""
        rows, columns = self.grid
        return f"{self.what} of {rows}x{columns} cells"

    def first(self, groups: int | None) -> "Split":
        """The first so many groups with all that is in them: tasks of ARC, puzzles of the others."""
        if groups is None or groups >= len(self.group_indices) - 1:
            return self
        puzzles = self.group_indices[groups]
        examples = self.puzzle_indices[puzzles]
        inputs, labels, kinds = (part[:examples] for part in (self.inputs, self.labels, self.kinds))
        indices = self.puzzle_indices[: puzzles + 1], self.group_indices[: groups + 1]
        return Split(inputs, labels, kinds, *indices, self.about)

    def digest(self) -> str:
        """SHA-256 of all that a training reads."""
        said = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode())
        for array in self[:5]:
            said.update(f"{array.dtype.str}{array.shape}".encode())
            said.update(np.ascontiguousarray(array).data)
        return said.hexdigest()

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
        about = _about(json.loads((part / "dataset.json").read_text()))
        sets = [[_array(part / f"{name}__{what}.npy") for what in _ARRAYS] for name in about["sets"]]
        arrays = [np.concatenate([one[i] for one in sets]) for i in range(3)]
    except (*UNREADABLE, MemoryError) as error:
        raise ValueError(f"{part}: expected a folder of the TRM paper's layout, got {error!r}.") from error
    inputs, labels, kinds = arrays
    check_shapes(part, inputs, labels, about["seq_len"])
    # what points into the arrays of a set points behind those of the sets before
    puzzles, groups = (
        _one_after_the_other(part, name, [one[i] for one in sets], [len(one[into]) for one in sets])
        for i, name, into in ((3, "puzzle_indices", 0), (4, "group_indices", 2))
    )
    if kinds.shape != (len(puzzles) - 1,):
        raise ValueError(f"{part}: expected puzzle_identifiers [{len(puzzles) - 1}], got {kinds.shape}.")
    for name, numbers, limit in (
        ("tokens", inputs, about["vocab_size"]),
        ("tokens", labels, about["vocab_size"]),
        ("identifiers", kinds, about["num_puzzle_identifiers"]),
    ):
        _check_numbers(part, name, numbers, limit)
    return Split(inputs, labels, np.repeat(kinds, np.diff(puzzles)), puzzles, groups, about)


def _about(about: Any) -> dict[str, Any]:
    """dataset.json as it is. Errors: ValueError, KeyError, TypeError for what is none."""
    sizes = [about[name] for name in ("seq_len", "vocab_size", "num_puzzle_identifiers")]
    if not all(_is_count(size) for size in sizes):
        raise ValueError(f"seq_len, vocab_size, num_puzzle_identifiers {sizes}")
    ignored, sets, grid = about["ignore_label_id"], about["sets"], about.get("grid")
    if ignored is not None and type(ignored) is not int:
        raise ValueError(f"ignore_label_id {ignored!r}")
    if not isinstance(sets, list) or not sets or not all(isinstance(name, str) for name in sets):
        raise ValueError(f"sets {sets!r}")
    side = math.isqrt(sizes[0])
    if grid is None and side * side != sizes[0]:
        raise ValueError(f"{sizes[0]} cells, which are no square, and no grid")
    if grid is not None and not (
        isinstance(grid, list)
        and len(grid) == 2
        and all(map(_is_count, grid))
        and math.prod(grid) == sizes[0]
    ):
        raise ValueError(f"grid {grid!r} of {sizes[0]} cells")
    return dict(about)


def _is_count(number: Any) -> bool:
    return type(number) is int and number > 0


def _array(file: Path) -> NDArray[Any]:
    """Errors: those of np.load, and ValueError for several arrays in one file."""
    array = np.load(file, allow_pickle=False)
    if not isinstance(array, np.ndarray) or not array.ndim:
        raise ValueError(f"{file.name} without an array")
    return array


def _are_whole(array: NDArray[Any]) -> bool:
    return array.dtype.kind in "iu"


def _one_after_the_other(
    part: Path, name: str, indices: list[NDArray[Any]], ends: list[int]
) -> NDArray[np.int64]:
    """Indices of all sets as one. Errors: ValueError where a set's do not rise from 0 to its end."""
    whole = [np.zeros(1, np.int64)]
    for one, end in zip(indices, ends, strict=True):
        is_list = _are_whole(one) and one.ndim == 1 and len(one) > 1
        rising = one.astype(np.int64) if is_list else np.zeros(1)  # unsigned: no difference is below 0
        if not is_list or rising[0] or rising[-1] != end or (np.diff(rising) < 1).any():
            raise ValueError(f"{part}: expected {name} that rise from 0 to {end}, got others.")
        whole.append(whole[-1][-1] + rising[1:])
    return np.concatenate(whole)


def _check_numbers(part: Path, name: str, numbers: NDArray[Any], limit: int) -> None:
    if not _are_whole(numbers):
        raise ValueError(f"{part}: expected {name} as integers, got {numbers.dtype}.")
    if numbers.min() < 0 or numbers.max() >= limit:
        raise ValueError(
            f"{part}: expected {name} 0..{limit - 1}, got some of {numbers.min()}..{numbers.max()}."
        )


def names_in(folder: Path, count: int) -> list[str]:
    """The names of kinds of puzzles. Errors: ValueError where there are fewer than `count`."""
    file = folder / "identifiers.json"
    try:
        names = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: expected names of kinds of puzzles, got {error!r}.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) < count:
        had = len(names) if isinstance(names, list) else type(names).__name__
        raise ValueError(f"{file}: expected {count} names of kinds of puzzles or more, got {had}.")
    return names


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
