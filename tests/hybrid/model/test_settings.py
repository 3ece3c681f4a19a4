"""What is set on a hybrid takes effect with the next forward and is saved, or is refused."""

import asyncio
import copy
import pickle
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybrid import HybridConfig, HybridModel
from hybrid.config import trm_fields
from hybrid.model.cache_name import as_argument
from tests.support.tiny import tiny_base, tiny_config, tiny_hybrid, tokens
from trm_kernels.recursion import recursion as recursion_ops
from trm_kernels.runtime.backend import backend, current_backend

EFFECTIVE = {
    "num_recursion_steps": 4,
    "num_cycles": 3,
    "injection_strength": 0.3,
    "trm_rms_norm_eps": 0.1,
    "trm_rope_theta": 3.0,
    "trm_input_norm": False,
    "trm_cache": "last",
}
BUILT_IN = {
    "injection_layers": [1],
    "trm_hidden_size": 48,
    "trm_num_heads": 6,
    "trm_num_layers": 1,
    "trm_num_key_value_heads": 3,
    "trm_intermediate_size": 64,
    "blending_strategy": "gated",
    "trm_dtype": "bfloat16",
    "lora_rank": 2,
}
NOT_SEEN_IN_EVAL = {
    "grad_cycles": None,
    "deep_supervision": False,
    "recursion_sampling": "uniform",
    "recursion_seed": 3,
    "trm_save": "step",
    "trm_attention": "sdpa",
    "trm_regime": "per_op",
    "trm_quantize": "int8",
}


def test_every_field_has_a_test():
    assert set(trm_fields()) == {*EFFECTIVE, *BUILT_IN, *NOT_SEEN_IN_EVAL}


@torch.no_grad()
@pytest.mark.parametrize("field", EFFECTIVE)
def test_a_setting_takes_effect_at_once_and_is_kept(field, tmp_path):
    ids, value = tokens(), EFFECTIVE[field]
    hybrid, before = tiny_hybrid(), tiny_hybrid()(ids).logits
    setattr(hybrid.config, field, value)
    want = tiny_hybrid(**{field: value})(ids).logits
    assert not torch.equal(want, before)
    assert torch.equal(hybrid(ids).logits, want)
    for twin in (copy.deepcopy(hybrid), pickle.loads(pickle.dumps(hybrid))):
        assert torch.equal(twin(ids).logits, want)
        setattr(twin.config, field, getattr(tiny_config(), field))
        assert torch.equal(twin(ids).logits, before), "a copy has its own config"
        assert torch.equal(hybrid(ids).logits, want)
    hybrid.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, want)


