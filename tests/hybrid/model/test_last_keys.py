"""trm_cache="last": a hybrid whose cache keeps each token's last keys alone, in every way of generating."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hybrid import Halting, HybridConfig, HybridModel, TokenHalting
from hybrid.model.cache_name import as_argument
from tests.support.tiny import FAMILIES, LAYERS, tiny_config, tiny_hybrid, tokens

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
SMALL = {"trm_cache": "last", "injection_layers": [0, 2], "trm_num_layers": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_tells_with_a_cache_what_it_tells_without(family):
    hybrid, ids = tiny_hybrid(family, **SMALL), tokens()
    for how in ({}, {"num_beams": 2}):
        told = [hybrid.generate(ids, use_cache=use, **GREEDY, **how) for use in (True, False)]
        assert torch.equal(*told), how
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), dim=1)
    told = hybrid.generate(padded, attention_mask=(padded != 0).long(), **GREEDY)
    assert torch.equal(told[:, 3:], hybrid.generate(ids, **GREEDY))


@torch.no_grad()
def test_logits_of_chunks_are_those_of_the_whole():
    """Two layers, two cycles; and what each token reads is no longer what it read in each step."""
    hybrid, ids = tiny_hybrid(trm_cache="last"), tokens()
    whole, cache, found = hybrid(ids).logits, DynamicCache(config=hybrid.llm_model.config), []
    for chunk in ids.split([4, 1, 1, 3], dim=1):
        found.append(hybrid(chunk, **as_argument(cache)).logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-5)
    assert (whole - tiny_hybrid()(ids).logits).abs().max() > 0.01


def test_assisted_generation_tells_the_same():
    """Tokens that were guessed wrongly are cropped from the cache."""
    hybrid, ids = tiny_hybrid(**SMALL), tokens(1)
    want = hybrid.generate(ids, **GREEDY)
    assert torch.equal(hybrid.generate(ids, prompt_lookup_num_tokens=2, **GREEDY), want)
    helper = tiny_hybrid(seed=1, **SMALL)
    assert torch.equal(hybrid.generate(ids, assistant_model=helper, **GREEDY), want)


@torch.no_grad()
def test_a_cache_does_not_grow_with_the_number_of_steps():
    hybrid, ids = tiny_hybrid(trm_cache="last"), tokens()
    for n in (1, 6):
        cache = hybrid(ids, num_recursion_steps=n).past_key_values
        assert len(cache.layers) - LAYERS == 3 * 2, "three points of two layers each"
        with pytest.raises(ValueError, match=f"one filled with {n}, for {n + 1}"):
            hybrid(ids, **as_argument(cache), num_recursion_steps=n + 1)
    hybrid.config.trm_cache = "all"
    with pytest.raises(ValueError, match="expected an empty cache"):
        hybrid(ids, **as_argument(cache))


def test_gradients_of_checkpointed_layers_are_those_of_others():
    ids, gradients = tokens(), []
    for is_checkpointed in (False, True):
        hybrid = tiny_hybrid(grad_cycles=None, **SMALL).freeze_base().train()
        if is_checkpointed:
            hybrid.gradient_checkpointing_enable()
        hybrid(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in hybrid.trm_parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert all(g.abs().max() > 0 for g in gradients[0])


@torch.no_grad()
def test_it_is_saved_and_a_config_that_does_not_say_keeps_all(tmp_path):
    hybrid, ids = tiny_hybrid(**SMALL), tokens()
    hybrid.save_pretrained(tmp_path, save_base=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, HybridModel) and loaded.config.trm_cache == "last"
    assert torch.equal(loaded(ids).logits, hybrid(ids).logits)
    fields = tiny_config().to_dict()
    del fields["trm_cache"]
    assert HybridConfig.from_dict(fields).trm_cache == "all"


@torch.no_grad()
def test_what_it_cannot_be_combined_with_is_refused():
    hybrid, ids = tiny_hybrid(**SMALL), tokens()
    for how in ({"cache_implementation": "static"}, as_argument(StaticCache(hybrid.config, 20))):
        with pytest.raises(ValueError, match="trm_cache 'last' expected a cache that grows"):
            hybrid.generate(ids, **GREEDY, **how)
    with pytest.raises(ValueError, match="halting expected cache 'all'"):
        hybrid(ids, halting=Halting(0.1), use_cache=False)
    assert hybrid(ids, halting=TokenHalting(), use_cache=False).logits.shape[1] == ids.shape[1]
    with pytest.raises(ValueError, match="expected trm_cache to be one of all, last, got 'first'"):
        tiny_config(trm_cache="first")
    with pytest.raises(ValueError, match="deep_supervision expected trm_cache 'all'"):
        tiny_config(trm_cache="last", deep_supervision=True, grad_cycles=None)
