"""generate_batch gives what generate gives: transformers' continuous batching of a hybrid."""

import copy
import gc
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.configuration_utils import CompileConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.utils import build_attention_mask

from hybrid import Halting, HybridModel
from hybrid.serving.paged_keys import PagedKeys, attention_types, mask_of_lengths
from hybrid.serving.vllm_plugin import register
from tests.support.served import greedy
from tests.support.tiny import FAMILIES, tiny_hybrid, tokens

ROOT = Path(__file__).parents[3]
NEW = 5
IS_OLD = "kwargs" not in inspect.signature(PagedAttentionCache.update).parameters
WITHOUT_INTERFACE = (
    "falcon",
    "bloom",
)  # transformers' own continuous batching of the bare base is wrong or fails
BATCHED = [family for family in FAMILIES if family not in WITHOUT_INTERFACE]
needs_rooms = pytest.mark.skipif(
    IS_OLD, reason="this transformers' paged cache takes no keys but the model's own"
)


@pytest.fixture(autouse=True)
def _quick_to_collect():
    """transformers collects garbage when a manager stops: seconds, over everything that is imported here."""
    gc.freeze()
    yield
    gc.unfreeze()


def prompts() -> list[list[int]]:
    """Mixed lengths, one longer than a forward takes, and two that begin alike."""
    alike = tokens(1, 16, seed=9)[0].tolist()
    first = [tokens(1, length, seed=length)[0].tolist() for length in (5, 37, 1)]
    return [*first, *(alike + tokens(1, length, seed=length)[0].tolist() for length in (2, 3))]


def wide_hybrid(family: str = "llama", **changes):
    """A hybrid whose base does not say one token again and again."""
    hybrid = tiny_hybrid(family, **changes)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in hybrid.base_named_parameters():
        if parameter.ndim == 2 and "norm" not in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return hybrid


def generated(hybrid, **arguments) -> list[tuple[list[int], list[float]]]:
    """Of each prompt by itself: tokens, and their log probabilities."""
    found = []
    for prompt in prompts():
        scores = {"output_logits": True, "return_dict_in_generate": True}
        out = greedy(hybrid, prompt, max_new_tokens=NEW, **scores, **arguments)
        new = out.sequences[0, len(prompt) :]
        logits = torch.cat(out.logits).float()
        found.append((new.tolist(), F.log_softmax(logits, -1).gather(1, new[:, None])[:, 0].tolist()))
    return found


def settings(**changes) -> ContinuousBatchingConfig:
    sizes = {"page_size": 8, "num_blocks": 60, "max_batch_tokens": 24, "return_logprobs": True}
    return ContinuousBatchingConfig(**(sizes | changes))


def batched(hybrid, **arguments) -> list[tuple[list[int], list[float]]]:
    """What `generated` is compared with, all prompts at once."""
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=NEW)
    out = hybrid.generate_batch(
        prompts(), generation_config=generation, continuous_batching_config=settings(), **arguments
    )
    assert [answer.error for answer in out.values()] == [None] * len(prompts())
    return [(answer.generated_tokens, answer.logprobs) for answer in out.values()]


def assert_same(some, others) -> None:
    assert [ids for ids, _ in some] == [ids for ids, _ in others]
    # sums in another order: one row of all tokens, and chunks
    torch.testing.assert_close(
        torch.tensor([p for _, p in some]), torch.tensor([p for _, p in others]), atol=2e-4, rtol=1e-3
    )


def is_far(some, others) -> bool:
    return any(
        abs(p - q) > 0.01
        for (_, a), (_, b) in zip(some, others, strict=True)
        for p, q in zip(a, b, strict=True)
    )


@needs_rooms
@pytest.mark.parametrize("family", BATCHED)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_family_gives_what_generate_gives(family, attention):
    hybrid = wide_hybrid(family, num_cycles=1, trm_num_layers=1)
    if attention == "sdpa" and not hybrid._supports_sdpa:
        pytest.skip(f"{family} has no sdpa in transformers")
    hybrid.set_attn_implementation(attention)
    expected = generated(hybrid)
    assert_same(batched(hybrid), expected)
    with hybrid.disable_injection():
        assert is_far(generated(hybrid), expected), "the TRM has to matter"


@needs_rooms
@pytest.mark.parametrize(
    "changes",
    [
        {},  # two cycles, two layers, one key head of three
        {"blending_strategy": "gated", "trm_input_norm": True},
        {
            "trm_hidden_size": 96,
            "trm_num_key_value_heads": 3,
        },  # wider than the base: several of the cache's layers
        {"injection_layers": [0], "trm_quantize": "int8"},
        {"trm_cache": "last"},  # several chunks, and several sequences in a row
        {"trm_cache": "last", "trm_hidden_size": 96, "trm_num_key_value_heads": 3},
    ],
    ids=["cycles", "gated", "wide", "quantized", "last", "wide last"],
)
def test_every_kind_of_trm_gives_what_generate_gives(changes):
    hybrid = wide_hybrid(**changes)
    assert_same(batched(hybrid), generated(hybrid))


