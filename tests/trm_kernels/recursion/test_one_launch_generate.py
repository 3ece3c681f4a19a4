"""generate() with the TRMs in one launch: token for token what the reference says, with every cache."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from hybrid.model.cache import GrowingLayer, InjectionCache
from hybrid.model.cache_name import as_argument
from tests.support.tiny import tiny_hybrid, tokens
from tests.trm_kernels.recursion.test_recursion import DEVICE
from trm_kernels.recursion.one_launch import launchers
from trm_kernels.runtime.backend import backend

SMALL = {
    "injection_layers": [0, 2],
    "trm_hidden_size": 16,
    "trm_num_heads": 2,
    "trm_num_key_value_heads": 1,
    "trm_num_layers": 1,
    "trm_intermediate_size": 16,
    "num_cycles": 1,
    "num_recursion_steps": 1,
}
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.fixture
def launches(monkeypatch) -> list[tuple[int, ...]]:
    """The grids of the recursions in one launch, in the order of their launches."""
    ran, launch = [], launchers.launch

    def watched(kernel, grid, *args, **meta):
        ran.append(grid)
        launch(kernel, grid, *args, **meta)

    monkeypatch.setattr(launchers, "launch", watched)
    return ran


def padded() -> tuple[Tensor, Tensor]:
    ids = tokens(2, 4).to(DEVICE)
    ids[1, :2] = 0
    return ids, (ids != 0).long()


@pytest.mark.kernels
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_token_for_token(family, cache, launches):
    """With a prompt padded on the left; one launch a token and injection point, and one for the prompt."""
    ids, mask = padded()
    how = {} if cache == "dynamic" else {"cache_implementation": "static"}
    with backend("reference"):
        want = tiny_hybrid(family, **SMALL).to(DEVICE).generate(ids, attention_mask=mask, **GREEDY, **how)
    hybrid = tiny_hybrid(family, trm_regime="one_launch", **SMALL).to(DEVICE)
    with backend("triton"):
        told = hybrid.generate(ids, attention_mask=mask, **GREEDY, **how)
    assert torch.equal(told, want)
    assert len(launches) == 4 * 2


@pytest.mark.kernels
def test_beams_and_a_cache_that_is_cropped():
    """What replaces or shortens the tensors of a layer is found out at the next token."""
    ids = tokens(1, 4).to(DEVICE)
    plain = tiny_hybrid(**SMALL).to(DEVICE)
    hybrid = tiny_hybrid(trm_regime="one_launch", **SMALL).to(DEVICE)
    for how in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
        with backend("reference"):
            want = plain.generate(ids, **GREEDY, **how)
        with backend("triton"):
            assert torch.equal(hybrid.generate(ids, **GREEDY, **how), want), how


@pytest.mark.kernels
@torch.no_grad()
def test_tokens_that_read_last_keys(launches):
    """The prompt goes token after token; then a launch's steps write over each other's keys."""
    ids = padded()[0]
    hybrid = tiny_hybrid(trm_cache="last", **SMALL).to(DEVICE)
    with backend("reference"):
        want = hybrid(ids).logits
        cache = hybrid(ids[:, :2]).past_key_values
    hybrid.config.trm_regime = "one_launch"
    with backend("triton"):
        told = [hybrid(token, **as_argument(cache)).logits for token in ids[:, 2:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(told, 1), want[:, 2:], rtol=2e-3, atol=2e-3)
    assert len(launches) == 2 * 2
    with backend("triton"), pytest.raises(RuntimeError, match="one token at a time"):
        hybrid(ids)


@pytest.mark.kernels
def test_weights_in_8_bits_tell_what_the_same_weights_widened_tell():
    ids = tokens(2, 4).to(DEVICE)
    told = []
    for regime in ("one_launch", "per_op"):
        hybrid = tiny_hybrid(trm_regime=regime, trm_quantize="int8", **SMALL).to(DEVICE)
        with backend("triton"):
            told.append(hybrid.generate(ids, **GREEDY))
    assert torch.equal(*told)


@pytest.mark.kernels
def test_training_goes_per_op(launches):
    hybrid, ids = tiny_hybrid(trm_regime="one_launch", **SMALL).to(DEVICE).freeze_base().train(), tokens(1, 3)
    with backend("triton"):
        hybrid(ids.to(DEVICE), labels=ids.to(DEVICE)).loss.backward()
    assert not launches
    assert all(p.grad is not None for p in hybrid.trm_parameters() if p.ndim == 2)


def test_training_with_weights_in_8_bits_is_refused():
    hybrid = tiny_hybrid(trm_quantize="int8", **SMALL).freeze_base().train()
    with pytest.raises(RuntimeError, match="expected a call without gradient"):
        hybrid(tokens(1, 3))


def test_room_is_written_in_place_and_counted():
    """Keys and values of 5 tokens, then of one: into the same tensors, which have doubled once."""
    cache, x = DynamicCache(), torch.zeros(2, 5, 16)
    cache.layers.extend(GrowingLayer() for _ in range(3))
    of_injection = InjectionCache(cache, 1, None)
    addresses = []
    for tokens_now in (5, 1, 1):
        room = of_injection.room(x[:, :tokens_now], 1, 8, 2)
        assert room.seen == cache.layers[1].get_seq_length()
        for i, t in enumerate((*room.keys, *room.values)):
            t[:, :, room.seen : room.seen + tokens_now] = i + tokens_now
        of_injection.written(tokens_now)
        addresses.append([t.data_ptr() for t in room.keys])
        assert all(
            torch.all(layer.keys[:, :, -1] == i + tokens_now) for i, layer in enumerate(cache.layers[1:])
        )
    assert cache.layers[0].get_seq_length() == 0
    assert [layer.get_seq_length() for layer in cache.layers[1:]] == [7, 7]
    assert addresses[0] != addresses[1] == addresses[2]


@pytest.mark.kernels
def test_a_compiled_forward_with_a_static_cache_sees_one_op():
    """The op is opaque: one graph, and keys, values and lengths written inside of it."""
    torch._dynamo.reset()
    ids, _ = padded()
    hybrid = tiny_hybrid(trm_regime="one_launch", **SMALL).to(DEVICE)
    compiled = torch.compile(hybrid, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), backend("triton"):
        whole = hybrid(ids, use_cache=False).logits
        cache = StaticCache(config=hybrid.config, max_cache_len=8)
        hybrid(ids[:, :2], **as_argument(cache))
        for at in (2, 3):
            logits = compiled(ids[:, at : at + 1], **as_argument(cache)).logits
            torch.testing.assert_close(logits, whole[:, at : at + 1], rtol=1e-4, atol=1e-4)
    assert {int(layer.cumulative_length) for layer in cache.layers} == {4}
