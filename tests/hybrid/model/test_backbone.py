"""A hybrid without its head: what comes out has gone through the TRMs, and nothing is there twice."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from hybrid import Halting, TokenHalting
from hybrid.model.cache_name import as_argument
from hybrid.model.injection_points import decoder_layers
from tests.support.tiny import FAMILIES, tiny_hybrid, tokens

PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_head_makes_the_logits_of_the_last_hidden_state(family):
    hybrid = tiny_hybrid(family)
    given = {"input_ids": tokens(), "attention_mask": PADDED, "use_cache": False}
    want = hybrid(**given).logits
    for backbone in (hybrid.base_model, hybrid.get_decoder()):
        logits = hybrid.get_output_embeddings()(backbone(**given).last_hidden_state)
        if (cap := getattr(hybrid.config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        torch.testing.assert_close(logits, want, rtol=1e-6, atol=1e-6)
    # called by the base's own name it is the base's, as ever
    own = hybrid.llm_model.base_model(**given).last_hidden_state
    with hybrid.disable_injection():
        assert torch.equal(hybrid.base_model(**given).last_hidden_state, own)


@torch.no_grad()
def test_positions_steps_cache_and_halting_are_those_of_the_whole_model():
    hybrid = tiny_hybrid()
    head, ids = hybrid.get_output_embeddings(), tokens()
    given = {"position_ids": torch.arange(9)[None] + 3, "num_recursion_steps": 5, "use_cache": False}
    given["halting"] = Halting(0.3)
    want = hybrid(ids, **given).logits
    assert torch.equal(head(hybrid.base_model(ids, **given).last_hidden_state), want)
    embeds = hybrid.get_input_embeddings()(ids)
    assert torch.equal(head(hybrid.base_model(inputs_embeds=embeds, **given).last_hidden_state), want)

    want, cache = hybrid(ids, use_cache=False).logits, DynamicCache(config=hybrid.llm_model.config)
    parts = [
        hybrid.base_model(ids[:, :5], **as_argument(cache)),
        hybrid.base_model(ids[:, 5:], **as_argument(cache)),
    ]
    torch.testing.assert_close(
        head(torch.cat([p.last_hidden_state for p in parts], 1)), want, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match="expected input_ids or inputs_embeds"):
        hybrid.base_model()
    with pytest.raises(ValueError, match="TokenHalting chooses among logits"):
        hybrid.base_model(ids, halting=TokenHalting(2))


def test_gradients_are_those_of_the_whole_model():
    gradients = []
    for through_backbone in (False, True):
        hybrid = tiny_hybrid(recursion_sampling="uniform", num_recursion_steps=6).freeze_base().train()
        hybrid.gradient_checkpointing_enable({"use_reentrant": False})
        if through_backbone:
            logits = hybrid.get_output_embeddings()(hybrid.base_model(tokens()).last_hidden_state)
        else:
            logits = hybrid(tokens()).logits
        logits.square().mean().backward()
        gradients.append([p.grad for p in hybrid.trm_parameters() if p.grad is not None])
    assert len(gradients[0]) > 0
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_it_is_a_view_and_no_second_owner():
    hybrid = tiny_hybrid()
    names = [name for name, _ in hybrid.named_parameters()]
    backbone = hybrid.base_model
    assert [name for name, _ in hybrid.named_parameters()] == names == list(hybrid.state_dict())
    assert {"llm_model.model." + name for name, _ in backbone.named_parameters()} == set(names) - {
        "llm_model.lm_head.weight"
    }
    inner = hybrid.llm_model.model
    assert backbone.layers is inner.layers and backbone.config is inner.config
    assert decoder_layers(hybrid) is inner.layers
    backbone.train()
    assert inner.training and backbone.training and inner.layers[0].training
    backbone.gradient_checkpointing_enable()
    assert inner.layers[0].gradient_checkpointing
    backbone.layers = inner.layers[:2]
    assert len(inner.layers) == 2
    assert hybrid.get_encoder() is hybrid

    twin = copy.deepcopy(tiny_hybrid())
    assert twin.base_model.layers is twin.llm_model.model.layers


@torch.no_grad()
def test_under_peft_it_has_the_adapters():
    model = get_peft_model(tiny_hybrid(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    hybrid = model.get_base_model().eval()
    logits = hybrid.get_output_embeddings()(hybrid.base_model(tokens(), use_cache=False).last_hidden_state)
    assert torch.equal(logits, model.eval()(input_ids=tokens(), use_cache=False).logits)
