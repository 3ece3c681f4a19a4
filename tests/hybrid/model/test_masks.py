"""What the TRMs are told to look at: the past and a row of keys where that says it, else a general mask."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers import masking_utils as theirs

import trm_kernels.modules.trm
import trm_kernels.recursion.injection
from hybrid.model import masks
from hybrid.model.cache import make_room
from hybrid.model.cache_name import as_argument
from tests.support.tiny import FAMILIES, LAYERS, brief_hybrid, tiny_base, tiny_hybrid, tokens
from trm_kernels.ops.attention import decode_attention, launchers
from trm_kernels.ops.attention.reference import visibility
from trm_kernels.runtime.backend import backend, interpreting

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
SLOTS = 12
LEFT, RIGHT = ([[0] * 3 + [1] * 6, [1] * 9], [[1] * 9, [1] * 5 + [0] * 4])
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


def padded(rows=LEFT, length=9):
    return torch.tensor(rows)[:, :length]


def new_cache(kind):
    """An empty cache of the tiny base, with room for one layer of a TRM."""
    if kind == "none":
        return None
    config = tiny_base().config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=SLOTS)
    make_room(cache, LAYERS, 1)
    return cache


def fill(cache, tokens):
    for i in range(len(cache.layers)):
        cache.update(torch.zeros(2, 1, tokens, 4), torch.zeros(2, 1, tokens, 4), i)


@pytest.fixture
def told(monkeypatch):
    """What every call of the recursion was given: (mask, key_mask)."""
    seen, recursion = [], trm_kernels.modules.trm.run_recursion

    def spy(x, y, z, weights, scales, spec, inputs):
        assert spec.causal
        seen.append((inputs.mask, inputs.key_mask))
        return recursion(x, y, z, weights, scales, spec, inputs)

    for module in (trm_kernels.modules.trm, trm_kernels.recursion.injection):
        monkeypatch.setattr(module, "run_recursion", spy)
    return seen


def form(told):
    """The one form in all of these calls, which are then forgotten."""
    forms = {
        "mask" if mask is not None else "past" if key_mask is None else f"keys {key_mask.shape[1]}"
        for mask, key_mask in told
    }
    told.clear()
    assert len(forms) == 1, forms
    return forms.pop()


# What is visible


@pytest.mark.parametrize("padding", ["none", "ones", "left", "right", "short", "long"])
@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize(("seen", "new"), [(0, 9), (0, 1), (4, 5), (8, 1), (1, 8)])
def test_it_says_what_transformers_mask_says(kind, seen, new, padding):
    """Entry by entry, also for masks that end before the last key or go on behind it."""
    if kind == "none":
        seen = 0
    total = seen + new
    mask = {
        "none": None,
        "ones": torch.ones(2, total),
        "left": padded(LEFT, total),
        "right": padded(RIGHT, total),
        "short": padded(LEFT, total)[:, : total - 1],
        "long": torch.cat((padded(LEFT, total), torch.ones(2, 2, dtype=torch.long)), dim=1),
    }[padding]
    if kind == "none" and padding in ("short", "long"):
        pytest.skip("without a cache the mask says how many keys there are")
    cache = new_cache(kind)
    if seen:
        fill(cache, seen)
    inputs = torch.zeros(2, new)
    want = masks._general(inputs, mask, cache, LAYERS, None)
    what = masks.visible(inputs, mask, cache, LAYERS, None)
    assert what.mask is None
    if cache is not None:
        entries = masks.as_entries(what, inputs)
        again = masks.from_entries(entries, new, cache, LAYERS)
        for ours in (what, again):
            S = want.shape[-1] if ours.num_keys is None else ours.num_keys
            got = visibility(new, S, inputs.device, None, True, ours.key_mask)
            assert torch.equal(got.expand(2, 1, new, S), want[..., :S])
            assert not want[..., S:].any(), "a key that was cut off"
    else:
        got = visibility(new, new, inputs.device, None, True, what.key_mask)
        assert torch.equal(got.expand_as(want), want)


def test_one_token_into_a_static_cache_reads_no_number():
    """Every step has the same shapes, and nothing of it needs a value: fullgraph, and traced once."""
    torch._dynamo.reset()
    cache, graphs = new_cache("static"), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=keep, fullgraph=True)
    def keys(inputs):
        return masks.visible(inputs, None, cache, LAYERS, None).key_mask

    for seen in range(1, 5):
        fill(cache, 1)
        assert keys(torch.zeros(2, 1)).sum(dim=1).tolist() == [seen + 1] * 2
    assert len(graphs) == 1


# Which form reaches the recursion


@torch.no_grad()
def test_a_forward_without_a_cache(told):
    hybrid, ids = tiny_hybrid(), tokens()
    hybrid(ids, use_cache=False)
    assert form(told) == "past"
    hybrid(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    assert form(told) == "past"
    hybrid(ids, position_ids=torch.arange(9)[None] + 3, use_cache=False)
    assert form(told) == "past"
    for rows in (LEFT, RIGHT):
        hybrid(ids, attention_mask=padded(rows), use_cache=False)
        assert all(torch.equal(keys, padded(rows).bool()) for _, keys in told)
        assert form(told) == "keys 9"


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_a_forward_with_a_cache(kind, told):
    """The whole in chunks of 4, 1, 1 and 3 tokens. One token into a static cache sees slots, not tokens."""
    hybrid, ids = tiny_hybrid(), tokens()
    for mask, expected in ((None, ["past"] * 4), (padded(), ["keys 4", "keys 5", "keys 6", "keys 9"])):
        cache = None if kind == "dynamic" else StaticCache(config=hybrid.config, max_cache_len=SLOTS)
        forms, parts, at = [], [], 0
        for n in (4, 1, 1, 3):
            given = {} if mask is None else {"attention_mask": mask[:, : at + n]}
            output = hybrid(ids[:, at : at + n], **as_argument(cache), use_cache=True, **given)
            cache = output.past_key_values
            parts.append(output.logits)
            forms.append(form(told))
            at += n
        if kind == "static":
            expected[1] = expected[2] = f"keys {SLOTS}"
        assert forms == expected
        whole = hybrid(ids, attention_mask=mask, use_cache=False).logits
        told.clear()
        real = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_generating_needs_no_general_mask(family, told):
    hybrid, ids = tiny_hybrid(family), tokens(1)
    batch = torch.cat((torch.zeros(2, 3, dtype=torch.long), tokens()), dim=1)
    left = {"attention_mask": (batch != 0).long()}
    ways = [
        (ids, {}),
        (ids, {"num_beams": 2}),
        (ids, {"prompt_lookup_num_tokens": 2}),
        (ids, {"use_cache": False}),
        (batch, left),
        (batch, left | {"num_beams": 2}),
        (batch, left | {"use_cache": False}),
    ]
    if family != "bloom":  # not on transformers 5.17
        ways += [
            (ids, {"cache_implementation": "static"}),
            (batch, left | {"cache_implementation": "static"}),
        ]
    for prompt, how in ways:
        hybrid.generate(prompt, **GREEDY, **how)
        assert told and all(mask is None for mask, _ in told), how
        is_padded, is_static = prompt is batch, "cache_implementation" in how
        first, last = told[0][1], told[-1][1]
        assert (first is not None) == is_padded, how
        assert (last is not None) == (is_padded or is_static), how
        told.clear()


@pytest.mark.skipif(interpreting(), reason="traced as users would, without the interpreter")
def test_a_compiled_decoding_gives_the_same_and_needs_no_general_mask(told):
    torch._dynamo.reset()
    hybrid, ids = brief_hybrid(), tokens()
    want = hybrid.generate(ids, **GREEDY)
    told.clear()
    hybrid.forward = torch.compile(hybrid.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(hybrid.generate(ids, cache_implementation="static", **GREEDY), want)
    assert told and all(mask is None for mask, _ in told)


@torch.no_grad()
def test_what_is_general_stays_general(told):
    hybrid, ids = tiny_hybrid(), tokens()
    causal = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9)
    want = hybrid(ids, use_cache=False).logits
    told.clear()
    # 4D
    got = hybrid(ids, attention_mask=causal, use_cache=False).logits
    assert all(mask is causal for mask, _ in told)
    assert form(told) == "mask"
    torch.testing.assert_close(got, want)
    # two sequences in a row
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    got = hybrid(ids, position_ids=packed, use_cache=False).logits
    assert form(told) == "mask"
    torch.testing.assert_close(got[:, 4:], hybrid(ids[:, 4:], use_cache=False).logits)


@torch.no_grad()
def test_masks_that_transformers_made(told):
    """It leaves one out in a prefill; the slots behind the tokens must not be looked at then."""
    hybrid, ids = tiny_hybrid("qwen3"), tokens()
    want = hybrid(ids, use_cache=False).logits
    for rows in (None, RIGHT):
        mask = None if rows is None else padded(rows)
        cache = StaticCache(config=hybrid.config, max_cache_len=SLOTS)
        given = {"config": hybrid.llm_model.config, "inputs_embeds": torch.zeros(2, 9, 0)}
        made = theirs.create_masks_for_generate(**given, attention_mask=mask, **as_argument(cache))
        told.clear()
        got = hybrid(ids, attention_mask=made, **as_argument(cache)).logits
        assert form(told) == ("past" if mask is None else "mask")
        torch.testing.assert_close(got[:, :5], want[:, :5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_static_cache_with_the_injection_switched_off(family):
    hybrid, ids = tiny_hybrid(family), tokens()
    with hybrid.disable_injection():
        told = hybrid.generate(ids, cache_implementation="static", **GREEDY)
        assert torch.equal(told, hybrid.generate(ids, **GREEDY))


# All of it runs on the kernels, which take no general mask


@pytest.mark.kernels
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("mask", [None, padded(LEFT, 7)], ids=["plain", "padded"])
@torch.no_grad()
def test_prefill_and_decoding_on_the_kernels(kind, mask, monkeypatch):
    hybrid, ids = brief_hybrid().to(DEVICE), tokens(length=7).to(DEVICE)
    real = slice(None) if mask is None else mask.bool()
    launched = []
    for module in (decode_attention, launchers):
        launch = module.launch

        def count(kernel, *args, launch=launch, **meta):
            launched.append(kernel.__name__)
            launch(kernel, *args, **meta)

        monkeypatch.setattr(module, "launch", count)

    def run():
        cache = None if kind == "dynamic" else StaticCache(config=hybrid.config, max_cache_len=SLOTS)
        parts, at = [], 0
        for n in (4, 1, 1, 1):
            given = {} if mask is None else {"attention_mask": mask[:, : at + n].to(DEVICE)}
            output = hybrid(ids[:, at : at + n], **as_argument(cache), use_cache=True, **given)
            cache = output.past_key_values
            parts.append(output.logits)
            at += n
        return torch.cat(parts, dim=1)[real]

    with backend("reference"):
        want = run()
    assert not launched
    with backend("triton"):
        got = run()
    evaluations = hybrid.llm_model.model.layers[1].trm.recursion.evaluations() * 2
    assert launched.count("rope_attention_fwd_kernel") == evaluations
    assert launched.count("_decode_attention_fwd_kernel") == 3 * evaluations
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.kernels
@torch.no_grad()
def test_a_whole_forward_on_the_kernels():
    hybrid, ids = brief_hybrid().to(DEVICE), tokens(length=7).to(DEVICE)
    for mask in (None, padded(LEFT, 7).to(DEVICE), padded(RIGHT, 7).to(DEVICE)):
        real = slice(None) if mask is None else mask.bool()
        logits = []
        for name in ("reference", "triton"):
            with backend(name):
                logits.append(hybrid(ids, attention_mask=mask, use_cache=False).logits[real])
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