def test_settings_of_training_take_effect_at_once():
    """How many cycles pass gradients, from how many the loss is, how many steps are drawn, what is kept."""
    ids, hybrid = tokens(), tiny_hybrid(grad_cycles=1).freeze_base().train()
    for field, value in (("grad_cycles", None), ("deep_supervision", True), ("trm_save", "step")):
        setattr(hybrid.config, field, value)
    hybrid(ids, labels=ids).loss.backward()
    made = tiny_hybrid(grad_cycles=None, deep_supervision=True, trm_save="step").freeze_base().train()
    made(ids, labels=ids).loss.backward()
    for (name, p), q in zip(hybrid.named_parameters(), made.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    hybrid.config.update({"recursion_sampling": "uniform", "num_recursion_steps": 6, "recursion_seed": 1})
    drawn = tiny_hybrid(recursion_sampling="uniform", num_recursion_steps=6, recursion_seed=1)
    assert [hybrid.draw_recursion_steps(i) for i in range(9)] == [
        drawn.draw_recursion_steps(i) for i in range(9)
    ]


@pytest.mark.parametrize("field", BUILT_IN)
def test_what_is_built_into_the_weights_is_refused(field):
    hybrid = tiny_hybrid()
    setattr(hybrid.config, field, getattr(hybrid.config, field))
    with pytest.raises(
        ValueError, match=rf"expected {field} as the model was built with it.*new HybridModel"
    ):
        setattr(hybrid.config, field, BUILT_IN[field])
    assert getattr(hybrid.config, field) == getattr(tiny_config(), field)
    of_a_copy = copy.deepcopy(hybrid.config)  # belongs to no model
    changes = {"trm_num_key_value_heads": 2, "trm_hidden_size": 24} if field == "trm_num_heads" else {}
    of_a_copy.update({field: BUILT_IN[field]} | changes)
    assert getattr(of_a_copy, field) == BUILT_IN[field]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_call_takes_no_setting_that_nothing_reads(compiled):
    """A base takes any name. One of its own that is ours nowhere stays the base's affair."""
    hybrid, ids = tiny_hybrid(), tokens()
    if compiled:
        hybrid.forward = torch.compile(hybrid.forward, backend="eager")
    with pytest.raises(ValueError, match=r"num_cycles in the config \(model.config.num_c"):
        hybrid(ids, num_cycles=3)
    slips = {"num_recursion_step": "num_recursion_steps", "num_cycle": "num_cycles", "H_cycles": "num_cycles"}
    for slip, meant in slips.items():
        with pytest.raises(ValueError, match=f"no argument '{slip}'; did you mean '{meant}'"):
            hybrid(ids, **{slip: 5})
    hybrid._base_arguments |= {"num_recursion_step"}  # a base that has such an argument
    hybrid(ids, num_recursion_step=5)
    assert torch.equal(hybrid(ids, output_attentions=False).logits, hybrid(ids).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"injection_strength": float("nan")}, "injection_strength to be a finite number, got nan"),
        ({"num_recursion_steps": 0}, "num_recursion_steps to be a count of at least 1, got 0"),
        ({"num_cycles": 10**6}, "num_cycles of at most 4096, got 1000000"),
        ({"grad_cycles": 3}, r"grad_cycles in 1..2 \(num_cycles\) or None, got 3"),
        ({"trm_rms_norm_eps": 0.0}, "trm_rms_norm_eps to be a finite number above 0, got 0.0"),
        ({"trm_save": "some"}, "trm_save to be one of auto"),
        ({"num_recursion_step": 3}, "no field 'num_recursion_step'; did you mean 'num_recursion_steps'"),
        ({"injection_strength": 0.5, "num_cycles": 0}, "num_cycles to be a count of at least 1, got 0"),
    ],
)
def test_a_bad_value_is_refused_when_it_is_set_and_changes_nothing(changes, message):
    hybrid = tiny_hybrid()
    before = hybrid.config.to_dict()
    with pytest.raises(ValueError, match=message):
        hybrid.config.update(changes)
    assert hybrid.config.to_dict() == before


def test_attributes_of_the_parts_show_the_config_and_are_not_set():
    hybrid = tiny_hybrid()
    trm = hybrid.llm_model.model.layers[1].trm
    hybrid.config.num_cycles = 3
    assert trm.recursion.num_cycles == trm.recursion.spec.num_cycles == 3
    for module, name in ((trm.recursion, "num_cycles"), (trm.recursion, "eps"), (trm, "strength")):
        with pytest.raises(ValueError, match="to be set on model.config"):
            setattr(module, name, 7)
    with pytest.raises(ValueError, match="expected model.config.injection_strength to be set"):
        hybrid.injection_strength = 0.1
    with pytest.raises(ValueError, match="gradient_checkpointing_enable"):
        hybrid.gradient_checkpointing = True


def test_the_language_models_settings_reach_it():
    hybrid, ids = tiny_hybrid(), tokens()
    base = hybrid.llm_model
    hybrid.config.use_cache = False
    hybrid.config.output_hidden_states = True
    output = hybrid(ids)
    assert output.past_key_values is None and len(output.hidden_states) == 4
    base.config.output_hidden_states = False  # set on the language model, seen here
    assert hybrid.config.output_hidden_states is False and hybrid(ids).hidden_states is None
    hybrid.set_attn_implementation("eager")
    hybrid.config.output_attentions = True
    assert len(hybrid(ids).attentions) == 3
    hybrid.config.pad_token_id = 13
    assert base.config.pad_token_id == 13
    for loss in (lambda logits, labels, **_: logits.sum() * 0 + 42, Constant()):
        hybrid.loss_function = loss
        assert hybrid(ids, labels=ids).loss == 42
        assert hybrid.loss_function is base.loss_function or hybrid.loss_function == base.loss_function
    assert isinstance(hybrid(ids, return_dict=False), tuple)


class Constant(torch.nn.Module):
    def forward(self, logits, labels, **_):
        return logits.sum() * 0 + 42


def test_the_bases_settings_may_be_given_with_it():
    config = tiny_config(base_config=tiny_base().config, attn_implementation="eager", use_cache=False)
    assert config.base_config._attn_implementation == config._attn_implementation == "eager"
    assert config.base_config.use_cache is config.use_cache is False
    with pytest.raises(ValueError, match=r"injection_layers in 0\.\.3 for a base of 3 layers, got \[4\]"):
        tiny_config(injection_layers=[4], base_config=tiny_base().config)
    with pytest.raises(ValueError, match=r"injection_layers in 0\.\.3 for a base of 3 layers, got \[4\]"):
        config.injection_layers = [4]


