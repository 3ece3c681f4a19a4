"""Hooks of a layer run in the order they came, but for transformers' own: they note what is read next."""

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
    """transformers' hooks come with the first states that are asked for, before the injection or after it."""
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


def test_a_users_hooks_run_in_the_order_they_came():
    """One that the base came with completes what its layer answers: the TRM reads that."""
    base, seen = tiny_base(), {}
    layer = base.model.layers[0]
    base(tokens(), output_hidden_states=True)
    layer.register_forward_hook(lambda _, args, h: 3 * h)
    layer.register_forward_hook(lambda _, args, h: seen.update(older=h))
    hybrid = hybrid_of(base)
    layer.trm.register_forward_pre_hook(lambda _, args: seen.update(read=args[0]))
    layer.register_forward_hook(lambda _, args, h: seen.update(newer=h))
    states = hybrid(tokens(), output_hidden_states=True).hidden_states
    assert torch.equal(seen["read"], seen["older"]) and not torch.equal(seen["read"], seen["newer"])
    assert torch.equal(states[1], seen["newer"])


def test_unwrap_leaves_hooks_that_have_no_hash():
    class Watch:
        def __eq__(self, other):
            return False

        def __call__(self, layer, args, h):
            return None

    base, watch = tiny_base(), Watch()
    base.model.layers[0].register_forward_hook(watch)
    assert next(iter(hybrid_of(base).unwrap().model.layers[0]._forward_hooks.values())) is watch