@needs_rooms
@pytest.mark.parametrize("n", range(1, 9))
def test_every_number_of_steps(n):
    hybrid = wide_hybrid(num_cycles=1, trm_num_layers=1, injection_layers=[2])
    expected = generated(hybrid, num_recursion_steps=n)
    assert_same(batched(hybrid, num_recursion_steps=n), expected)
    assert is_far(generated(hybrid, num_recursion_steps=n + 1), expected), (
        "another n has to give something else"
    )
    hybrid.config.num_recursion_steps = n  # as a server does, which passes none
    assert_same(batched(hybrid), expected)


@needs_rooms
def test_a_shared_prefix_is_read_from_its_pages(monkeypatch):
    """What the first request left in its pages is not computed for the second, whose answer is the same."""
    hybrid = wide_hybrid(num_cycles=1, trm_num_layers=1)
    found = []
    search = PagedAttentionCache.search_prefix_match

    def search_and_note(self, request_id, prompt_ids):
        found.append(search(self, request_id, prompt_ids))
        return found[-1]

    monkeypatch.setattr(PagedAttentionCache, "search_prefix_match", search_and_note)
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=NEW)
    answers = []
    with hybrid.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=settings()
    ) as manager:
        for prompt in prompts()[-2:]:
            manager.add_requests([prompt], max_new_tokens=NEW)
            while (answer := manager.get_result(timeout=1000)) is not None and not answer.is_finished():
                pass
            answers.append((answer.generated_tokens, answer.logprobs))
    assert found == [0, 16], "two pages of 8"
    assert_same(answers, generated(hybrid)[-2:])


@needs_rooms
def test_without_injection_the_base_is_batched():
    hybrid = wide_hybrid(num_cycles=1, trm_num_layers=1)
    with hybrid.disable_injection():
        expected = generated(hybrid)
        assert_same(batched(hybrid), expected)
    hybrid.injection_enabled = False
    assert_same(batched(hybrid), expected)


@needs_rooms
def test_a_kept_manager_serves_one_number_of_steps():
    hybrid = wide_hybrid(num_cycles=1, trm_num_layers=1, injection_layers=[2])
    expected = generated(hybrid)
    for _ in range(2):
        assert_same(batched(hybrid, persistent_manager=True), expected)
    with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"):
        batched(hybrid, num_recursion_steps=7)
    with hybrid.disable_injection(), pytest.raises(ValueError, match="destroy_cached"):
        batched(hybrid)
    hybrid.config.injection_strength = 9.0
    with pytest.raises(ValueError, match="destroy_cached"):
        batched(hybrid)
    hybrid.destroy_cached_continuous_batching_manager()
    assert_same(batched(hybrid, num_recursion_steps=7), generated(hybrid, num_recursion_steps=7))


@needs_rooms
@pytest.mark.parametrize("family", WITHOUT_INTERFACE)
def test_a_base_that_transformers_cannot_batch_is_refused(family):
    hybrid = tiny_hybrid(family)
    with pytest.raises(ValueError, match="_supports_attention_backend"):
        batched(hybrid)
    with hybrid.disable_injection(), pytest.raises(ValueError, match="_supports_attention_backend"):
        batched(hybrid)


@needs_rooms
@pytest.mark.parametrize("misspelt", ["num_recursion_step", "do_sample"])
def test_an_argument_that_would_be_dropped_is_refused(misspelt):
    with pytest.raises(ValueError, match=f"generate_batch expected no {misspelt}. Settings of generation"):
        tiny_hybrid().generate_batch([[3, 4]], **{misspelt: 1})


@needs_rooms
def test_what_transformers_would_answer_otherwise_is_refused():
    hybrid = tiny_hybrid()
    for prompts in ([[3, 4], []], [[]], [torch.tensor([3, 4])]):
        with pytest.raises(ValueError, match="expected lists of token ids, none of them empty"):
            hybrid.generate_batch(prompts)
    with pytest.raises(ValueError, match="expected num_beams 1, got 2"):
        hybrid.generate_batch([[3, 4]], GenerationConfig(max_new_tokens=2, num_beams=2))
    with torch.inference_mode(), pytest.raises(ValueError, match="outside of inference_mode"):
        hybrid.generate_batch([[3, 4]], max_new_tokens=2)


