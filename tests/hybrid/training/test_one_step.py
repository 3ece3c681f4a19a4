"""What one training step is: a clipped gradient, AdamW with the settings' numbers, modules in train mode."""

import pytest
import torch

from hybrid.training.loop import train
from tests.hybrid.training.test_train import phase_1, settings_for
from tests.support.tiny_text import Counting, tiny_base


def test_a_run_is_clipped_adamw_and_no_more(tmp_path):
    """Held against a loop of eight lines, in float64; no setting has the value that is torch's default."""
    data = Counting(3)
    chosen = {"weight_decay": 0.3, "betas": (0.6, 0.7), "max_grad_norm": 1e-6, "warmup_steps": 2}
    settings = settings_for(tmp_path, steps=5, log_every=1, **chosen)
    ours, by_hand = tiny_base().double(), tiny_base().double()
    train(ours, data, settings)

    rows = {name: torch.stack([data[i][name] for i in range(3)]) for name in data[0]}
    optimizer = torch.optim.AdamW(by_hand.parameters(), betas=(0.6, 0.7), weight_decay=0.3)
    for step in range(5):
        optimizer.zero_grad()
        by_hand(**rows).loss.backward()
        norm = torch.stack([p.grad.norm() for p in by_hand.parameters()]).norm()
        assert norm > 1e-2, "every step is clipped, to where AdamW's eps shows by how much"
        for p in by_hand.parameters():
            p.grad.mul_(1e-6 / norm)
        optimizer.param_groups[0]["lr"] = settings.rate_at(step)
        optimizer.step()

    for (name, got), want in zip(ours.named_parameters(), by_hand.parameters(), strict=True):
        # torch's clipping adds 1e-6 to the norm it divides by
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7, msg=lambda says, n=name: f"{n}: {says}")


def test_gradients_below_the_limit_stay_as_they_are(tmp_path):
    data, by_hand, ours = Counting(1), tiny_base().double(), tiny_base().double()
    settings = settings_for(tmp_path, steps=1, batch_size=1, max_grad_norm=1e3, weight_decay=0.0)
    optimizer = torch.optim.AdamW(by_hand.parameters(), settings.rate_at(0), (0.9, 0.95), weight_decay=0.0)
    by_hand(**{name: t[None] for name, t in data[0].items()}).loss.backward()
    optimizer.step()
    train(ours, data, settings)
    for got, want in zip(ours.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def modes_in_forwards(model):
    """A list that each forward adds its mode to: True for all modules in train mode, False for none."""
    modes = []

    def note(*_):
        (mode,) = {module.training for module in model.modules()}
        modes.append(mode)

    model.register_forward_pre_hook(note)
    return modes


@pytest.mark.parametrize("make", [phase_1, lambda: tiny_base(dropout=0.2)], ids=["hybrid", "plain"])
def test_steps_train_and_held_out_losses_do_not(make, tmp_path):
    """Also after an evaluation between steps, and for a model that comes in eval mode."""
    model = make().eval()
    modes = modes_in_forwards(model)
    train(model, Counting(), settings_for(tmp_path, steps=3, eval_every=1), {"new": Counting(2)})
    assert modes == [False, True, False, True, False, True, False]
