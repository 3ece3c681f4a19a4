"""Training bfloat16 weights: what is too small for one step counts in many, and runs resume exactly."""

import shutil

import pytest
import torch
from accelerate.utils import gather_object
from transformers import AutoModelForCausalLM

from hybrid.training.loop import train
from hybrid.training.optimizer import adamw, set_rate
from hybrid.training.phases import enter
from hybrid.training.settings import TrainSettings
from tests.hybrid.training.test_train import Stopped, assert_equal, lines_of, settings_for, stop_after
from tests.support import ranks
from tests.support.tiny_text import Counting, tiny_base, tiny_hybrid


@pytest.fixture
def torchao():
    pytest.importorskip("torchao.optim", reason="torchao is not installed")
    # its step is compiled for each shape; what it computes is the same without
    with torch.compiler.set_stance("force_eager"):
        yield


def in_bfloat16(dropout=0.2):
    """In phase 2: the base's weights are bfloat16, the block's float32."""
    model = tiny_hybrid(tiny_base(dropout).bfloat16(), recursion_sampling="fixed")
    enter(model, 2)
    return model


def settings_of_two(folder, **changes):
    few = {"steps": 6, "batch_size": 1, "learning_rate": 2e-3, "log_every": 1, "save_every": 3}
    return TrainSettings(folder, stochastic_rounding=True, **few | changes)


def losses_of(folder):
    parts = [{"loss": line.get("loss")} | line.get("held_out", {}) for line in lines_of(folder)]
    return [loss for part in parts for loss in part.values() if loss is not None]


def moved(stochastic_rounding, steps=64, rate=1e-4):
    """The mean way of 10,000 weights of 1, each step of which is `rate`: 1/39 of half their last bit."""
    weight = torch.nn.Parameter(torch.ones(100, 100, dtype=torch.bfloat16))
    torch.manual_seed(0)
    optimizer = adamw({"weight": weight}, 1.0, (0.9, 0.95), 0.0, stochastic_rounding)
    set_rate(optimizer, rate)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return 1 - weight.float().mean().item()


def test_steps_below_half_of_the_last_bit_count_on_average():
    """As a user runs it, compiled: what is drawn comes from the generator that is seeded."""
    pytest.importorskip("torchao.optim", reason="torchao is not installed")
    # a weight of 1 goes down by 2^-8 or not at all: the mean of 10,000 after 64 steps is known to 5e-5
    assert (way := moved(True)) == pytest.approx(64e-4, abs=2e-4)
    assert moved(True) == way


def test_rounded_to_the_nearest_they_are_lost():
    with pytest.warns(UserWarning, match=r"AdamW rounds 1 bfloat16 tensors \(weight, ...\) to the nearest"):
        assert moved(False) == 0


def test_it_learns_and_resumes_bit_for_bit(torchao, tmp_path):
    held_out = {"new": Counting(7, first=30)}
    straight = in_bfloat16()
    before = {name: p.detach().clone() for name, p in straight.named_parameters()}
    settings = {"stochastic_rounding": True, "learning_rate": 2e-3}
    result = train(straight, Counting(), settings_for(tmp_path / "a", **settings), held_out)
    assert result.held_out_after["new"] < result.held_out_before["new"] - 0.3
    assert {p.dtype for _, p in straight.base_named_parameters()} == {torch.bfloat16}
    assert {p.dtype for p in straight.trm_parameters()} == {torch.float32}
    assert not [name for name, p in straight.named_parameters() if torch.equal(p, before[name])]

    with pytest.raises(Stopped):
        settings_of_b = settings_for(tmp_path / "b", **settings)
        train(in_bfloat16(), Counting(), settings_of_b, held_out, on_step=stop_after(13))
    resumed = in_bfloat16()
    train(resumed, Counting(), settings_of_b, held_out, resume=True)
    assert_equal(resumed, straight)
    assert lines_of(tmp_path / "b") == lines_of(tmp_path / "a")
    files = {path.name for path in result.checkpoint.iterdir()}
    assert not [name for name in files if not name.endswith((".json", ".safetensors", ".py"))], "no pickle"
    saved = AutoModelForCausalLM.from_pretrained(result.checkpoint)
    assert {p.dtype for _, p in saved.base_named_parameters()} == {torch.bfloat16}


def train_on_two(folder):
    for name in ("copies", "split"):
        model = in_bfloat16(dropout=0)
        train(model, Counting(), settings_of_two(folder / name, shard=name == "split"), {"new": Counting(5)})
        if name == "copies":
            weights = [torch.cat([p.detach().float().reshape(-1) for p in model.parameters()]).tolist()]
            one, other = gather_object(weights)
            assert one == other, "a copy was rounded another way"


def test_copies_stay_equal_and_parts_are_put_together(torchao, tmp_path):
    """Two processes, each with a copy of the model, then each with a part of it."""
    ended = ranks.run(lambda: train_on_two(tmp_path))
    assert ended.returncode == 0, ended.stderr[-3000:]
    copies, split = (losses_of(tmp_path / name) for name in ("copies", "split"))
    assert split == pytest.approx(copies, rel=1e-2)  # rounded apart

    # a plain folder, from which one process goes on in the middle
    shutil.rmtree(tmp_path / "split" / "checkpoint-000006")
    settings = settings_of_two(tmp_path / "split", batch_size=2)
    train(in_bfloat16(dropout=0), Counting(), settings, {"new": Counting(5)}, resume=True)
    alone = losses_of(tmp_path / "split")
    assert alone[:4] == split[:4] and alone == pytest.approx(split, rel=1e-2)
    assert alone[-1] < alone[0] - 0.05, "held out"


def test_there_must_be_something_to_round(torchao, tmp_path):
    model = tiny_hybrid()
    enter(model, 2)
    with pytest.raises(ValueError, match="bfloat16 weights that learn, for stochastic rounding, got float32"):
        train(model, Counting(), settings_for(tmp_path, stochastic_rounding=True))


def test_without_torchao_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr("hybrid.extras.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"rounding: expected the package torchao \(pip install 'trm-hybrid\[to"
    ):
        TrainSettings(tmp_path, steps=1, stochastic_rounding=True)
