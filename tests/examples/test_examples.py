"""The examples: Sudoku is Sudoku, held out is held out, and the model learns, saves and loads."""

import re
from dataclasses import replace
from itertools import product

import pytest
import sudoku as puzzles_of
import tiny_recursive_models as example
import torch
from puzzles import training
from safetensors.torch import load_file, save_file
from torch import nn

SMALL = ["--hidden-size", "16", "--batch-size", "4"]


@pytest.fixture
def few_puzzles(monkeypatch):
    monkeypatch.setattr(example, "HELD_OUT", 20)
    monkeypatch.setitem(example.PUZZLES, "4x4", replace(example.PUZZLES["4x4"], puzzles=50))


def lines_of(grid, box):
    """Rows, columns and boxes of a grid, as lists."""
    (high, wide), cells = box, grid.tolist()
    side = high * wide
    rows = [cells[i * side : (i + 1) * side] for i in range(side)]
    boxes = [
        [rows[high * a + i][wide * b + j] for i, j in product(range(high), range(wide))]
        for a, b in product(range(wide), range(high))
    ]
    return rows + [list(column) for column in zip(*rows, strict=True)] + boxes


def solve(puzzle, box, limit=2):
    """How many solutions a puzzle has, up to `limit`: by trying."""
    if 0 not in puzzle:
        return 1
    (high, wide), at = box, puzzle.index(0)
    side = high * wide
    row, column = divmod(at, side)
    seen = {
        puzzle[i]
        for i in range(side * side)
        if i // side == row
        or i % side == column
        or (i // side // high, i % side // wide) == (row // high, column // wide)
    }
    found = 0
    for digit in set(range(1, side + 1)) - seen:
        found += solve([*puzzle[:at], digit, *puzzle[at + 1 :]], box, limit - found)
        if found >= limit:
            break
    return found


@pytest.mark.parametrize(
    ("box", "givens"), [((2, 2), (4, 6)), ((2, 3), (14, 22)), ((3, 2), (14, 22)), ((3, 3), (33, 45))]
)
def test_puzzles_have_one_solution_and_it_is_this_one(box, givens):
    side = box[0] * box[1]
    for held_out in (False, True):
        puzzles, solutions = puzzles_of.sudoku(40, box, givens, seed=1, held_out=held_out)
        assert puzzles.shape == solutions.shape == (40, side * side)
        for grid in solutions:
            assert all(sorted(line) == list(range(1, side + 1)) for line in lines_of(grid, box))
        number = (puzzles > 0).sum(-1)
        assert givens[0] <= number.min() and number.max() <= givens[1] and number.unique().numel() > 1
        assert torch.equal(puzzles[puzzles > 0], solutions[puzzles > 0])
        assert all(solve(puzzle, box) == 1 for puzzle in puzzles[: 8 if side == 9 else 40].tolist())


def test_a_puzzle_that_singles_do_not_solve_is_not_taken():
    solutions = puzzles_of.solved_grids(200, (2, 2), torch.Generator().manual_seed(0))
    blanked = torch.where(torch.rand(solutions.shape) < 0.3, solutions, 0)
    solved = puzzles_of.solved_by_singles(blanked, (2, 2))
    several = torch.tensor([solve(puzzle, (2, 2)) > 1 for puzzle in blanked.tolist()])
    assert solved.any() and several.any() and not (solved & several).any()
    with pytest.raises(ValueError, match=r"givens that leave one solution, got \(1, 2\)"):
        puzzles_of.sudoku(10, (2, 2), (1, 2), seed=0)


def test_no_solution_is_in_both_parts_and_a_seed_says_which_puzzles():
    parts = [puzzles_of.sudoku(300, (2, 2), (4, 6), seed, held) for seed in (0, 1) for held in (False, True)]
    seen = [{tuple(grid) for grid in solutions.tolist()} for _, solutions in parts]
    assert not (seen[0] | seen[2]) & (seen[1] | seen[3])
    grids = puzzles_of.solved_grids(4000, (2, 2), torch.Generator().manual_seed(0)).unique(dim=0)
    assert len(grids) == 192
    assert float(puzzles_of.is_held_out(grids).float().mean()) == pytest.approx(1 / 8, abs=0.05)
    again = puzzles_of.sudoku(300, (2, 2), (4, 6), 0)
    assert torch.equal(again[0], parts[0][0]) and not torch.equal(again[0], parts[2][0])
    nine = [puzzles_of.sudoku(50, (3, 3), (40, 45), 0, held)[1] for held in (False, True)]
    assert puzzles_of.is_held_out(nine[1]).all() and not puzzles_of.is_held_out(nine[0]).any()


def small(puzzle="4x4", **changes):
    torch.manual_seed(0)
    fields = {"hidden_size": 16, "num_heads": 2, "batch_size": 8, "puzzles": 64} | changes
    return replace(example.PUZZLES[puzzle], **fields)


@pytest.mark.parametrize("mlp_t", [True, False])
@pytest.mark.parametrize("puzzle", ["4x4", "9x9"])
def test_a_few_steps_reduce_the_loss(puzzle, mlp_t):
    steps = 40 if puzzle == "4x4" else 12
    settings = small(puzzle, mlp_t=mlp_t, steps=steps, learning_rate=5e-2, n=1, cycles=2, prefix=2)
    settings = replace(settings, recursion_curriculum=None, warmup_steps=1, weight_decay=0.1)
    model = example.make_model(settings)
    trained = example.train(model, *puzzles_of.sudoku(64, settings.box, settings.givens, 0), settings)
    losses = trained.losses
    assert len(losses) == steps
    assert sum(losses[-3:]) / 3 < 0.95 * sum(losses[:3]) / 3
    assert model.puzzle_emb["weights"].abs().sum() > 0
    assert not torch.equal(trained.average.lm_head.weight, model.lm_head.weight)


def test_without_a_curriculum_nothing_changes_and_with_one_fewer_operations_do():
    def trained(curriculum):
        settings = small(steps=6, recursion_curriculum=curriculum)
        model = example.make_model(settings)
        torch.manual_seed(1)
        done = example.train(model, *puzzles_of.sudoku(64, settings.box, settings.givens, 0), settings)
        return done, list(model.parameters())

    (full, weights), (again, same) = trained(None), trained(None)
    assert full.losses == again.losses and all(map(torch.equal, weights, same))
    shallow, others = trained("1x1:4")
    assert not all(map(torch.equal, weights, others))
    # one cycle of one step is 2 evaluations of f forward and 2 backward, two of two are 6 and 3
    counts = []
    for depth in (1, 2):
        one = small(n=depth, cycles=depth, recursion_curriculum=None, steps=1)
        data = puzzles_of.sudoku(64, one.box, one.givens, 0)
        counts.append(example.train(example.make_model(one), *data, one).operations)
    low, high = counts
    assert shallow.operations == 4 * low + 2 * high and full.operations == 6 * high
    assert low < 0.6 * high


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2", "expected FIRST:STEPS"),
        ("2x2:5", "it would have no effect"),
        ("3:5", "at most 2x2, got 3x2"),
        ("1:301", "within 300 steps"),
    ],
)
def test_a_curriculum_that_cannot_be_is_an_error(text, message, capsys):
    with pytest.raises(SystemExit) as stop:
        example.main(["--recursion-curriculum", text])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_rows_halt_and_make_way_for_new_puzzles():
    settings = small()
    model = example.make_model(settings)
    old, new = puzzles_of.sudoku(4, (2, 2), (4, 6), 0), puzzles_of.sudoku(4, (2, 2), (4, 6), 1)
    nn.init.constant_(model.q_head.bias, 5.0)
    old, new = (example.batch_of(*pair) for pair in (old, new))
    y, z = (t.clone().normal_() for t in model.start(old.inputs))
    halted = torch.tensor([True, False, False, True])
    carry = training.Carry(y, z, old, torch.tensor([4, 1, 3, 2]), halted)
    carry = training.refill(model, carry, new)
    after, before = (*model.start(new.inputs), *new), (y, z, *old)
    for got, fresh, kept in zip((carry.y, carry.z, *carry.batch), after, before, strict=True):
        assert torch.equal(got[halted], fresh[halted]) and torch.equal(got[~halted], kept[~halted])
    assert carry.steps.tolist() == [0, 1, 3, 0] and not carry.halted.any()

    loss, after = training.supervise(model, carry, most_steps=4)
    assert after.steps.tolist() == [1, 2, 4, 1] and loss.requires_grad and not after.y.requires_grad
    assert after.halted[2] and not torch.equal(after.y, carry.y)
    nn.init.constant_(model.q_head.bias, -5.0)
    assert training.supervise(model, carry, most_steps=4)[1].halted.tolist() == [False, False, True, False]
    with pytest.MonkeyPatch.context() as patch:
        nn.init.constant_(model.q_head.bias, 5.0)
        patch.setattr(training, "EXPLORATION", 0.0)
        assert training.supervise(model, carry, most_steps=4)[1].halted.all()


