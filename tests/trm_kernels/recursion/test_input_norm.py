"""The norm behind the projection into the recursion: the size of W_in makes no difference, on every path."""

import json

import pytest
import torch

from hybrid import HybridConfig
from hybrid.model.halting import Halting
from tests.support.tiny import awaken, tiny_hybrid, tokens
from trm_kernels.ops.injection_in import injection_in
from trm_kernels.runtime.backend import backend, interpreting

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"


def logits(hybrid, **arguments):
    return hybrid.eval()(tokens(), use_cache=False, **arguments).logits


def generated(hybrid):
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    told = hybrid.eval().generate(tokens(), output_logits=True, return_dict_in_generate=True, **settings)
    return torch.stack(told.logits)


def supervised_loss(hybrid):
    return hybrid.train()(tokens(), labels=tokens(), use_cache=False).loss


WAYS = {
    "forward": (logits, {}),
    "halting": (lambda hybrid: logits(hybrid, halting=Halting(0.2)), {}),
    "generate": (generated, {}),
    "deep supervision": (supervised_loss, {"deep_supervision": True, "grad_cycles": None}),
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_the_size_of_what_comes_in_makes_no_difference(way):
    compute, settings = WAYS[way]
    for norms_x in (True, False):
        hybrid = tiny_hybrid(trm_input_norm=norms_x, **settings)
        before = compute(hybrid)
        for name, parameter in hybrid.named_parameters():
            if name.endswith("in_proj.weight"):
                parameter.mul_(8.0)
        after = compute(hybrid)
        is_same = torch.allclose(before, after, rtol=1e-3, atol=1e-3)  # eps weighs a little less
        assert is_same is norms_x


def test_a_fresh_hybrid_is_its_base_bit_for_bit():
    hybrid = tiny_hybrid(awake=False, trm_input_norm=True)
    with hybrid.disable_injection():
        of_base = logits(hybrid)
    assert torch.equal(logits(hybrid), of_base)
    assert not torch.equal(logits(awaken(hybrid)), of_base)


def test_it_is_saved(tmp_path):
    hybrid = tiny_hybrid(trm_input_norm=True)
    hybrid.save_pretrained(tmp_path)
    again = type(hybrid).from_pretrained(tmp_path)
    assert again.config.trm_input_norm
    assert torch.equal(logits(again), logits(hybrid))


def test_a_config_that_says_nothing_of_it_has_none(tmp_path):
    """As every file that was written before there was one."""
    config = HybridConfig(injection_layers=[1]).to_dict()
    assert config.pop("trm_input_norm") is True, "a new one has it"
    assert HybridConfig.from_dict(config).trm_input_norm is False
    assert HybridConfig.from_dict(config, trm_input_norm=True).trm_input_norm is True
    hybrid = tiny_hybrid(trm_input_norm=False)
    hybrid.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    assert written.pop("trm_input_norm") is False
    path.write_text(json.dumps(written))
    again = type(hybrid).from_pretrained(tmp_path)
    assert again.config.trm_input_norm is False and torch.equal(logits(again), logits(hybrid))


def test_it_is_there_or_not():
    with pytest.raises(ValueError, match="expected trm_input_norm to be True or False, got 1"):
        HybridConfig(trm_input_norm=1)


@pytest.mark.kernels
def test_the_kernels_compute_it_with_its_gradient():
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(2, 5, 48, generator=g), torch.randn(32, 48, generator=g)
    weigh = torch.randn(2, 5, 32, generator=g).to(DEVICE)
    told = {}
    for name in ("triton", "reference"):
        given = [t.to(DEVICE).requires_grad_(True) for t in (h.detach(), w.detach())]
        with backend(name):
            x = injection_in(*given, norms_x=True)
        told[name] = [x, *torch.autograd.grad((x * weigh).sum(), given)]
    for ours, want in zip(told["triton"], told["reference"], strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
    assert (told["reference"][0].pow(2).mean(-1) - 1).abs().max() < 1e-3