@needs_rooms
@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"repetition_penalty": 1.5}, "RepetitionPenaltyLogitsProcessor"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"bad_words_ids": [[5]], "min_new_tokens": 3}, "MinNewTokensLengthLogitsProcessor, NoBadWords"),
    ],
    ids=["penalty", "ngrams", "two"],
)
def test_what_reads_the_tokens_before_is_refused_by_name(setting, named):
    generation = GenerationConfig(max_new_tokens=4, eos_token_id=2, **setting)
    with pytest.raises(ValueError, match=f"without .*{named.split(', ')[-1]}") as refused:
        tiny_hybrid().generate_batch([[3, 4]], generation)
    assert all(name in str(refused.value) for name in named.split(", "))


@needs_rooms
def test_what_reads_no_tokens_gives_what_generate_gives():
    hybrid = wide_hybrid(num_cycles=1, trm_num_layers=1, injection_layers=[2])
    first = {tokens_and_scores[0][0] for tokens_and_scores in generated(hybrid)}
    hybrid.generation_config.suppress_tokens = sorted(first)
    generation = GenerationConfig(
        do_sample=False, eos_token_id=-1, max_new_tokens=NEW, suppress_tokens=sorted(first)
    )
    out = hybrid.generate_batch(prompts(), generation, settings())
    found = [answer.generated_tokens for answer in out.values()]
    assert found == [ids for ids, _ in generated(hybrid)] and not first & {ids[0] for ids in found}


@needs_rooms
def test_prompts_that_no_forward_can_read_are_refused_before_the_start():
    hybrid = tiny_hybrid()
    for bad in (99, -1, True, 3.0):
        with pytest.raises(ValueError, match=rf"expected token ids in 0\.\.98, got {bad} in prompt 1"):
            hybrid.generate_batch([[3, 4], [5, bad]], max_new_tokens=2)


@needs_rooms
@pytest.mark.parametrize(
    ("family", "blocks", "room"), [("llama", 4, 32), ("gpt2", 60, 64), ("opt", 60, 64), ("opt", 4, 32)]
)
def test_a_sequence_without_room_is_refused_before_the_start(family, blocks, room):
    hybrid = tiny_hybrid(family, num_cycles=1, trm_num_layers=1, injection_layers=[2])
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=3)
    sized = {"generation_config": generation, "continuous_batching_config": settings(num_blocks=blocks)}
    with pytest.raises(ValueError, match=rf"in {room} places, got {room - 1} and 3 in prompt 1"):
        hybrid.generate_batch([[3, 4], [5] * (room - 1)], **sized)
    (answer,) = hybrid.generate_batch([[5] * (room - 2)], **sized).values()
    assert len(answer.generated_tokens) == 3 and answer.error is None


@needs_rooms
def test_halting_is_refused():
    hybrid = wide_hybrid(num_cycles=1, trm_num_layers=1, injection_layers=[2])
    expected = generated(hybrid)
    with pytest.raises(ValueError, match="expected no halting"):
        batched(hybrid, halting=Halting(0.2))
    hybrid.halting = Halting(0.2)
    with pytest.raises(ValueError, match="expected no halting"):
        batched(hybrid)
    assert_same(batched(hybrid, halting=False), expected)


@needs_rooms
@pytest.mark.parametrize(
    "changes",
    [
        {"max_blocks_per_request": 4},
        {"use_cuda_graph": True},
        {"use_cuda_graph": (False, True)},
        {"default_compile_level": 1},
        {"varlen_compile_config": CompileConfig()},
        {"decode_compile_config": CompileConfig()},
        {"q_padding_interval_size": 64},
        {"kv_padding_interval_size": 64},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_that_do_not_serve_a_trm_are_refused(changes):
    hybrid = tiny_hybrid()
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"expected {name} to be left out"):
        hybrid.generate_batch(prompts(), continuous_batching_config=settings(**changes))
    with pytest.raises(ValueError, match="compile_config to be left out"):
        hybrid.generate_batch(
            prompts(),
            generation_config=GenerationConfig(compile_config=CompileConfig()),
            continuous_batching_config=settings(),
        )


@needs_rooms
@pytest.mark.parametrize("regime", ["one_launch", "per_phase"])
def test_one_launch_is_refused(regime):
    with pytest.raises(ValueError, match="expected trm_regime auto or per_op"):
        tiny_hybrid(trm_regime=regime).generate_batch(prompts(), continuous_batching_config=settings())


@needs_rooms
def test_tensor_parallel_is_refused():
    hybrid = tiny_hybrid()
    hybrid._device_mesh = object()
    with pytest.raises(ValueError, match="expected one device"):
        hybrid.generate_batch(prompts(), continuous_batching_config=settings())


@needs_rooms
def test_a_switch_in_the_middle_is_an_error_of_the_request():
    hybrid = wide_hybrid(num_cycles=1, trm_num_layers=1, injection_layers=[2])
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=2)
    with hybrid.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=settings()
    ) as manager:
        hybrid.injection_enabled = False
        manager.add_requests([prompts()[0]], max_new_tokens=2)
        answer = manager.get_result(timeout=1000)
    assert "switched on or off" in answer.error


