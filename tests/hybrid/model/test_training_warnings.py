"""A training in which a TRM learns nothing says so, once; nothing else does."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from tests.support.tiny import tiny_hybrid, tokens

LORA = LoraConfig(r=2, target_modules=["q_proj"])
WITH_TRM = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["trm"])
WITH_BOTH = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["trm", "trm_before"])
PROMPT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


def said(run) -> list[str]:
    """The TRMs that `run` says to learn nothing, one a warning."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run()
    messages = [str(w.message) for w in seen if "learns nothing" in str(w.message)]
    assert all('modules_to_save=["trm", "trm_before"]' in message for message in messages)
    return [message.split("the TRM ")[1].split(" learns")[0] for message in messages]


def forward(model, **given):
    return lambda: model(input_ids=tokens(), labels=tokens(), **given)


@pytest.mark.parametrize("config", [LORA, PROMPT], ids=["lora", "prompt tuning"])
def test_a_trm_that_peft_froze_is_named_once(config):
    model = get_peft_model(tiny_hybrid(injection_layers=[2]), config)
    # saved at once, it has evaluated and generated first
    assert said(forward(model.eval())) == []
    with torch.no_grad():
        assert said(forward(model.train())) == []
    assert said(forward(model)) == ["llm_model.model.layers.1.trm"]
    assert said(forward(model)) == []


def test_through_the_backbone_that_trl_calls():
    hybrid = tiny_hybrid(injection_layers=[2])
    get_peft_model(hybrid, LORA).train()
    assert said(lambda: hybrid.base_model(tokens())) == ["llm_model.model.layers.1.trm"]


def test_one_of_several_is_found():
    model = get_peft_model(tiny_hybrid(injection_layers=[0, 2]), WITH_TRM).train()
    assert said(forward(model)) == ["llm_model.model.layers.0.trm_before"]


def test_full_training_of_the_base_alone():
    hybrid = tiny_hybrid(injection_layers=[2]).train()
    for parameter in hybrid.trm_parameters():
        parameter.requires_grad_(False)
    with hybrid.disable_injection():
        assert said(forward(hybrid)) == [], "it is the base that is trained"
    assert said(forward(hybrid)) == ["llm_model.model.layers.1.trm"]


def test_adapters_of_which_one_leaves_the_trm_out():
    model = get_peft_model(tiny_hybrid(injection_layers=[2]), WITH_TRM, adapter_name="one").train()
    model.add_adapter("two", LORA)
    assert said(forward(model)) == []
    model.set_adapter("two")
    assert said(forward(model)) == ["llm_model.model.layers.1.trm"]


@pytest.mark.parametrize("kind", ["phase 1", "phase 2", "gated", "checkpoints", "LoRA beside it"])
def test_silent_where_it_learns(kind):
    changes = {"gated": {"blending_strategy": "gated"}, "LoRA beside it": {"lora_rank": 2}}.get(kind, {})
    hybrid = tiny_hybrid(**changes).train()
    if kind != "phase 2":
        hybrid.freeze_base()
    if kind == "checkpoints":
        hybrid.gradient_checkpointing_enable()
    assert said(lambda: forward(hybrid, use_cache=False)().loss.backward()) == []


def test_silent_with_the_trm_in_modules_to_save():
    model = get_peft_model(tiny_hybrid(), copy.deepcopy(WITH_BOTH)).train()
    assert said(forward(model)) == []
    with model.disable_adapter():
        assert said(forward(model)) == []
    model = get_peft_model(tiny_hybrid(injection_layers=[2, 3]), copy.deepcopy(WITH_TRM)).train()
    assert said(forward(model)) == []


def test_silent_in_a_model_of_which_nothing_learns():
    """A reference model, or a teacher, that was left in training mode."""
    assert said(forward(tiny_hybrid().requires_grad_(False).train())) == []
