"""What transformers' documentation says of generate(), on hybrids: what it returns, takes and stops at.

The tests are our own: those of transformers itself (tests/generation) are in no source distribution. How
searches and caches agree is in test_generate.py.
"""

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria

from hybrid import Halting
from hybrid.model.cache_name import as_argument
from tests.support.tiny import LAYERS, VOCABULARY, WIDTH, tiny_hybrid, tokens

families = pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
NEW = 4
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
ALL = dict.fromkeys(("scores", "logits", "attentions", "hidden_states"), True)
RETURNS = {"return_dict_in_generate": True} | {f"output_{name}": True for name in ALL}
HEADS, TOKENS = 4, 9


@families
@pytest.mark.parametrize("use_cache", [True, False])
def test_what_it_returns_has_the_documented_shapes(family, use_cache):
    hybrid, ids = tiny_hybrid(family), tokens()
    hybrid.set_attn_implementation("eager")  # sdpa gives no attentions
    got = hybrid.generate(ids, use_cache=use_cache, **GREEDY, **RETURNS)
    assert torch.equal(got.sequences[:, :TOKENS], ids) and got.sequences.shape == (2, TOKENS + NEW)
    for name in ("scores", "logits"):
        assert [tuple(t.shape) for t in got[name]] == [(2, VOCABULARY)] * NEW
    assert torch.equal(torch.stack(got.scores).argmax(-1).T, got.sequences[:, TOKENS:])
    for step in range(NEW):
        seen = TOKENS + step
        asked = 1 if use_cache and step else seen
        assert [tuple(t.shape) for t in got.hidden_states[step]] == [(2, asked, WIDTH)] * (LAYERS + 1)
        assert [tuple(t.shape) for t in got.attentions[step]] == [(2, HEADS, asked, seen)] * LAYERS
    want = hybrid(got.sequences[:, :-1]).logits[:, TOKENS - 1 :]
    torch.testing.assert_close(torch.stack(got.logits, 1), want, rtol=1e-4, atol=1e-5)


@families
def test_beams_and_samples_return_as_many_as_were_asked_for(family):
    hybrid, ids = tiny_hybrid(family), tokens()
    beams = hybrid.generate(
        ids, num_beams=3, num_return_sequences=2, **GREEDY, **RETURNS | {"output_attentions": False}
    )
    assert beams.sequences.shape == (4, TOKENS + NEW) and beams.sequences_scores.shape == (4,)
    assert torch.equal(beams.sequences[::2, :TOKENS], ids) and beams.beam_indices.shape == (4, NEW)
    torch.manual_seed(0)
    how = {"do_sample": True, "top_k": 10, "temperature": 0.7, "max_new_tokens": NEW, "min_new_tokens": NEW}
    samples = hybrid.generate(ids, num_return_sequences=3, **how)
    torch.manual_seed(0)
    assert torch.equal(hybrid.generate(ids.repeat_interleave(3, 0), **how), samples)


@families
def test_embeddings_tell_what_their_ids_tell(family):
    hybrid, ids = tiny_hybrid(family), tokens()
    want = hybrid.generate(ids, **GREEDY)[:, TOKENS:]
    embeds = hybrid.get_input_embeddings()(ids)
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(hybrid.generate(inputs_embeds=embeds, **GREEDY, **how), want), how
    scores = {"return_dict_in_generate": True, "output_logits": True}
    there, back = (hybrid.generate(inputs_embeds=e, **GREEDY, **scores) for e in (embeds, embeds.flip(1)))
    assert not torch.allclose(there.logits[0], back.logits[0]), "what is embedded makes no difference"


@families
def test_a_prompt_in_chunks_and_one_that_went_on_tell_the_same(family):
    hybrid, ids = tiny_hybrid(family), tokens()
    want = hybrid.generate(ids, **GREEDY)
    assert torch.equal(hybrid.generate(ids, prefill_chunk_size=4, **GREEDY), want)
    half = GREEDY | {"max_new_tokens": 2, "min_new_tokens": 2}
    first = hybrid.generate(ids, return_dict_in_generate=True, **half)
    again = hybrid.generate(first.sequences, **as_argument(first.past_key_values), **half)
    assert torch.equal(again, want)