def test_evaluation_counts_whole_grids_and_blanks():
    puzzles, solutions = puzzles_of.sudoku(6, (2, 2), (4, 6), 0)
    model = example.make_model(small())
    logits = nn.functional.one_hot(solutions + 1, 6).float()
    first_blank = int((puzzles[0] == 0).int().argmax())
    logits[0, first_blank] = 0.0
    logits[1, puzzles[1] > 0] = 0.0  # a given that is answered wrong spoils the grid, and no blank
    said = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    model.read = lambda y: (logits, said)
    shares = example.evaluate(model, puzzles, solutions, supervision_steps=3)
    blanks = int((puzzles == 0).sum())
    assert len(shares) == 3
    assert shares[0] == pytest.approx([4 / 6, (blanks - 1) / blanks, 0.5])


@pytest.mark.parametrize("mixer", ["--mlp-t", "--no-mlp-t"])
def test_weights_go_to_disk_under_the_papers_names_and_back(mixer, few_puzzles, tmp_path, capsys):
    file, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    example.main([*SMALL, mixer, "--steps", "3", "--seed", "1", "--save", str(file)])
    after = capsys.readouterr().out.split("supervision steps")[1]
    tensors = load_file(file)
    assert {name for name in tensors if "layers" not in name} == {
        "inner.H_init",
        "inner.L_init",
        "inner.embed_tokens.embedding_weight",
        "inner.lm_head.weight",
        "inner.puzzle_emb.weights",
        "inner.q_head.bias",
        "inner.q_head.weight",
    }
    layer = "mlp_t.gate_up_proj" if mixer == "--mlp-t" else "self_attn.qkv_proj"
    assert f"inner.L_level.layers.1.{layer}.weight" in tensors

    save_file({f"_orig_mod.model.{name}": tensor for name, tensor in tensors.items()}, file)
    example.main(
        [*SMALL, mixer, "--steps", "0", "--seed", "1", "--checkpoint", str(file), "--save", str(again)]
    )
    loaded = capsys.readouterr().out.split("supervision steps")[1]
    assert re.findall(r"[\d.]+%", loaded) == re.findall(r"[\d.]+%", after)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(again).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("inner.lm_head.weight"), "expected beside the recursion"),
        (lambda t: t.pop("inner.H_init"), "y_init: expected (16,), got no such tensor"),
        (lambda t: t.update({"inner.embed_pos.embedding_weight": torch.zeros(3)}), "embed_pos"),
        (lambda t: t.update({"inner.q_head.bias": torch.zeros(3)}), "'q_head.bias': (3,)"),
        (lambda t: t.update({"inner.L_init": torch.zeros(3)}), "z_init: expected (16,), got (3,)"),
        (lambda t: t.update({"a.L_level.layers.0.mlp.down_proj.weight": torch.zeros(3)}), "got it twice"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(change, message, tmp_path, capsys):
    example.save(example.make_model(small()), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(SystemExit):
        example.main([*SMALL, "--steps", "0", "--checkpoint", str(tmp_path / "a.safetensors")])
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_safetensors_is_not_opened_as_anything_else(tmp_path, capsys):
    torch.save({"inner.H_init": torch.zeros(16)}, tmp_path / "pickle.pt")
    for name in ("pickle.pt", "none.safetensors"):
        with pytest.raises(SystemExit):
            example.main([*SMALL, "--checkpoint", str(tmp_path / name)])
    assert capsys.readouterr().err.count("error:") == 2


@pytest.mark.parametrize(
    "option", [("--batch-size", "0"), ("--steps", "-1"), ("--hidden-size", "6"), ("--n", "0")]
)
def test_numbers_that_make_no_run_are_an_error(option, few_puzzles, capsys):
    with pytest.raises(SystemExit):
        example.main([*option, "--steps", "0"] if option[0] != "--steps" else [*option])
    assert "expected" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2))
def test_4x4_is_learned(seed, capsys):
    """The whole run of the README."""
    example.main(["--puzzle", "4x4", "--seed", str(seed)])
    shown = capsys.readouterr().out
    (trained,) = re.findall(r"whole grid right \|.*?\|.*?\| +([\d.]+)%", shown)  # after 4 supervision steps
    assert "step 0: 0.0% of the held-out grids are right" in shown and float(trained) > 90
