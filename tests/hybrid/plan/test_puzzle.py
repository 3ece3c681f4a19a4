"""trm-hybrid plan --trm: operations as a real step has them, the paper's sizes, and what cannot be asked."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hybrid.cli import main
from hybrid.plan import puzzle as puzzles
from hybrid.plan.cards import CARDS
from hybrid.plan.puzzle import PUZZLES, Puzzle, depths, plan_puzzle, step_flops
from trm_kernels import TRM, Depth

H100 = CARDS["H100-80GB"]


@pytest.fixture
def small(monkeypatch):
    for name, value in {"_WIDTH": 16, "_HEADS": 2, "_PREFIX": 2, "_BATCH": 3}.items():
        monkeypatch.setattr(puzzles, name, value)
    return Puzzle(7, 5, False, Depth(3, 2), 100, 1, (1.0, False, 1, H100))


def counted(puzzle: Puzzle, depth: Depth) -> int:
    """Operations of one real step on the CPU: the recursion and a head on all tokens."""
    trm = TRM(
        16,
        2,
        mlp_t=puzzle.mlp_t,
        seq_len=puzzle.tokens if puzzle.mlp_t else None,
        attention="reference",
    )
    head, x = nn.Linear(16, puzzle.vocabulary, bias=False), torch.randn(3, puzzle.tokens, 16)
    with FlopCounterMode(display=False) as counter:
        y, _ = trm(x.requires_grad_(), **depth._asdict())
        head(y).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("depth", [Depth(3, 2), Depth(1, 1)])
def test_operations_are_those_of_a_real_step(depth, small):
    mixed_by_mlp = replace(small, mlp_t=True)
    assert step_flops(mixed_by_mlp, depth).all == counted(mixed_by_mlp, depth)
    planned = step_flops(small, depth)
    # the reference's attention keeps its weights, so that its backward is twice its forward, not 2.5 times
    evaluations, learning = depth.num_cycles * (depth.num_recursion_steps + 1), depth.num_recursion_steps + 1
    kept = (evaluations + 2 * learning) / (evaluations + 2.5 * learning)
    assert planned.products + kept * planned.attention == pytest.approx(counted(small, depth), rel=1e-12)
    assert planned.attention > 0 == step_flops(mixed_by_mlp, depth).attention


def test_a_curriculum_has_every_step_and_ends_at_the_whole_depth(small):
    puzzle = replace(small, depth=Depth(4, 2))
    found = depths(puzzle)
    # n and T rise from 2 and 1 within 60 of 100 steps
    assert found == {Depth(2, 1): 30, Depth(3, 1): 30, Depth(4, 2): 40}
    made = plan_puzzle(puzzle, 1, H100)
    steps = sum(n * step_flops(puzzle, depth).all for depth, n in found.items())
    assert made.shallow.operations == pytest.approx(steps, rel=1e-12)
    assert made.whole.operations == 100 * step_flops(puzzle, puzzle.depth).all


def test_the_papers_sizes_and_its_hours():
    plans = {name: plan_puzzle(puzzle, 1, H100) for name, puzzle in PUZZLES.items()}
    # 5 M with the MLP over the tokens, 7 M with attention (arXiv 2510.04871)
    assert [round(plan.parameters / 1e6) for plan in plans.values()] == [5, 7, 7]
    for plan in plans.values():
        assert plan.shallow.hours < plan.whole.hours
        assert 0.05 < plan.published.hours / plan.puzzle.published[0] < 1  # the least is less than was taken
        assert plan.memory["all"] > plan.memory["layer"] > plan.memory["step"]
    two = plan_puzzle(PUZZLES["arc"], 2, H100)
    assert two.whole.hours == pytest.approx(plans["arc"].whole.hours / 2)
    assert two.memory["all"] < plans["arc"].memory["all"]


def test_the_command(capsys):
    command = ["plan", "--trm", "sudoku", "--cards", "1xH100-80GB"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "65,104 steps of 768 puzzles of 97 tokens on 1x H100-80GB" in text
    assert "published: about 18 hours on 1x L40S" in text
    assert main([*command, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["operations"] == plan_puzzle(PUZZLES["sudoku"], 1, H100).whole.operations
    assert set(figures["memory_bytes"]) == {"all", "layer", "step"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trm", "arc"], "expected --cards, such as 1xH100-80GB; got none"),
        (["--trm", "arc", "--cards", "5xH100-80GB"], "to divide a batch of 768 puzzles, got 5"),
        (["--trm", "arc", "--cards", "1xH100-80GB", "--phase", "2"], "expected no --phase with --trm"),
        (["--trm", "arc", "--cards", "1xH100-80GB", "--num-cycles", "2"], "expected no --num-cycles with"),
        (["--trm", "arc", "--cards", "1xH100-80GB", "--base", "qwen3-8b"], "expected no --base with --trm"),
        (["--trm", "chess", "--cards", "1xH100-80GB"], "invalid choice: 'chess'"),
    ],
)
def test_what_cannot_be_asked(words, message, capsys):
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err
