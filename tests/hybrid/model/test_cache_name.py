"""A hybrid calls its cache as the installed transformers does, and takes it by the other name too."""

import inspect
from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache, GenerationMixin, StaticCache
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from hybrid import HybridModel
from hybrid.model import cache_name
from hybrid.model.cache_name import CACHE_NAME, as_argument, check_cache_name, takes_cache
from hybrid.model.injection import Injection
from tests.support.tiny import tiny_base, tiny_config, tiny_hybrid, tokens

NAMES = ("cache", "past_key_values")
EITHER = "ignore:.past_key_values. is deprecated:FutureWarning"  # an error elsewhere: see pyproject.toml


def names_in(function):
    return [name for name in inspect.signature(function).parameters if name in NAMES]


def test_a_hybrid_shows_the_name_that_its_base_has():
    hybrid, base = tiny_hybrid(), tiny_base()
    assert names_in(base.forward) == [CACHE_NAME], "not the name in force"
    assert names_in(hybrid.forward) == names_in(hybrid.base_model.forward) == [CACHE_NAME]
    assert names_in(hybrid.create_masks_for_generate) == [CACHE_NAME]
    shown, of_base = (list(inspect.signature(m.forward).parameters) for m in (hybrid, base))
    assert [name for name in shown if name in of_base] == of_base, "in another order than the base's"
    assert hybrid._skip_keys_device_placement == base._skip_keys_device_placement


@torch.no_grad()
def test_an_output_has_the_names_that_the_base_has():
    hybrid, base, ids = tiny_hybrid(), tiny_base(), tokens()
    for ours, theirs in ((hybrid, base), (hybrid.base_model, base.base_model)):
        told = ours(ids, use_cache=True)
        assert list(told) == list(theirs(ids, use_cache=True)) and CACHE_NAME in told
        assert told.past_key_values is told[CACHE_NAME], "code for an older transformers reads it so"
        assert told[CACHE_NAME].get_seq_length() == ids.shape[1]


@torch.no_grad()
@pytest.mark.filterwarnings(EITHER)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["whole", "without its head"])
def test_a_forward_takes_a_cache_by_either_name(name, part):
    hybrid, ids = tiny_hybrid(), tokens()
    model = hybrid if part == "whole" else hybrid.base_model
    other = {n: None for n in NAMES if n != name}
    for cache in (DynamicCache(config=hybrid.config), StaticCache(config=hybrid.config, max_cache_len=12)):
        told = [model(ids[:, at : at + 3], **{name: cache}, **other)[0] for at in (0, 3, 6)]
        assert cache.get_seq_length() == 9, "another cache was filled"
        torch.testing.assert_close(torch.cat(told, 1), model(ids, use_cache=False)[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_fourth_place_is_the_cache_as_in_the_base():
    hybrid, base, ids = tiny_hybrid(), tiny_base(), tokens()
    for model in (hybrid, hybrid.base_model, base, base.base_model):
        cache = DynamicCache()
        model(ids, None, None, cache)
        assert cache.get_seq_length() == ids.shape[1]


def test_two_caches_are_refused():
    hybrid, ids = tiny_hybrid(), tokens()
    with pytest.raises(ValueError, match="expected one cache, got one as cache and one as past_key_values"):
        hybrid(ids, cache=DynamicCache(), past_key_values=DynamicCache())


@torch.no_grad()
def test_checkpoints_take_away_the_cache_of_the_trm_as_of_the_base():
    """They would fill it again in backward; by its name among the arguments they find it."""
    hybrid, ids = tiny_hybrid(), tokens()
    taken = []
    injection = next(module for module in hybrid.modules() if isinstance(module, Injection))
    injection._keys_in = lambda cache, *args: taken.append(cache)
    hybrid.train().gradient_checkpointing_enable()
    with torch.enable_grad():
        hybrid(ids, use_cache=True)
    hybrid.eval()(ids, use_cache=True)
    assert taken[0] is None and isinstance(taken[1], DynamicCache)


@pytest.mark.parametrize("is_injecting", [True, False])
def test_what_is_no_cache_is_refused_as_by_the_base(is_injecting):
    """By a name that its base does not know it would be left out without a word."""
    hybrid, ids = tiny_hybrid(), tokens()
    hybrid.injection_enabled = is_injecting
    keys = torch.zeros(2, 4, 4, 8)
    with pytest.raises(ValueError if is_injecting else AttributeError, match="Cache.* got tuple|'tuple'"):
        hybrid(ids, **{CACHE_NAME: ((keys, keys),) * 3})


# What the name is on the other transformers, as far as it can be seen on this one


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_that_of_what_generate_calls(monkeypatch, name):
    def prepare(self, input_ids, **kwargs): ...

    at = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
    prepare.__signature__ = inspect.Signature([at])
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", prepare)
    check_cache_name()
    assert cache_name._name_in_force() == name


def test_a_transformers_that_calls_it_otherwise_is_refused(monkeypatch):
    def prepare(self, input_ids, next_sequence_length=None, memory=None, **kwargs): ...

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", prepare)
    with pytest.raises(ValueError, match=r"calls a cache cache or past_key_values, got .* \(pip install"):
        HybridModel(llm_model=tiny_base(), config=tiny_config())


@pytest.mark.parametrize("in_force", NAMES)
def test_either_name_in_force(monkeypatch, in_force):
    monkeypatch.setattr(cache_name, "CACHE_NAME", in_force)

    @takes_cache
    def forward(ids, past_key_values=None, use_cache=None):
        return ids, past_key_values, use_cache

    assert list(inspect.signature(forward).parameters) == ["ids", in_force, "use_cache"]
    assert forward(1, **{in_force: 2}, use_cache=3) == forward(1, 2, 3) == (1, 2, 3)
    is_given_up = in_force == "cache"
    with pytest.warns(FutureWarning, match="Use `cache`") if is_given_up else nullcontext():
        assert forward(1, past_key_values=2, use_cache=3) == (1, 2, 3)
    assert forward(1, cache=2) == (1, 2, None), "what the newer transformers says is understood before"
    cache, paged = DynamicCache(), object.__new__(PagedAttentionCache)
    assert as_argument(cache) == {in_force: cache} and as_argument(None) == {in_force: None}
    assert as_argument(paged) == {"cache": paged} and as_argument(()) == {in_force: ()}