def test_old_paged_caches_are_refused(monkeypatch):
    def update(self, key_states, value_states, layer_idx, read_index, write_index):
        raise AssertionError("of transformers 5.17")

    monkeypatch.setattr(PagedAttentionCache, "update", update)
    with pytest.raises(ValueError, match="expected transformers 5.19 or newer"):
        tiny_hybrid().generate_batch(prompts())


def test_a_paged_cache_for_the_base_alone_is_refused():
    hybrid = tiny_hybrid()
    with pytest.raises(ValueError, match="made for the language model alone"):
        hybrid(tokens(1, 5), use_cache=False, cache=object.__new__(PagedAttentionCache))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_instance_supports_is_what_its_base_supports(family):
    hybrid = tiny_hybrid(family)
    for name in ("sdpa", "flash_attn", "flex_attn", "attention_backend"):
        assert getattr(hybrid, f"_supports_{name}") == getattr(hybrid.llm_model, f"_supports_{name}")
    assert hybrid._supports_logits_to_keep() == hybrid.llm_model._supports_logits_to_keep()
    assert copy.deepcopy(hybrid)._supports_sdpa == hybrid._supports_sdpa


def test_flash_attention_has_the_mask_that_others_are_given():
    lengths_q, lengths_k = [0, 3, 4, 9], [0, 7, 12, 17]
    theirs = torch.full((1, 1, 9, 17), torch.finfo(torch.float32).min)
    build_attention_mask(theirs, lengths_q, lengths_k)
    assert torch.equal(theirs == 0, mask_of_lengths(torch.tensor(lengths_q), torch.tensor(lengths_k)))


def test_rounds_of_a_row_are_the_first_tokens_of_its_sequences_then_the_second_ones():
    names = ("cache", "read_index", "write_index", "cu_seq_lens_k", "max_length_k")
    base = SimpleNamespace(num_hidden_layers=3, num_key_value_heads=2, head_dim=4)
    paged = PagedKeys({"cu_seq_lens_q": torch.tensor([0, 3, 4, 6]), **dict.fromkeys(names)}, base)
    found = [tokens.tolist() for tokens in paged.rounds(6, torch.device("cpu"))]
    assert found == [[0, 3, 4], [1, 5], [2]]


def test_keys_wider_than_a_layer_of_the_cache_come_back_as_they_went():
    """One evaluation's keys, over as many layers as they fill; no two evaluations share a layer."""
    base = SimpleNamespace(num_hidden_layers=3, num_key_value_heads=2, head_dim=4)
    layers = {}

    def update(keys, values, layer, where):
        assert layer not in layers and layer >= 3 and keys.shape == (1, 2, 5, 4)
        layers[layer] = (keys, values)
        return keys, values

    names = ("read_index", "write_index", "cu_seq_lens_k", "max_length_k")
    paged = PagedKeys({"cache": SimpleNamespace(update=update), **dict.fromkeys(names)}, base)
    for evaluation in range(2):
        keys, values = torch.randn(1, 3, 5, 6), torch.randn(1, 3, 5, 6)
        for given, back in zip((keys, values), paged.update(evaluation, keys, values), strict=True):
            assert torch.equal(given, back)
    assert sorted(layers) == list(range(3, 9))  # 18 numbers in layers of 8


def test_transformers_server_finds_the_architecture_of_a_config():
    """`transformers serve` takes it from the module transformers, of which there may be two."""
    from transformers.cli.serving import model_manager

    assert sys.modules["transformers"].HybridModel is HybridModel
    assert model_manager.transformers.HybridModel is HybridModel


def test_the_plugin_tells_vllm_where_the_model_is(monkeypatch):
    told = {}
    registry = SimpleNamespace(get_supported_archs=lambda: told, register_model=told.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    for _ in range(2):  # vLLM calls it in each of its processes, and may call it again
        register()
    (where,) = told.values()
    assert list(told) == [HybridModel.__name__], "which a saved config names"
    module, name = where.split(":")
    assert name in (ROOT / f"{module.replace('.', '/')}.py").read_text()


def test_layers_are_of_the_type_that_their_config_says():
    assert attention_types(tiny_hybrid("mistral").llm_model.config) == ["sliding_attention"] * 3
    assert attention_types(tiny_hybrid("llama").llm_model.config) == ["full_attention"] * 3
