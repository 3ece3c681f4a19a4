"""What is kept, with the base as its target: the loss is what the injections add, and falls."""

import pytest
import torch

from hybrid.cli import main
from hybrid.training.loop import train
from hybrid.training.phases import enter
from tests.hybrid.cli.test_cli import options, refused
from tests.hybrid.training.test_train import lines_of, settings_for
from tests.support.tiny import awaken, tokens
from tests.support.tiny import tiny_hybrid as hybrid_of_three_points
from tests.support.tiny_text import FIELDS, Counting, save_base, tiny_base, tiny_hybrid


class OfTwoLengths(Counting):
    def __getitem__(self, index):
        return {name: t[: 12 - index % 2] for name, t in super().__getitem__(index).items()}


def run(folder, target, hybrid=None, keep=None, **changes):
    hybrid = tiny_hybrid() if hybrid is None else hybrid
    enter(hybrid, 1)
    losses = {}
    settings = settings_for(folder, keep_ratio=0.5, keep_target=target, **({"steps": 12} | changes))
    keep = Counting(first=7) if keep is None else keep
    train(hybrid, Counting(), settings, keep=keep, on_step=losses.__setitem__)
    return hybrid, losses


def added_to(hybrid, ids) -> float:
    with torch.no_grad(), hybrid.eval().recording_what_is_added() as added:
        hybrid(ids, use_cache=False)
    return torch.stack(added).mean().item()


def test_what_is_recorded_is_what_each_point_adds():
    hybrid = hybrid_of_three_points()
    seen = []
    for module in hybrid.modules():
        if type(module).__name__ == "Injection":
            module.register_forward_hook(lambda _, args, h: seen.append((args[0], h)))
    with torch.no_grad(), hybrid.recording_what_is_added() as added:
        hybrid(tokens(), use_cache=False)
        with hybrid.disable_injection():
            hybrid(tokens(), use_cache=False)
    assert len(added) == 3
    for share, (before, after) in zip(added, seen, strict=True):
        expected = (after - before).norm(dim=-1) ** 2 / before.norm(dim=-1) ** 2
        torch.testing.assert_close(share, expected)
    hybrid(tokens(), use_cache=False)
    assert len(added) == 3, "nothing is recorded afterwards"


def test_a_hybrid_of_its_base_adds_nothing():
    assert added_to(hybrid_of_three_points(awake=False), tokens()) == 0.0


def test_kept_text_is_left_alone(tmp_path):
    """More than where it is learned like the rest."""
    kept = torch.stack([Counting(first=7)[i]["input_ids"] for i in range(12)])
    added = {}
    for target in ("labels", "base"):
        hybrid, losses = run(tmp_path / target, target, awaken(tiny_hybrid()), steps=40)
        assert losses[40] < losses[1]
        added[target] = added_to(hybrid, kept)
    assert added["base"] < 0.3 * added["labels"]


def test_the_first_loss_is_half_of_the_data_and_half_of_what_is_added(tmp_path):
    """Rows of two lengths: what pads them does not count."""
    hybrid = awaken(tiny_hybrid())
    items = [OfTwoLengths(first=7)[i] for i in range(40)]
    _, losses = run(
        tmp_path, "base", hybrid, OfTwoLengths(first=7), steps=1, batch_size=80, learning_rate=1e-12
    )
    added, counted = 0.0, 0
    with torch.no_grad(), hybrid.eval().recording_what_is_added() as each:
        for item in items:
            hybrid(item["input_ids"][None], use_cache=False)
    added = sum(t.sum().item() for t in each)
    counted = sum(t.numel() for t in each)
    rows = torch.stack([Counting()[i]["input_ids"] for i in range(40)])
    with torch.no_grad():
        of_data = hybrid(rows, labels=rows, use_cache=False).loss.item()
    assert losses[1] == pytest.approx((of_data + added / counted) / 2, rel=1e-4)


def test_what_cannot_be_asked_for(tmp_path):
    with pytest.raises(ValueError, match="keep_target='base' expected a keep_ratio, got none"):
        settings_for(tmp_path, keep_target="base")
    with pytest.raises(ValueError, match="keep_target to be one of labels, base, got 'logits'"):
        settings_for(tmp_path, keep_ratio=0.5, keep_target="logits")
    with pytest.raises(ValueError, match="expected a HybridModel, got LlamaForCausalLM"):
        train(
            tiny_base(),
            Counting(),
            settings_for(tmp_path, keep_ratio=0.5, keep_target="base"),
            keep=Counting(),
        )


def test_the_command(tmp_path, capsys):
    text = tmp_path / "known.txt"
    text.write_text("one and two and three. " * 40)
    words = ["train", "--base", save_base(tmp_path / "base"), "--keep", text, "--steps", 8]
    words += ["--sequence-length", 16, "--learning-rate", 1e-2, *options(FIELDS), "--log-every", 1]
    losses = {}
    for target in ("labels", "base"):
        output = tmp_path / target
        more = ["--data", text, "--output", output, "--keep-ratio", 0.5, "--keep-target", target]
        assert main([str(word) for word in (*words, *more)]) == 0
        losses[target] = [line["loss"] for line in lines_of(output) if "loss" in line]
    # a fresh hybrid adds nothing: half of the loss is zero
    assert losses["base"][0] == pytest.approx(losses["labels"][0] / 2, rel=0.1)
    capsys.readouterr()
    some = [word for word in words if word not in ("--keep", text)]
    message = refused(capsys, *some, "--data", text, "--output", tmp_path / "c", "--keep-target", "base")
    assert "keep_target='base' expected a keep_ratio" in message
