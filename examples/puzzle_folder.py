"""Folders of Sudoku in the layout of the TRM paper's code: read, and made of reasoning-gym's puzzles

    FOLDER/identifiers.json              names of kinds of puzzles; 0 is <blank>
    FOLDER/train|test/dataset.json       sizes and what tokens mean
    FOLDER/train|test/all__inputs.npy, all__labels.npy                       [examples, cells]
    FOLDER/train|test/all__puzzle_identifiers.npy, all__puzzle_indices.npy   [puzzles], [puzzles + 1]
    FOLDER/train|test/all__group_indices.npy                                 [groups + 1]

A group is a puzzle and its variants. Tokens are the paper's: 0 pads, 1 is a blank, d + 1 the digit d.

    python examples/puzzle_folder.py FOLDER --puzzle 9x9 --train 1000 --test 500 --augmentations 100

writes puzzles of reasoning-gym (pip install reasoning-gym==0.1.25) in that layout, those to train on also
with digits, bands, stacks, rows, columns and sides exchanged, as the paper's code does. No puzzle of the test
is among those to train on; of 4x4 there are too few grids for the same of solutions.

Source   dataset/ and puzzle_dataset.py of github.com/SamsungSAILMontreal/TinyRecursiveModels.
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Grids = NDArray[np.uint8]  # [count, side, side], 0 a blank
# what reading a folder raises that is none, or that is broken
UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile)
_KINDS = {"4x4": ("mini_sudoku", 2), "9x9": ("sudoku", 3)}  # reasoning-gym's name; rows of a box


def read(folder: Path, split: str, side: int) -> tuple[Tensor, Tensor]:
    """(puzzles, solutions) [examples, side^2] uint8, 0 a blank, of `split`, "train" or "test".

    Errors: ValueError for a file that is missing, is no such array, or holds no Sudoku of this side.
    """
    part = folder / split
    try:
        about = json.loads((part / "dataset.json").read_text())
        inputs, labels = (
            np.concatenate(
                [np.load(part / f"{name}__{what}.npy", allow_pickle=False) for name in about["sets"]]
            )
            for what in ("inputs", "labels")
        )
    except UNREADABLE as error:
        raise ValueError(f"{part}: expected a folder of the TRM paper's layout, got {error!r}.") from error
    check_shapes(part, inputs, labels, side * side)
    if not np.isin(inputs, range(1, side + 2)).all() or not np.isin(labels, range(2, side + 2)).all():
        raise ValueError(f"{part}: expected tokens 1..{side + 1}, and solutions without a blank; got others.")
    puzzles, solutions = ((tokens - 1).astype(np.uint8) for tokens in (inputs, labels))
    if ((puzzles != solutions) & (puzzles > 0)).any():
        raise ValueError(f"{part}: expected solutions that keep what is given, got others.")
    return torch.from_numpy(puzzles), torch.from_numpy(solutions)


def check_shapes(part: Path, inputs: NDArray[Any], labels: NDArray[Any], cells: int) -> None:
    """Errors: ValueError for what is not [examples, cells] both, or no example."""
    if inputs.ndim != 2 or inputs.shape != labels.shape or inputs.shape[1] != cells or not len(inputs):
        raise ValueError(
            f"{part}: expected inputs and labels [examples, {cells}], got {inputs.shape}, {labels.shape}."
        )


def check_empty(folder: Path) -> None:
    """Errors: ValueError for a folder with something in it, which a run may have been trained on."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: expected a new folder or an empty one, got one with something in it.")


def write(folder: Path, split: str, puzzles: Grids, solutions: Grids, variants: int) -> None:
    """A split, of groups of `variants` puzzles one after the other."""
    part, (count, side, _) = folder / split, puzzles.shape
    part.mkdir(parents=True, exist_ok=True)
    arrays = {
        "inputs": puzzles.reshape(count, -1) + np.uint8(1),
        "labels": solutions.reshape(count, -1) + np.uint8(1),
        "puzzle_identifiers": np.zeros(count, np.int32),
        "puzzle_indices": np.arange(count + 1, dtype=np.int32),
        "group_indices": np.arange(0, count + 1, variants, dtype=np.int32),
    }
    for name, array in arrays.items():
        np.save(part / f"all__{name}.npy", array)
    about: dict[str, Any] = {
        "pad_id": 0,
        "ignore_label_id": 0,
        "blank_identifier_id": 0,
        "vocab_size": side + 2,
        "seq_len": side * side,
        "num_puzzle_identifiers": 1,
        "total_groups": count // variants,
        "mean_puzzle_examples": 1,
        "total_puzzles": count,
        "sets": ["all"],
    }
    (part / "dataset.json").write_text(json.dumps(about))
    (folder / "identifiers.json").write_text(json.dumps(["<blank>"]))


def exchanged(puzzle: Grids, solution: Grids, box: int, random: np.random.Generator) -> tuple[Grids, Grids]:
    """Both [side, side], digits renamed, bands, stacks and what is in them exchanged, perhaps transposed."""
    side = box * box
    digits = np.concatenate([[0], 1 + random.permutation(side)]).astype(np.uint8)

    def order() -> NDArray[np.int64]:
        return np.concatenate([box * band + random.permutation(box) for band in random.permutation(box)])

    rows, columns, is_turned = order(), order(), random.random() < 0.5

    def same(grid: Grids) -> Grids:
        grid = digits[grid][rows][:, columns]
        return grid.T if is_turned else grid

    return same(puzzle), same(solution)


def make(folder: Path, kind: str, train: int, test: int, augmentations: int, seed: int) -> None:
    """Write both splits. Errors: ValueError for counts that make none, and without reasoning-gym."""
    if min(train, test) < 1 or augmentations < 0 or seed < 0:
        raise ValueError(
            "expected --train and --test of at least 1, --augmentations and --seed of at least 0."
        )
    name, box = _KINDS[kind]
    items = _items(name, train + test, seed)
    puzzles, solutions = (
        np.array([item["metadata"][what] for item in items], np.uint8) for what in ("puzzle", "solution")
    )
    random, tested = np.random.default_rng(seed), {grid.tobytes() for grid in puzzles[train:]}
    groups = []
    for pair in zip(puzzles[:train], solutions[:train], strict=True):
        if pair[0].tobytes() in tested:
            continue
        variants = [exchanged(*pair, box, random) for _ in range(augmentations)]
        new = [variant for variant in variants if variant[0].tobytes() not in tested]
        # a group has one length: what was left out is there once more as it came
        groups += [pair, *new, *[pair] * (augmentations - len(new))]
    if not groups:
        raise ValueError("expected puzzles to train on that are not in the test, got none.")
    to_train_on = [np.stack(part) for part in zip(*groups, strict=True)]
    write(folder, "train", to_train_on[0], to_train_on[1], variants=augmentations + 1)
    write(folder, "test", puzzles[train:], solutions[train:], variants=1)


def _items(name: str, count: int, seed: int) -> Any:
    if find_spec("reasoning_gym") is None:
        raise ValueError("expected the package reasoning-gym (pip install reasoning-gym==0.1.25), got none.")
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=count, seed=seed)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Sudoku of reasoning-gym in the TRM paper's layout.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--puzzle", choices=_KINDS, default="4x4")
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--augmentations", type=int, default=10, help="of each puzzle to train on")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        check_empty(given.folder)
        make(given.folder, given.puzzle, given.train, given.test, given.augmentations, given.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{given.folder}: {given.train:,} puzzles to train on, {given.test:,} held out")


if __name__ == "__main__":
    main()