def test_what_was_set_before_there_was_a_base_reaches_it():
    config = tiny_config(use_cache=False, attn_implementation="eager")
    config.pad_token_id = 7
    hybrid = HybridModel(llm_model=tiny_base(), config=config)
    assert hybrid.llm_model.config.use_cache is False and hybrid.llm_model.config.pad_token_id == 7
    assert hybrid.llm_model.config._attn_implementation == hybrid.config._attn_implementation == "eager"
    untouched = HybridModel(llm_model=tiny_base(), config=tiny_config()).llm_model.config
    assert untouched.to_dict() == tiny_base().config.to_dict()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_parameters", {"rope_type": "default", "rope_theta": 500.0}),
        ("rms_norm_eps", 1e-3),
        ("hidden_size", 64),
        ("intermediate_size", 48),
        ("num_key_value_heads", 4),
    ],
)
def test_the_bases_fields_are_set_through_the_config_and_come_back(field, value, tmp_path):
    config = tiny_config(base_config=tiny_base().config)
    setattr(config, field, value)
    assert getattr(config.base_config, field) == value
    for again in (HybridConfig.from_dict(config.to_dict()), HybridConfig(**config.to_diff_dict())):
        assert again.to_dict() == config.to_dict() and getattr(again, field) == value
    config.save_pretrained(tmp_path)
    again = HybridConfig.from_pretrained(tmp_path)
    assert getattr(again, field) == getattr(again.base_config, field) == value
    assert field not in (again.to_diff_dict().keys() - {"base_config"})


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
def test_rope_theta_means_the_bases_wherever_that_keeps_it(family, tmp_path):
    """transformers 5 has it in a dictionary, and would keep another beside it that nothing reads."""
    hybrid = tiny_hybrid(family)
    assert hybrid.config.rope_theta == hybrid.config.rope_parameters["rope_theta"] == 10000.0
    hybrid.config.rope_theta = 50.0
    assert hybrid.config.rope_theta == hybrid.llm_model.config.rope_parameters["rope_theta"] == 50.0
    hybrid.save_pretrained(tmp_path / "hybrid", save_base=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")
    assert loaded.config.rope_theta == 50.0
    want = tiny_base(family).config
    want.rope_parameters = {**want.rope_parameters, "rope_theta": 50.0}
    frequencies = type(loaded.llm_model)(want).base_model.rotary_emb.inv_freq
    assert torch.equal(loaded.llm_model.base_model.rotary_emb.inv_freq, frequencies)
    again = HybridConfig.from_pretrained(tmp_path / "hybrid", rope_theta=3.0)
    assert again.rope_theta == again.base_config.rope_parameters["rope_theta"] == 3.0


def test_a_fresh_hybrid_has_its_bases_name_and_a_loaded_one_its_own_folder(tmp_path):
    base = tiny_base()
    base.config.name_or_path = "somebody/a-base"
    hybrid = HybridModel(llm_model=base, config=tiny_config())
    assert hybrid.config.name_or_path == "somebody/a-base"

    hybrid.save_pretrained(tmp_path)
    hybrid = HybridModel.from_pretrained(tmp_path)
    assert hybrid.config.name_or_path == str(tmp_path)


def test_registering_for_an_auto_class_copies_no_code(tmp_path):
    HybridModel.register_for_auto_class()

    tiny_hybrid().save_pretrained(tmp_path)

    assert [file.name for file in tmp_path.glob("*.py")] == ["modeling_trm_hybrid.py"]


def test_what_was_set_can_be_deleted():
    hybrid = tiny_hybrid()
    hybrid.config.note = "mine"
    assert hybrid.llm_model.config.note == "mine"
    del hybrid.config.note
    assert not hasattr(hybrid.config, "note") and not hasattr(hybrid.llm_model.config, "note")
    with pytest.raises(AttributeError):
        del hybrid.config.note


@pytest.mark.parametrize(
    ("family", "field", "factor"),
    [
        ("llama", "hidden_size", 2),
        ("llama", "num_hidden_layers", 2),
        ("llama", "num_key_value_heads", 2),
        ("llama", "vocab_size", 2),
        ("qwen3", "intermediate_size", 2),
        ("qwen3", "head_dim", 2),
        ("gpt2", "n_embd", 2),
        ("gpt2", "n_positions", 0.5),
        ("gpt2", "num_attention_heads", 0),  # no model can be made of it
        ("gpt2", "tie_word_embeddings", 0),
    ],
)
def test_a_config_that_no_longer_fits_the_tensors_is_refused_when_saving(family, field, factor, tmp_path):
    """Else there would be a file that cannot be loaded."""
    hybrid = tiny_hybrid(family)
    want = getattr(hybrid.config, field)
    setattr(hybrid.config, field, type(want)(want * factor))
    with pytest.raises(ValueError, match="save_pretrained: expected the base's config to fit its tensors"):
        hybrid.save_pretrained(tmp_path / "hybrid")
    assert not (tmp_path / "hybrid").exists()
    setattr(hybrid.config, field, want)
    hybrid.save_pretrained(tmp_path / "hybrid")
    assert torch.equal(
        HybridModel.from_pretrained(tmp_path / "hybrid")(tokens()).logits, hybrid(tokens()).logits
    )


def test_a_base_with_more_rows_of_embeddings_fits(tmp_path):
    hybrid = tiny_hybrid("gpt2")
    hybrid.resize_token_embeddings(120)
    hybrid.save_pretrained(tmp_path / "hybrid", save_base=True)
    assert torch.equal(
        HybridModel.from_pretrained(tmp_path / "hybrid")(tokens()).logits, hybrid(tokens()).logits
    )


def test_a_name_that_the_base_does_not_know_yet_is_saved_and_loaded(tmp_path):
    """GPT-2 has no rope_theta; nearly `trm_rope_theta`, it is no slip."""
    hybrid = tiny_hybrid("gpt2")
    hybrid.config.rope_theta = 500.0
    assert hybrid.llm_model.config.rope_theta == 500.0
    hybrid.save_pretrained(tmp_path)
    assert HybridModel.from_pretrained(tmp_path).config.trm_rope_theta == 10000.0


def test_tools_find_the_bases_sizes_in_the_dictionary():
    sizes = tiny_hybrid().config.to_dict()
    assert (sizes["hidden_size"], sizes["num_hidden_layers"], sizes["num_attention_heads"]) == (32, 3, 4)
    assert sizes["model_type"] == "trm_hybrid"


class WithConstructor(HybridConfig):
    model_type = "with_constructor"

    def __init__(self, extra: int = 3, **kwargs):
        super().__init__(**kwargs)
        self.extra = extra


class WithFields(HybridConfig):
    model_type = "with_fields"
    extra: int = 3


@pytest.mark.parametrize("config_class", [WithConstructor, WithFields])
def test_a_subclass_may_have_more_fields(config_class, tmp_path):
    fields = {name: getattr(tiny_config(), name) for name in trm_fields()}
    config = config_class(**fields, base_config=tiny_base().config)
    assert config.extra == 3
    config.extra = 5
    assert "extra" not in config.base_config.to_dict()
    config.save_pretrained(tmp_path)
    again = config_class.from_pretrained(tmp_path, num_cycles=4)
    assert (again.extra, again.num_cycles) == (5, 4)
    hybrid = HybridModel(llm_model=tiny_base(), config=config)
    assert hybrid.config.extra == 5
    hybrid.save_pretrained(tmp_path / "hybrid", save_base=True)
    of_its_class = type("OfItsClass", (HybridModel,), {"config_class": config_class})
    loaded = of_its_class.from_pretrained(tmp_path / "hybrid").config
    assert type(loaded) is config_class and loaded.extra == 5 and not hasattr(loaded.base_config, "extra")
    with pytest.raises(ValueError, match="did you mean 'num_cycles'"):
        config_class(**fields, num_cycle=1)


class WithOtherDefaults(HybridConfig):
    model_type = "with_other_defaults"
    trm_input_norm: bool = False
    num_cycles: int = 3


def test_a_subclass_may_have_other_defaults():
    by_default = WithOtherDefaults(injection_layers=[1])
    assert (by_default.trm_input_norm, by_default.num_cycles) == (False, 3)
    given = WithOtherDefaults(injection_layers=[1], trm_input_norm=True, num_cycles=5)
    assert (given.trm_input_norm, given.num_cycles) == (True, 5)
    again = WithOtherDefaults.from_dict(given.to_dict())
    assert (again.trm_input_norm, again.num_cycles) == (True, 5)


# Off for a moment


@torch.no_grad()
def test_blocks_without_injection_may_overlap_in_threads():
    hybrid, ids = tiny_hybrid(), tokens()
    awake, asleep = hybrid(ids).logits, tiny_base()(ids).logits
    entered, may_leave, found = threading.Event(), threading.Event(), []

    def other():
        with hybrid.disable_injection():
            entered.set()
            assert may_leave.wait(600)
            found.append(hybrid(ids).logits)

    thread = threading.Thread(target=other)
    with hybrid.disable_injection():
        thread.start()
        assert entered.wait(600)
    found.append(hybrid(ids).logits)  # the other's block is open
    may_leave.set()
    thread.join()
    assert all(torch.equal(logits, asleep) for logits in found) and len(found) == 2
    assert torch.equal(hybrid(ids).logits, awake)


@torch.no_grad()
def test_blocks_without_injection_may_overlap_in_tasks():
    hybrid, ids = tiny_hybrid(), tokens()
    awake = hybrid(ids).logits

    async def a_while(turns):
        with hybrid.disable_injection():
            for _ in range(turns):
                await asyncio.sleep(0)

    async def several():
        await asyncio.gather(*(a_while(turns) for turns in (1, 4, 2, 3)))

    asyncio.run(several())
    assert hybrid.is_injecting and torch.equal(hybrid(ids).logits, awake)


@torch.no_grad()
def test_a_block_is_the_models_own_and_the_switch_stays():
    hybrid, ids = tiny_hybrid(), tokens()
    awake = hybrid(ids).logits
    with hybrid.disable_injection():
        twin = copy.deepcopy(hybrid)
        assert torch.equal(twin(ids).logits, awake), "a copy made in a block is not in it"
        hybrid.injection_enabled = False
    assert not hybrid.is_injecting, "what is set in a block stays set after it"
    hybrid.injection_enabled = True
    with pytest.raises(KeyError), hybrid.disable_injection():
        raise KeyError
    assert torch.equal(hybrid(ids).logits, awake)


@torch.no_grad()
@pytest.mark.parametrize("base_alone", ["in a block", "by itself"])
def test_a_cache_with_a_gap_is_refused(base_alone):
    hybrid, ids = tiny_hybrid(), tokens(1, 12)
    cache = hybrid(ids[:, :5], use_cache=True).past_key_values
    if base_alone == "in a block":
        with hybrid.disable_injection():
            hybrid(ids[:, 5:8], **as_argument(cache))
    else:
        hybrid.llm_model(ids[:, 5:8], use_cache=True, **as_argument(cache))
    with pytest.raises(ValueError, match=r"expected .*cache .* got one (filled )?with"):
        hybrid(ids[:, 8:], **as_argument(cache))


@pytest.mark.parametrize("save", ["step", "layer"])
def test_what_is_computed_again_runs_on_its_forwards_backend(save, monkeypatch):
    """Backward may have a thread that chose no backend, and comes after the block."""
    chosen, layer = [], recursion_ops.apply_layer

    def spy(*given):
        chosen.append(current_backend())
        return layer(*given)

    monkeypatch.setattr(recursion_ops, "apply_layer", spy)
    hybrid, ids = tiny_hybrid(trm_save=save).freeze_base().train(), tokens()
    with backend("reference"):
        loss = hybrid(ids, labels=ids).loss
    of_forward = len(chosen)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert len(chosen) > of_forward
    assert set(chosen) == {"reference"}


def test_a_setting_between_a_forward_and_its_backward_leaves_it_alone():
    """Gradient checkpointing computes the forward again."""
    gradients = []
    for change in (False, True):
        hybrid, ids = tiny_hybrid().freeze_base().train(), tokens()
        hybrid.gradient_checkpointing_enable({"use_reentrant": False})
        loss = hybrid(ids, labels=ids).loss
        if change:
            hybrid.config.update({"num_cycles": 1, "injection_strength": 0.1, "trm_rms_norm_eps": 0.1})
        with hybrid.disable_injection():
            loss.backward()
        gradients.append([p.grad for p in hybrid.trm_parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("method", ["prompt tuning", "p-tuning"])
def test_peft_learns_prompts_from_what_it_finds_in_the_config(method):
    peft = pytest.importorskip("peft")
    kinds = {
        "prompt tuning": (peft.PromptTuningConfig, {}),
        "p-tuning": (peft.PromptEncoderConfig, {"encoder_hidden_size": 16}),
    }
    make, sizes = kinds[method]
    hybrid, ids = tiny_hybrid().requires_grad_(False), tokens()
    model = peft.get_peft_model(hybrid, make(task_type="CAUSAL_LM", num_virtual_tokens=4, **sizes)).train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(learning, lr=1.0), []
    for _ in range(3):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


def test_an_attention_named_to_the_constructor_is_the_bases():
    config = tiny_config(base_config=tiny_base().config, attn_implementation="eager")
    assert config._attn_implementation == config.base_config._attn_implementation == "eager"
    again = type(config)(**(config.to_diff_dict() | {"attn_implementation": "sdpa"}))
    assert again._attn_implementation == again.base_config._attn_implementation == "sdpa"
