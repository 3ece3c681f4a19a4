"""Folders of the TRM paper's layout: written, read, trained on; and what is no such folder."""

import json
from importlib.util import find_spec

import numpy as np
import puzzle_folder
import pytest
import sudoku as puzzles_of
import tiny_recursive_models as example
import torch


def items(count, seed, held_out=False):
    """As reasoning-gym gives them."""
    puzzles, solutions = puzzles_of.sudoku(count, (2, 2), (4, 6), seed, held_out)
    pairs = zip(puzzles.view(-1, 4, 4).tolist(), solutions.view(-1, 4, 4).tolist(), strict=True)
    return [{"metadata": {"puzzle": puzzle, "solution": solution}} for puzzle, solution in pairs]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(puzzle_folder, "_items", lambda name, count, seed: items(count, seed))
    counts = ["--train", "12", "--test", "5", "--augmentations", "3"]
    puzzle_folder.main([str(tmp_path / "data"), *counts])
    return tmp_path / "data"


def test_a_folder_has_the_papers_layout(folder):
    for split, count, groups in (("train", 48, 12), ("test", 5, 5)):
        arrays = {
            name: np.load(folder / split / f"all__{name}.npy")
            for name in ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")
        }
        about = json.loads((folder / split / "dataset.json").read_text())
        assert {name: array.shape for name, array in arrays.items()} == {
            "inputs": (count, 16),
            "labels": (count, 16),
            "puzzle_identifiers": (count,),
            "puzzle_indices": (count + 1,),
            "group_indices": (groups + 1,),
        }
        assert arrays["group_indices"][-1] == arrays["puzzle_indices"][-1] == count
        assert (about["seq_len"], about["vocab_size"], about["total_groups"]) == (16, 6, groups)
        assert arrays["inputs"].min() == 1 and arrays["labels"].min() == 2 and arrays["labels"].max() == 5
    assert json.loads((folder / "identifiers.json").read_text()) == ["<blank>"]


def test_variants_are_sudoku_and_no_puzzle_of_the_test_is_trained_on(folder):
    train, test = (puzzle_folder.read(folder, split, 4) for split in ("train", "test"))
    assert not {tuple(p) for p in train[0].tolist()} & {tuple(p) for p in test[0].tolist()}
    puzzles, solutions = train
    assert puzzles_of.solved_by_singles(puzzles.long(), (2, 2)).all()
    assert torch.equal(puzzles[puzzles > 0], solutions[puzzles > 0])
    grids = solutions.view(-1, 4, 4)
    boxes = grids.view(-1, 2, 2, 2, 2).transpose(2, 3).reshape(-1, 4, 4)
    for lines in (grids, grids.mT, boxes):
        assert (lines.sort(-1).values == torch.arange(1, 5)).all()
    variants = puzzles.view(12, 4, 16)
    assert all(len(group.unique(dim=0)) > 1 for group in variants)
    given = (variants > 0).sum(-1)
    assert (given == given[:, :1]).all()  # a variant has as many givens as its puzzle


def test_9x9_is_exchanged_by_bands():
    (puzzles, solutions), random = puzzles_of.sudoku(3, (3, 3), (40, 45), 0), np.random.default_rng(0)
    for puzzle, solution in zip(puzzles, solutions, strict=True):
        pair = [t.view(9, 9).numpy().astype(np.uint8) for t in (puzzle, solution)]
        other, solved = (torch.from_numpy(t.copy()).long() for t in puzzle_folder.exchanged(*pair, 3, random))
        assert not torch.equal(other.flatten(), puzzle)
        assert puzzles_of.solved_by_singles(other.reshape(1, 81), (3, 3)).all()
        assert torch.equal(other[other > 0], solved[other > 0])


def test_a_model_trains_on_a_folder_and_goes_on(folder, tmp_path, capsys):
    small = ["--hidden-size", "16", "--batch-size", "4", "--steps", "2", "--data", str(folder)]
    weights = str(tmp_path / "a.safetensors")
    example.main([*small, "--save", weights])
    assert "48 puzzles to train on" in (said := capsys.readouterr().out) and "5 puzzles held out" in said
    example.main([*small, "--checkpoint", weights, "--save", weights])
    assert "whole grid right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda part: (part / "dataset.json").unlink(), "a folder of the TRM paper's layout"),
        (lambda part: (part / "dataset.json").write_text("[]"), "a folder of the TRM paper's layout"),
        (lambda part: (part / "all__labels.npy").unlink(), "a folder of the TRM paper's layout"),
        (lambda part: np.save(part / "all__labels.npy", np.ones((5, 9))), r"expected inputs and labels"),
        (lambda part: np.save(part / "all__labels.npy", np.ones((5, 16))), "solutions without a blank"),
        (lambda part: np.save(part / "all__labels.npy", np.full((5, 16), 9)), "expected tokens 1..5"),
        (lambda part: np.save(part / "all__inputs.npy", np.full((5, 16), 3)), "keep what is given"),
        (
            lambda part: np.save(part / "all__inputs.npy", np.array([object()]), allow_pickle=True),
            "a folder of the TRM paper's layout",
        ),
    ],
)
def test_what_is_no_such_folder_is_an_error(break_it, message, folder, capsys):
    break_it(folder / "test")
    with pytest.raises(SystemExit) as stop:
        example.main(["--data", str(folder)])
    assert stop.value.code == 2 and message[:20] in capsys.readouterr().err
    with pytest.raises(ValueError, match=message):
        puzzle_folder.read(folder, "test", 4)


def test_counts_that_make_no_folder_are_an_error(tmp_path, capsys):
    for wrong in (["--train", "0"], ["--test", "0"], ["--augmentations", "-1"], ["--seed", "-1"]):
        with pytest.raises(SystemExit):
            puzzle_folder.main([str(tmp_path / "data"), *wrong])
        assert "expected --train and --test of at least 1" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


@pytest.mark.skipif(
    find_spec("reasoning_gym") is None, reason="no reasoning-gym: its pycosat wants a C compiler"
)
@pytest.mark.parametrize(("kind", "side"), [("4x4", 4), ("9x9", 9)])
def test_reasoning_gyms_puzzles(kind, side, tmp_path):
    counts = ["--train", "3", "--test", "2", "--augmentations", "1"]
    puzzle_folder.main([str(tmp_path), "--puzzle", kind, *counts])
    assert len(puzzle_folder.read(tmp_path, "train", side)[0]) == 6