@families
def test_it_stops_where_it_is_told_and_pads_what_ended(family):
    hybrid, ids = tiny_hybrid(family), tokens()
    free = hybrid.generate(ids, **GREEDY)
    end = int(free[0, TOKENS + 1])
    stop = TOKENS + free[0, TOKENS:].tolist().index(end)
    got = hybrid.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=end)
    assert torch.equal(got[0, : stop + 1], free[0, : stop + 1])
    assert (got[0, stop + 1 :] == hybrid.config.pad_token_id).all()
    # of the prompt that does not end with the token to stop at: transformers 5.17 would say nothing
    end = int(free[1, TOKENS + 1])
    stop = TOKENS + free[1, TOKENS:].tolist().index(end)
    looked_up = hybrid.generate(
        ids[1:], max_new_tokens=NEW, do_sample=False, eos_token_id=end, prompt_lookup_num_tokens=3
    )
    assert torch.equal(looked_up[0], free[1, : stop + 1])

    class AtEleven(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 11)

    stopped = hybrid.generate(ids, max_new_tokens=NEW, do_sample=False, stopping_criteria=[AtEleven()])
    assert torch.equal(stopped, free[:, :11])


@families
def test_no_prompt_is_the_first_token_alone(family):
    hybrid = tiny_hybrid(family)
    first = torch.tensor([[hybrid.config.bos_token_id]])
    assert torch.equal(hybrid.generate(**GREEDY), hybrid.generate(first, **GREEDY))


@families
def test_a_generation_config_and_its_keywords_mean_the_same(family):
    hybrid, ids = tiny_hybrid(family), tokens()
    how = GREEDY | {"repetition_penalty": 1.3, "bad_words_ids": [[5]]}
    want = hybrid.generate(ids, **how)
    assert not torch.equal(want, hybrid.generate(ids, **GREEDY)), "a test that could not fail"
    config = GenerationConfig(pad_token_id=0, eos_token_id=2, **how)
    assert torch.equal(hybrid.generate(ids, generation_config=config), want)


@pytest.mark.parametrize(
    "setting", [{"num_recursion_steps": 1}, {"halting": Halting(threshold=0.2)}], ids=str
)
def test_what_a_call_takes_is_refused_in_the_settings_of_generation(setting):
    hybrid, ids = tiny_hybrid("llama"), tokens()
    config = GenerationConfig(pad_token_id=0, eos_token_id=2, **setting, **GREEDY)
    told = f"expected {next(iter(setting))} as an argument or as model.* got it in generation_config"
    with pytest.raises(ValueError, match=told):
        hybrid.generate(ids, generation_config=config)
    with pytest.raises(ValueError, match=told):
        hybrid.generate_batch(ids.tolist(), config)
    hybrid.generation_config = config
    with pytest.raises(ValueError, match=told):
        hybrid.generate(ids, **setting)


def test_settings_of_generation_that_say_nothing_take_no_argument_away():
    hybrid, ids = tiny_hybrid("llama"), tokens()

    def logits(**arguments):
        asked = {"output_logits": True, "return_dict_in_generate": True}
        return torch.cat(hybrid.generate(ids, **asked, **arguments).logits)

    config = GenerationConfig(pad_token_id=0, eos_token_id=2, num_recursion_steps=None, **GREEDY)
    one = logits(generation_config=config, num_recursion_steps=1)
    assert torch.equal(one, logits(num_recursion_steps=1, **GREEDY))
    assert not torch.equal(one, logits(generation_config=config))


@families
def test_logits_to_keep_are_the_last_ones(family):
    hybrid, ids = tiny_hybrid(family), tokens()
    want = hybrid(ids).logits
    torch.testing.assert_close(hybrid(ids, logits_to_keep=1).logits, want[:, -1:])
    torch.testing.assert_close(hybrid(ids, logits_to_keep=3).logits, want[:, -3:])
