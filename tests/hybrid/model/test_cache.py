"""GrowingLayer: what DynamicLayer holds, whatever is done to it, without copying what is there already."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from hybrid.model.cache import GrowingLayer, make_room
from hybrid.model.cache_name import as_argument
from hybrid.model.settled_call import num_trm_cache_layers
from tests.support.tiny import LAYERS, brief_hybrid, tiny_hybrid, tokens


def keys_and_values(length, batch=2, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    # keys and values of different widths
    return [torch.randn(batch, 3, length, width, generator=g).to(dtype) for width in (4, 6)]


def pair(length=5):
    """A GrowingLayer with room to spare and a DynamicLayer that hold the same."""
    layers = GrowingLayer(), DynamicLayer()
    for layer in layers:
        layer.update(*keys_and_values(length))
        layer.update(*keys_and_values(1, seed=1))
    return layers


def same(ours, theirs):
    if theirs.keys is None:
        return ours.keys is None and ours.values is None and ours.get_seq_length() == 0
    return (
        torch.equal(ours.keys, theirs.keys)
        and torch.equal(ours.values, theirs.values)
        and ours.get_seq_length() == theirs.get_seq_length()
    )


def room_of(layer):
    return layer.keys.untyped_storage().data_ptr(), layer.values.untyped_storage().data_ptr()


class Copies(TorchDispatchMode):
    """How many elements are written by copying or concatenating."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten.cat, torch.ops.aten.clone):
            self.elements += result.numel()
        return result


def to_other_memory(layer):
    """As moving to another device does, and back."""
    layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


def offload_and_back(layer):
    layer.offload()
    layer.prefetch()


OPERATIONS = {
    "nothing": lambda layer: None,
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
    "crop": lambda layer: layer.crop(-3),
    "crop everything": lambda layer: layer.crop(-6),
    "crop twice": lambda layer: (layer.crop(-1), layer.crop(-2)),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([-1])),
    "reset": lambda layer: layer.reset(),
    "other memory": to_other_memory,
    "offload": offload_and_back,
    "crop and reorder": lambda layer: (layer.crop(-2), layer.reorder_cache(torch.tensor([1, 0]))),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=list(OPERATIONS))
def test_it_holds_what_a_dynamic_layer_holds(operation):
    ours, theirs = pair()
    for layer in (ours, theirs):
        operation(layer)
    assert same(ours, theirs)
    batch = 2 if theirs.keys is None else theirs.keys.shape[0]
    for length, seed in ((1, 2), (4, 3), (1, 4), (20, 5), (1, 6)):
        new = keys_and_values(length, batch, seed)
        told = [layer.update(*new) for layer in (ours, theirs)]
        assert same(ours, theirs)
        assert all(torch.equal(*both) for both in zip(*told, strict=True))
    for layer in (ours, theirs):  # once more, when room has been made
        operation(layer)
    assert same(ours, theirs)


def test_tokens_are_written_into_the_room_there_is():
    layer = GrowingLayer()
    layer.update(*keys_and_values(5))
    assert layer.keys.untyped_storage().nbytes() == layer.keys.numel() * 4, "a prefill alone takes no more"
    layer.update(*keys_and_values(1))
    room, elements = room_of(layer), sum(t.numel() for t in keys_and_values(1))
    for i in range(4):
        with Copies() as copies:
            layer.update(*keys_and_values(1, seed=i))
        assert room_of(layer) == room
        assert copies.elements == elements
    layer.crop(-3)
    layer.update(*keys_and_values(3))
    assert room_of(layer) == room, "cropped, it is still the same room"


def test_a_thousand_tokens_make_room_ten_times():
    layer, rooms, kept = GrowingLayer(), set(), []
    with Copies() as copies:
        for i in range(1000):
            layer.update(*keys_and_values(1, seed=i))
            kept.append(layer.keys)  # so that no memory is used twice
            rooms.add(room_of(layer))
    assert len(rooms) <= 11
    assert copies.elements <= 3.1 * (layer.keys.numel() + layer.values.numel())


def test_a_copy_goes_its_own_way():
    ours, theirs = pair()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert same(twin, theirs)
        twin.update(*keys_and_values(2, seed=7))
        assert same(ours, theirs)
        fresh = copy.deepcopy(theirs)
        fresh.update(*keys_and_values(2, seed=7))
        assert same(twin, fresh)
    ours.update(*keys_and_values(1, seed=8))
    theirs.update(*keys_and_values(1, seed=8))
    assert same(ours, theirs)


