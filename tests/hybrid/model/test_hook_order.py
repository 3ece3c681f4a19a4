"""What hooks of a layer see does not depend on whether they came before the injection or after it."""

import copy

import pytest
import torch

from hybrid import HybridModel
from tests.support.tiny import awaken, tiny_base, tiny_config, tokens

POINTS = [0, 1, 2]


def hybrid_of(base):
    torch.manual_seed(1)
    return awaken(HybridModel(llm_model=base, config=tiny_config(injection_layers=POINTS))).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_hidden_states_are_what_the_next_layer_reads(family):
    """transformers records them with hooks of its own, which come with the first that are asked for."""
    asked = tiny_base(family)
    asked(tokens(), output_hidden_states=True)
    hybrid, other = hybrid_of(asked), hybrid_of(tiny_base(family))
    found = hybrid(tokens(), output_hidden_states=True).hidden_states
    expected = other(tokens(), output_hidden_states=True).hidden_states
    with hybrid.disable_injection():
        off = hybrid(tokens(), output_hidden_states=True).hidden_states
    for index, (h, e, without) in enumerate(zip(found, expected, off, strict=True)):
        assert torch.equal(h, e), index
        if (family, index) != ("falcon", 0):  # which falcon's own code notes before its first layer
            assert not torch.equal(h, without), index
    again = copy.deepcopy(hybrid)(tokens(), output_hidden_states=True).hidden_states
    assert all(torch.equal(h, e) for h, e in zip(again, expected, strict=True))


def test_the_same_after_unwrap():
    hybrid = hybrid_of(tiny_base())
    expected = hybrid(tokens(), output_hidden_states=True).hidden_states
    again = hybrid_of(hybrid.unwrap())
    found = again(tokens(), output_hidden_states=True).hidden_states
    assert all(torch.equal(h, e) for h, e in zip(found, expected, strict=True))


def test_a_users_hooks_see_the_layer_with_its_injection():
    seen = {}

    def watch(base, when):
        for number, layer in enumerate(base.model.layers):
            key = when, number
            layer.register_forward_pre_hook(lambda _, args, key=key: seen.update({(*key, "in"): args[0]}))
            layer.register_forward_hook(lambda _, a, out, key=key: seen.update({(*key, "out"): out}))

    base = tiny_base()
    watch(base, "before")
    hybrid = hybrid_of(base)
    watch(base, "after")
    states = hybrid(tokens(), output_hidden_states=True).hidden_states
    for when in ("before", "after"):
        assert torch.equal(seen[when, 0, "in"], states[0])
        assert torch.equal(seen[when, 0, "out"], states[1])
        assert torch.equal(seen[when, 1, "in"], states[1])
        assert torch.equal(seen[when, 1, "out"], states[2])
