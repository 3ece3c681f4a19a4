"""A recursion whose attention is somebody else's: a server's, with a cache of its own."""

import pytest
import torch
from torch import Tensor

from trm_kernels import TRM, rope_attention
from trm_kernels.recursion.recursion import trm_recursion
from trm_kernels.recursion.weights import InjectionWeights
from trm_kernels.runtime.backend import interpreting
from trm_kernels.runtime.launch import record

H, G, D, WIDTH = 4, 2, 32, 48
DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"


def trm(**changes) -> TRM:
    torch.manual_seed(0)
    sizes = {"num_key_value_heads": G, "intermediate_size": 48, "num_recursion_steps": 2, "num_cycles": 2}
    return TRM(D, H, 2, causal=True, device=DEVICE, **(sizes | changes)).requires_grad_(False)


class Attending:
    """rope_attention from outside, and which evaluations asked for it."""

    def __init__(self, positions: Tensor) -> None:
        self.positions, self.asked = positions, []

    def __call__(self, evaluation: int, qkv: Tensor) -> Tensor:
        self.asked.append(evaluation)
        return rope_attention(qkv, self.positions, H, G, None, True)


def point() -> tuple[Tensor, InjectionWeights, Tensor]:
    torch.manual_seed(1)
    h, positions = torch.randn(1, 7, WIDTH, device=DEVICE), torch.arange(3, 10, device=DEVICE)[None]
    w_in, w_out = torch.randn(D, WIDTH, device=DEVICE), torch.randn(WIDTH, D, device=DEVICE)
    return h, InjectionWeights(w_in, w_out), positions


def test_the_kernels_of_the_loop_run_around_it():
    """On a GPU: those of a recursion with our attention, without the attention's."""

    def launched(**given) -> list[str]:
        h, injection, _ = point()
        injection = InjectionWeights(*(t.to("meta") for t in injection if t is not None))
        with record("sm90") as launches:
            trm(regime="per_op").to("meta")(h.to("meta"), injection=injection, **given)
        return [launch.kernel.__name__ for launch in launches]

    with_ours = launched(positions=point()[2].to("meta"))
    around = [name for name in with_ours if "attention" not in name]
    assert len(with_ours) - len(around) == 12 and len(around) > 36
    assert launched(attend=lambda evaluation, qkv: qkv[..., :D].contiguous()) == around


def test_an_injection_with_it_is_the_injection():
    h, injection, positions = point()
    attend = Attending(positions)
    expected = trm()(h, injection=injection, positions=positions)
    found = trm()(h, injection=injection, attend=attend)
    torch.testing.assert_close(found, expected)
    # two cycles of two steps and an answer, two layers each
    assert attend.asked == list(range(12))


def test_a_recursion_with_it_is_the_recursion():
    torch.manual_seed(2)
    x, positions = torch.randn(1, 7, D, device=DEVICE), torch.arange(7, device=DEVICE)[None]
    y, z = torch.randn_like(x), torch.randn_like(x)
    expected = trm()(x, y, z, positions=positions)
    for found, wanted in zip(trm()(x, y, z, attend=Attending(positions)), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_what_it_would_not_read_is_refused():
    h, injection, positions = point()
    with pytest.raises(ValueError, match="attend by itself, got it with key_mask"):
        mask = torch.ones(1, 7, dtype=torch.bool, device=DEVICE)
        trm()(h, injection=injection, attend=Attending(positions), key_mask=mask)
    x = torch.randn(1, 7, D, device=DEVICE)
    layers = [layer(torch.float32) for layer in trm().layers]
    with pytest.raises(ValueError, match="attend by itself, got it with update_cache"):
        trm_recursion(
            x,
            x,
            x,
            layers,
            num_heads=H,
            num_key_value_heads=G,
            num_recursion_steps=1,
            attend=Attending(positions),
            update_cache=lambda i, k, v: (k, v),
        )


def test_a_gradient_is_refused():
    h, injection, positions = point()
    with pytest.raises(ValueError, match="attend in a call without gradient"):
        trm()(h.requires_grad_(), injection=injection, attend=Attending(positions))


@pytest.mark.parametrize("regime", ["one_launch", "per_phase"])
def test_one_launch_is_refused(regime):
    h, injection, positions = point()
    with pytest.raises(RuntimeError, match="was asked for, and it cannot run"):
        trm(regime=regime)(h, injection=injection, attend=Attending(positions))
