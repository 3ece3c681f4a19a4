"""generate() with a TRM inside: every way of searching, every cache, padded batches, compiled."""

import os
import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import StaticCache

from hybrid import HybridModel
from hybrid.model.cache_name import as_argument
from tests.support.tiny import FAMILIES, brief_hybrid, tiny_hybrid, tokens

every_family = pytest.mark.parametrize("family", FAMILIES)
LENGTH = {"max_new_tokens": 6, "min_new_tokens": 6}
GREEDY = LENGTH | {"do_sample": False}


@every_family
def test_searches_with_a_cache_equal_those_without(family):
    hybrid, ids = tiny_hybrid(family), tokens()
    for how in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 20}):
        told = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            told.append(hybrid.generate(ids, use_cache=use_cache, **LENGTH, **how))
        assert torch.equal(*told), how


@every_family
def test_a_left_padded_batch_tells_what_each_prompt_alone_tells(family):
    hybrid = tiny_hybrid(family)
    long, short = tokens(1, 9), tokens(1, 5, seed=1)
    batch = torch.cat((long, torch.cat((torch.zeros(1, 4, dtype=torch.long), short), dim=1)))
    told = hybrid.generate(batch, attention_mask=(batch != 0).long(), **GREEDY)
    assert torch.equal(told[:1], hybrid.generate(long, **GREEDY))
    assert torch.equal(told[1:, 4:], hybrid.generate(short, **GREEDY))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "bloom"])  # bloom: not on transformers 5.17
def test_a_static_cache_tells_the_same(family):
    """Sliding windows included: the TRM's slabs are as long as the sequence, whatever the base's are."""
    hybrid, ids = tiny_hybrid(family), tokens()
    want = hybrid.generate(ids, **GREEDY)
    assert torch.equal(hybrid.generate(ids, cache_implementation="static", **GREEDY), want)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), dim=1)
    mask = (padded != 0).long()
    told = hybrid.generate(padded, attention_mask=mask, cache_implementation="static", **GREEDY)
    assert torch.equal(told[:, 3:], want)


@every_family
def test_assisted_generation_tells_the_same(family):
    hybrid, ids = tiny_hybrid(family), tokens(1)
    want = hybrid.generate(ids, **GREEDY)
    assert torch.equal(hybrid.generate(ids, prompt_lookup_num_tokens=2, **GREEDY), want)
    helper = tiny_hybrid(family, seed=1, injection_layers=[1])
    assert torch.equal(hybrid.generate(ids, assistant_model=helper, **GREEDY), want)


def test_the_number_of_steps_reaches_every_token():
    hybrid, ids = tiny_hybrid(), tokens()
    other = tiny_hybrid(num_recursion_steps=5)
    want = other.generate(ids, **GREEDY)
    assert not torch.equal(want, hybrid.generate(ids, **GREEDY)), "a test that could not fail"
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}):
        told = hybrid.generate(ids, num_recursion_steps=5, **GREEDY, **how)
        assert torch.equal(told, other.generate(ids, **GREEDY, **how)), how


def test_a_cache_goes_on_over_two_calls():
    hybrid, ids = tiny_hybrid(), tokens(1)
    first = hybrid.generate(ids, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat((first.sequences, tokens(1, 3, seed=2)), dim=1)
    told = hybrid.generate(longer, **as_argument(first.past_key_values), **GREEDY)
    assert torch.equal(told, hybrid.generate(longer, **GREEDY))


def test_a_static_cache_of_the_callers():
    hybrid, ids = tiny_hybrid(), tokens()
    cache = StaticCache(config=hybrid.config, max_cache_len=20)
    told = hybrid.generate(ids, **as_argument(cache), **GREEDY)
    assert torch.equal(told, hybrid.generate(ids, **GREEDY))


@torch.no_grad()
def test_the_forward_compiles_in_one_graph():
    torch._dynamo.reset()
    hybrid, ids = brief_hybrid(), tokens()
    compiled = torch.compile(hybrid, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(ids, use_cache=False).logits, hybrid(ids).logits, rtol=1e-5, atol=1e-5
    )
    with hybrid.disable_injection():
        assert torch.equal(compiled(ids, use_cache=False).logits, hybrid.llm_model(ids).logits)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_a_padded_batch_compiles_in_one_graph(family):
    torch._dynamo.reset()
    hybrid, ids = brief_hybrid(family), tokens()
    compiled = torch.compile(hybrid, backend="eager", fullgraph=True)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    got, want = (m(ids, attention_mask=mask, use_cache=False).logits for m in (compiled, hybrid))
    torch.testing.assert_close(got[:, 2:], want[:, 2:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_training_step_compiles_in_one_graph(compiler):
    if compiler == "inductor" and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("inductor on a CPU needs a C++ compiler, and there is no g++")
    torch._dynamo.reset()
    hybrid, ids = brief_hybrid().freeze_base().train(), tokens()
    gradients = []
    for model in (torch.compile(hybrid, backend=compiler, fullgraph=True), hybrid):
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in hybrid.trm_parameters() if p.grad is not None])
        hybrid.zero_grad()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_uniform_sampling_under_compile_asks_for_a_number():
    torch._dynamo.reset()
    hybrid, ids = brief_hybrid(recursion_sampling="uniform").train(), tokens()
    compiled = torch.compile(hybrid, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="expected num_recursion_steps in the call"):
        compiled(ids)
    torch.testing.assert_close(
        compiled(ids, num_recursion_steps=1).logits, hybrid(ids, num_recursion_steps=1).logits
    )


def test_uniform_sampling_is_compiled_once_for_each_number():
    """The number is drawn between two graphs, as often as without a compiler; gradients are eager ones."""
    torch._dynamo.reset()
    counters.clear()
    changes = {"recursion_sampling": "uniform", "num_recursion_steps": 2, "injection_layers": [2]}
    hybrids = [brief_hybrid(**changes).freeze_base().train() for _ in range(2)]
    ids, compiled = tokens(), torch.compile(hybrids[0], backend="eager")
    for draw in range(8):
        for hybrid, call in zip(hybrids, (compiled, hybrids[1]), strict=True):
            hybrid.zero_grad()
            call(ids, labels=ids).loss.backward()
        if draw == 5:
            assert {hybrids[1].draw_recursion_steps(i) for i in range(6)} == {1, 2}
            graphs = counters["stats"]["unique_graphs"]
        for a, b in zip(*(hybrid.trm_parameters() for hybrid in hybrids), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    assert [hybrid.draws for hybrid in hybrids] == [8, 8]
    assert counters["stats"]["unique_graphs"] == graphs
    (why,) = counters["graph_break"]
    assert "expected num_recursion_steps in the call" in why


@torch.no_grad()
def test_the_forward_exports():
    hybrid, ids = brief_hybrid(), tokens()

    class Logits(torch.nn.Module):
        def __init__(self, model: HybridModel):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    traced = torch.jit.trace(Logits(hybrid), (ids,), check_trace=False)
    for exported in (torch.export.export(Logits(hybrid), (ids,)).module(), traced):
        torch.testing.assert_close(exported(ids), hybrid(ids).logits, rtol=1e-5, atol=1e-5)


def test_generating_in_training_mode_keeps_to_one_number_of_steps():
    """Drawing another n for each token would leave the cache with holes."""
    hybrid = tiny_hybrid(recursion_sampling="uniform", num_recursion_steps=6)
    want = hybrid.generate(tokens(), **GREEDY)
    assert torch.equal(hybrid.train().generate(tokens(), **GREEDY), want)