def test_keys_that_require_gradients_are_concatenated():
    """Attention keeps them for its backward; written to, they would be wrong there."""
    gradients = []
    for layer in pair():
        new = [[t.requires_grad_() for t in keys_and_values(1, seed=i)] for i in (2, 3)]
        losses = []
        for k, v in new:
            keys, values = layer.update(k, v)
            losses.append(keys.square().sum() + values.pow(3).sum())
        with torch.no_grad():
            layer.update(*keys_and_values(1, seed=4))
            layer.update(*keys_and_values(1, seed=5))
        sum(losses).backward()
        gradients.append([t.grad for both in new for t in both])
        assert layer.get_seq_length() == 10
    assert all(torch.equal(*both) for both in zip(*gradients, strict=True))


def test_what_was_filled_in_inference_mode_goes_on_outside():
    layers = GrowingLayer(), DynamicLayer()
    for layer in layers:
        with torch.inference_mode():
            layer.update(*keys_and_values(3))
            layer.update(*keys_and_values(1, seed=1))
        layer.update(*keys_and_values(1, seed=2))
    assert same(*layers)


@pytest.mark.parametrize("change", ["batch", "dtype", "heads"])
def test_tokens_of_another_kind_meet_what_they_meet_in_a_dynamic_layer(change):
    """One sequence must not spread over a batch of two."""
    emptied = pair()
    for layer in emptied:
        layer.crop(-6)
    for ours, theirs in (pair(), emptied, (GrowingLayer(), DynamicLayer())):
        if change == "dtype":
            new = keys_and_values(1, dtype=torch.float64)
        else:
            new = keys_and_values(1, batch=1 if change == "batch" else 2)
            new = [t[:, :1] for t in new] if change == "heads" else new
        results = []
        for layer in (ours, theirs):
            try:
                results.append(layer.update(*new))
            except RuntimeError as error:
                results.append(str(error)[:30])
        if isinstance(results[1], str):
            assert results[0] == results[1]
        else:
            assert all(torch.equal(*both) for both in zip(*results, strict=True))
            assert results[0][0].dtype == results[1][0].dtype


@torch.no_grad()
def test_a_hybrid_decodes_into_it():
    hybrid, ids = tiny_hybrid(), tokens()
    cache = hybrid(ids[:, :4], use_cache=True).past_key_values
    assert {type(layer) for layer in cache.layers[:LAYERS]} == {DynamicLayer}
    assert {type(layer) for layer in cache.layers[LAYERS:]} == {GrowingLayer}
    hybrid(ids[:, 4:5], **as_argument(cache))
    rooms = [room_of(layer) for layer in cache.layers[LAYERS:]]
    for i in range(5, 8):
        hybrid(ids[:, i : i + 1], **as_argument(cache))
    assert [room_of(layer) for layer in cache.layers[LAYERS:]] == rooms
    logits = hybrid(ids[:, 8:], **as_argument(cache)).logits
    torch.testing.assert_close(logits, hybrid(ids).logits[:, 8:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_static", [False, True])
@torch.no_grad()
def test_after_tokens_without_injection_a_cache_is_the_bases_alone(is_static):
    """Only the device knows how many tokens a static layer has: a gap would not be seen in the lengths."""
    hybrid, ids = tiny_hybrid().eval(), tokens()
    cache = StaticCache(config=hybrid.config, max_cache_len=12) if is_static else DynamicCache()
    hybrid(ids, **as_argument(cache))
    with hybrid.disable_injection():
        hybrid(tokens(length=1), **as_argument(cache))
    assert len(cache.layers) == LAYERS
    with pytest.raises(ValueError, match="cache"):
        hybrid(tokens(length=1), **as_argument(cache))


def test_a_training_forward_with_a_cache_has_the_gradients_of_one_without():
    hybrid, ids = tiny_hybrid(grad_cycles=None).freeze_base(), tokens()
    gradients = []
    for chunks in ((9,), (4, 1, 4)):
        cache, loss, at = DynamicCache(config=hybrid.llm_model.config), 0, 0
        make_room(cache, LAYERS, num_trm_cache_layers(hybrid, hybrid.config.recursion_spec))
        for n in chunks:
            loss = loss + hybrid(ids[:, at : at + n], **as_argument(cache)).logits.square().sum()
            at += n
        loss.backward()
        gradients.append([p.grad.clone() for p in hybrid.trm_parameters()])
        hybrid.zero_grad()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_compiled_forward_with_a_dynamic_cache():
    torch._dynamo.reset()
    hybrid, ids = brief_hybrid(injection_layers=[1]), tokens()
    compiled = torch.compile(hybrid, backend="eager", fullgraph=True)
    whole, cache = hybrid(ids).logits, hybrid(ids[:, :3], use_cache=True).past_key_values
    hybrid(ids[:, 3:4], **as_argument(cache))  # now there is room
    for at in range(4, 8):  # compiled, and for two tokens not
        model = hybrid if at in (5, 6) else compiled
        logits = model(ids[:, at : at + 1], **as_argument(cache)).logits
        torch.testing.assert_close(logits, whole[:, at : at + 1], rtol=1e-5, atol=1e-5)
