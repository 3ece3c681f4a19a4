"""The hybrid against its base: equal when fresh, causal, cached, injected at every point, base untouched."""

import copy
import functools
import gc
import importlib.util
import pickle
import threading
import warnings
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaModel,
    T5Config,
)
from transformers import T5ForConditionalGeneration as T5
from transformers.modeling_layers import GradientCheckpointingLayer

from hybrid import CombinedTRMLLM, HybridModel
from hybrid.model.cache_name import as_argument
from hybrid.model.injection_points import keep_call_in_checkpoints
from hybrid.model.settled_call import recursion_steps
from tests.support.tiny import FAMILIES, LAYERS, WIDTH, awaken, tiny_base, tiny_config, tiny_hybrid, tokens
from trm_kernels.ops.attention import library as library_attention
from trm_kernels.recursion import injection as injection_ops
from trm_kernels.runtime.backend import backend, current_backend, interpreting

every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
@torch.no_grad()
def test_a_fresh_hybrid_equals_its_base_bit_for_bit(family):
    base, ids = tiny_base(family), tokens()
    logits = base(ids).logits
    told = base.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    names = list(base.state_dict())
    hybrid = HybridModel(llm_model=base, config=tiny_config(blending_strategy="gated"))
    assert torch.equal(hybrid(ids).logits, logits)
    assert torch.equal(hybrid.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False), told)
    assert torch.equal(base(ids).logits, logits), "the base by itself answers as before"
    assert [n for n in base.state_dict() if "trm" not in n] == names


@every_family
@torch.no_grad()
def test_every_injection_point_changes_the_logits(family):
    ids = tokens()
    plain = tiny_base(family)(ids).logits
    for point in range(LAYERS + 1):
        hybrid = tiny_hybrid(family, injection_layers=[point])
        assert not torch.allclose(hybrid(ids).logits, plain, atol=1e-3), f"nothing happened at point {point}"
        with hybrid.disable_injection():
            assert torch.equal(hybrid(ids).logits, plain)


@every_family
@torch.no_grad()
def test_no_later_token_changes_an_earlier_logit(family):
    hybrid, ids = tiny_hybrid(family), tokens()
    other = ids.clone()
    other[:, 5:] = tokens(seed=1)[:, 5:]
    a, b = hybrid(ids, use_cache=False).logits, hybrid(other, use_cache=False).logits
    assert torch.equal(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:], atol=1e-3)


@every_family
@torch.no_grad()
def test_a_cache_equals_full_recomputation(family):
    hybrid, ids = tiny_hybrid(family), tokens()
    whole = hybrid(ids, use_cache=False).logits
    first = hybrid(ids[:, :4], use_cache=True)
    parts, cache = [first.logits], first.past_key_values
    for a, b in ((4, 5), (5, 6), (6, 9)):
        parts.append(hybrid(ids[:, a:b], **as_argument(cache)).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


@every_family
@torch.no_grad()
def test_left_padding_equals_no_padding(family):
    hybrid, ids = tiny_hybrid(family), tokens()
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), dim=1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {} if family == "bloom" else {"position_ids": positions}  # ALiBi reads the mask instead
    got = hybrid(padded, attention_mask=mask, **given).logits[:, 3:]
    torch.testing.assert_close(got, hybrid(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_models_own_positions_reach_the_trms_rope():
    """bloom has none of its own (ALiBi), so what changes is the TRM: by distances, not by where it starts."""
    hybrid, ids = tiny_hybrid("bloom"), tokens()
    counted = hybrid(ids).logits
    positions = torch.arange(9)[None]
    torch.testing.assert_close(hybrid(ids, position_ids=positions + 5).logits, counted, rtol=1e-5, atol=1e-5)
    stretched = hybrid(ids, position_ids=positions * 3).logits
    assert not torch.allclose(stretched, counted, atol=1e-3)


@every_family
def test_training_moves_every_trm_and_nothing_of_the_base(family):
    hybrid = tiny_hybrid(family, blending_strategy="gated", grad_cycles=None).freeze_base().train()
    before = {name: p.detach().clone() for name, p in hybrid.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in hybrid.parameters() if p.requires_grad], lr=1e-2)
    ids = tokens()
    for _ in range(2):
        hybrid(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in hybrid.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == ("trm" in name), name


@pytest.mark.parametrize("part", ["head", "norm", "in a layer"])
def test_what_was_put_into_a_base_before_keeps_its_values(part, tmp_path):
    """transformers draws what it did not load itself, when a model is made around it."""
    tiny_base().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    if part == "head":
        base.lm_head = new = torch.nn.Linear(WIDTH, base.config.vocab_size, bias=False)
    elif part == "norm":
        base.model.norm = new = type(base.model.norm)(WIDTH)
        torch.nn.init.normal_(new.weight)
    else:
        base.model.layers[1].mlp.down_proj = new = torch.nn.Linear(64, WIDTH, bias=False)
    before, want = new.weight.detach().clone(), base(tokens()).logits
    hybrid = HybridModel(llm_model=base, config=tiny_config())
    assert torch.equal(new.weight, before) and torch.equal(hybrid(tokens()).logits, want)


def test_a_hybrid_of_no_file_draws_all_its_values():
    """Made without memory, as accelerate does it, then given some: the TRMs as well, W_out at zero."""
    with torch.device("meta"):
        hybrid = AutoModelForCausalLM.from_config(tiny_hybrid().config)
    hybrid.to_empty(device="cpu")
    for parameter in hybrid.parameters():
        torch.nn.init.constant_(parameter, 777.0)
    hybrid.initialize_weights()
    values = dict(hybrid.named_parameters())
    assert [name for name, p in values.items() if (p == 777.0).any()] == []
    drawn = [p for name, p in values.items() if "trm" in name and not name.endswith("out_proj.weight")]
    assert all(0 < p.std() < 2 for p in drawn if p.ndim == 2)
    assert not any(p.any() for name, p in values.items() if "trm" in name and ".out_proj." in name)


def test_names_and_freezing():
    base = tiny_base()
    assert CombinedTRMLLM is HybridModel
    hybrid = HybridModel(llm_model=base, config=tiny_config(trm_num_key_value_heads=3, trm_num_layers=1))
    assert hybrid.llm_model is base
    ours = sorted(name for name, _ in hybrid.named_parameters() if "trm" in name)
    of_layer_1 = [n.split(".trm.")[1] for n in ours if n.startswith("llm_model.model.layers.1.trm.")]
    assert of_layer_1 == [
        "in_proj.weight",
        "out_proj.weight",
        "recursion.layers.0.mlp.down_proj.weight",
        "recursion.layers.0.mlp.gate_up_proj.weight",
        "recursion.layers.0.self_attn.o_proj.weight",
        "recursion.layers.0.self_attn.qkv_proj.weight",
        "recursion.y_init",
        "recursion.z_init",
    ]
    hybrid.requires_grad_(False)
    hybrid.freeze_base()
    assert sorted(name for name, p in hybrid.named_parameters() if p.requires_grad) == ours
    assert sum(1 for _ in hybrid.trm_parameters()) == len(ours)
    assert all(p.ndim > 0 for p in hybrid.parameters())  # FSDP2 takes no 0-dimensional parameter


def test_the_callers_config_is_left_alone():
    config = tiny_config()
    HybridModel(llm_model=tiny_base(), config=config)
    assert config.base_config is None and config.base_model_name_or_path is None


@torch.no_grad()
def test_gate_and_strength_reach_the_blend():
    ids = tokens()
    plain = tiny_base()(ids).logits
    full = tiny_hybrid()(ids).logits
    assert torch.equal(tiny_hybrid(injection_strength=0.0)(ids).logits, plain)
    assert not torch.allclose(tiny_hybrid(injection_strength=0.5)(ids).logits, full, atol=1e-3)
    shut = tiny_hybrid(blending_strategy="gated")
    assert not torch.allclose(shut(ids).logits, full, atol=1e-3)
    for name, p in shut.named_parameters():
        if name.endswith("gate_bias"):
            p.fill_(-1e4)
    assert torch.equal(shut(ids).logits, plain)


@torch.no_grad()
def test_who_computes_the_trms_attention(monkeypatch):
    asked, attend = [], library_attention.attend

    def spy(op, name, *others):
        asked.append(name)
        return attend(op, name, *others)

    monkeypatch.setattr(library_attention, "attend", spy)
    ids = tokens()
    with backend("reference"):
        want = tiny_hybrid()(ids).logits
    assert not asked
    torch.testing.assert_close(tiny_hybrid(trm_attention="sdpa")(ids).logits, want, rtol=1e-5, atol=1e-5)
    assert set(asked) == {"sdpa"}
    hybrid = tiny_hybrid(trm_attention="sdpa_cudnn")
    with pytest.raises(RuntimeError, match="implementation 'sdpa_cudnn' expects CUDA tensors, got cpu"):
        hybrid(ids)
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(RuntimeError, match="needs the package flash-attn, and it is not installed"):
            tiny_hybrid(trm_attention="flash_attn")(ids)
    if not (torch.cuda.is_available() or interpreting()):
        with pytest.raises(RuntimeError, match="Triton cannot run here"):
            tiny_hybrid(trm_attention="triton")(ids)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_bases_attention_is_the_users(implementation, tmp_path):
    base = tiny_base()
    base.set_attn_implementation(implementation)
    hybrid = HybridModel(llm_model=base, config=tiny_config(trm_attention="sdpa"))
    assert base.config._attn_implementation == hybrid.config._attn_implementation == implementation
    assert {layer.self_attn.config._attn_implementation for layer in base.model.layers} == {implementation}
    other = {"eager": "sdpa", "sdpa": "eager"}[implementation]
    hybrid.set_attn_implementation(other)
    assert base.config._attn_implementation == other
    assert base.model.layers[1].trm.recursion.attention == hybrid.config.trm_attention == "sdpa"
    hybrid.save_pretrained(tmp_path)
    loaded = HybridModel.from_pretrained(tmp_path, attn_implementation=implementation)
    assert loaded.llm_model.config._attn_implementation == implementation
    assert loaded.llm_model.model.layers[1].trm.recursion.attention == "sdpa"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trm_stays_float32_in_a_half_precision_base(dtype):
    hybrid = awaken(HybridModel(llm_model=tiny_base().to(dtype), config=tiny_config())).freeze_base().train()
    output = hybrid(tokens(), labels=tokens())
    output.loss.backward()
    assert output.logits.dtype == dtype
    assert {p.dtype for p in hybrid.trm_parameters()} == {torch.float32}
    assert all(torch.isfinite(p.grad).all() for p in hybrid.trm_parameters() if p.grad is not None)
    asked = HybridModel(llm_model=tiny_base(), config=tiny_config(trm_dtype="bfloat16"))
    assert {p.dtype for p in asked.trm_parameters()} == {torch.bfloat16}


def test_training_float16_parameters_warns_once():
    hybrid = HybridModel(llm_model=tiny_base().half(), config=tiny_config()).train()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hybrid(tokens())
        hybrid(tokens())
    assert [str(w.message) for w in seen if "float16" in str(w.message)] == [
        "HybridModel: training float16 parameters (llm_model.model.embed_tokens.weight, ...): a plain AdamW "
        "was seen to reach NaN within 20 steps. Keep them in float32 or bfloat16, or freeze them."
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HybridModel(llm_model=tiny_base().half(), config=tiny_config()).freeze_base().train()(tokens())
        HybridModel(llm_model=tiny_base().half(), config=tiny_config()).eval()(tokens())


def test_copies_are_whole_and_apart():
    hybrid, ids = tiny_hybrid(), tokens()
    want = hybrid(ids).logits
    for twin in (copy.deepcopy(hybrid), pickle.loads(pickle.dumps(hybrid))):
        assert torch.equal(twin(ids).logits, want)
        awaken(twin, 3.0)
        assert not torch.allclose(twin(ids).logits, want, atol=1e-3), "the copy calls its own TRM"
        assert torch.equal(hybrid(ids).logits, want)


@torch.no_grad()
def test_eight_threads_do_not_mix_their_contexts():
    """All calls are in progress at once: each waits for the others behind its embedding."""
    hybrid = tiny_hybrid()
    inputs = [tokens(1 + i % 3, 4 + i, seed=i) for i in range(8)]
    want = [hybrid(ids, num_recursion_steps=1 + i % 3).logits for i, ids in enumerate(inputs)]
    together = threading.Barrier(8, timeout=600)  # one that fails would be waited for

    def wait(*_):
        together.wait()

    hook = hybrid.get_input_embeddings().register_forward_hook(wait)
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda i: hybrid(inputs[i], num_recursion_steps=1 + i % 3).logits, range(8)))
    hook.remove()
    for mine, alone in zip(got, want, strict=True):
        assert torch.equal(mine, alone)


# What autograd keeps


class Keepsake:
    """What autograd holds of a tensor that it saved."""

    def __init__(self, tensor):
        self.tensor = tensor


def kept_tensors(hybrid, ids):
    """How many tensors autograd keeps after a forward, by where: in a layer, by its number, or in the "trm";
    and which layers' hidden states require a gradient."""
    where, kept, handles, requires_grad = [], [], [], {}

    def leave(*_):
        where.pop()

    def watch(module, name):
        handles.append(module.register_forward_pre_hook(lambda *_: where.append(name)))
        handles.append(module.register_forward_hook(leave))

    def keep(tensor):
        keepsake = Keepsake(tensor)
        kept.append((where[-1] if where else "outside", weakref.ref(keepsake)))
        return keepsake

    def before_layer(layer, args, kwargs, name):
        requires_grad[name] = (args[0] if args else kwargs["hidden_states"]).requires_grad

    for i, layer in enumerate(hybrid.llm_model.model.layers):
        look = functools.partial(before_layer, name=i)
        handles.append(layer.register_forward_pre_hook(look, with_kwargs=True))
        watch(layer, i)
        if hasattr(layer, "trm"):
            watch(layer.trm, "trm")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda keepsake: keepsake.tensor):
        loss = hybrid(ids, labels=ids).loss
    gc.collect()
    counts = Counter(name for name, keepsake in kept if keepsake() is not None)
    loss.backward()
    for handle in handles:
        handle.remove()
    return counts, requires_grad


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_graph_is_kept_below_the_first_injection(checkpointing):
    """A frozen base learns nothing there: no hidden state requires a gradient, no tensor is saved."""
    hybrid = tiny_hybrid(injection_layers=[2]).freeze_base().train()
    if checkpointing:
        hybrid.gradient_checkpointing_enable({"use_reentrant": False})
    counts, requires_grad = kept_tensors(hybrid, tokens())
    assert requires_grad == {0: False, 1: False, 2: True}
    assert counts[0] == counts[1] == 0, counts
    if not checkpointing:  # which keeps its own record
        assert counts["trm"] > 0 and counts[2] > 0, counts
    assert all(p.grad is None for _, p in hybrid.base_named_parameters())

    if not checkpointing:  # a test that could fail: this makes a graph of it
        hybrid.enable_input_require_grads()
        counts, requires_grad = kept_tensors(hybrid, tokens())
        assert all(requires_grad.values()) and counts[0] > 0 and counts[1] > 0


def test_reentrant_checkpoints_have_the_inputs_they_need():
    """They find gradients by their inputs only: without any, the TRM's parameters would get none."""
    gradients = []
    for is_reentrant in (False, True):
        hybrid = tiny_hybrid(injection_layers=[2]).freeze_base().train()
        hybrid.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
        hybrid(tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad for p in hybrid.trm_parameters()])
        hybrid.gradient_checkpointing_disable()
    assert any(g is not None for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


# Recursion as a knob


@torch.no_grad()
def test_the_number_of_steps_can_be_chosen_per_call():
    hybrid, ids = tiny_hybrid(), tokens()
    assert torch.equal(hybrid(ids, num_recursion_steps=2).logits, hybrid(ids).logits)
    assert torch.equal(
        hybrid(ids, num_recursion_steps=5).logits, tiny_hybrid(num_recursion_steps=5)(ids).logits
    )
    with pytest.raises(ValueError, match="num_recursion_steps to be a count of at least 1, got 0"):
        hybrid(ids, num_recursion_steps=0)


def test_uniform_sampling_draws_in_training_only_and_alike_everywhere():
    ranks = [tiny_hybrid(recursion_sampling="uniform", num_recursion_steps=6).train() for _ in range(2)]
    torch.manual_seed(1)  # a rank whose generators have gone another way
    drawn = [[recursion_steps(rank, None, None) for _ in range(200)] for rank in ranks]
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {1, 2, 3, 4, 5, 6}
    assert drawn[0][:6] != [ranks[0].draw_recursion_steps(i) for i in range(6, 12)]
    assert drawn[0][:6] == [ranks[0].draw_recursion_steps(i) for i in range(6)]
    ids = tokens()
    hybrid = tiny_hybrid(recursion_sampling="uniform", num_recursion_steps=6)
    fixed = tiny_hybrid(num_recursion_steps=6)
    assert torch.equal(hybrid(ids).logits, fixed(ids).logits), "no draw outside of training"
    other = tiny_hybrid(recursion_sampling="uniform", num_recursion_steps=6, recursion_seed=1)
    assert drawn[0][:20] != [other.draw_recursion_steps() for _ in range(20)]


def test_a_drawn_number_holds_under_checkpoint_recomputation():
    """With gradient checkpointing the backward replays the TRM: with another n the gradients would differ."""
    gradients = []
    for checkpointing in (False, True):
        hybrid = tiny_hybrid(recursion_sampling="uniform", num_recursion_steps=6).freeze_base().train()
        if checkpointing:
            hybrid.gradient_checkpointing_enable()
        for _ in range(4):
            hybrid(tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad for p in hybrid.trm_parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def checkpoints_of(model):
    name = "_gradient_checkpointing_func"
    return {of: getattr(module, name) for of, module in model.named_modules() if hasattr(module, name)}


def test_checkpoints_that_run_hooks_again_keep_the_call_and_are_wrapped_once(monkeypatch):
    # as in transformers 5.17, which checkpoints a layer's call
    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", torch.nn.Module.__call__, raising=False)
    base = tiny_base()
    base.gradient_checkpointing_enable()
    theirs = checkpoints_of(base)

    for _ in range(2):
        keep_call_in_checkpoints(base)

    assert theirs
    assert {name: wrapped.args[0] for name, wrapped in checkpoints_of(base).items()} == theirs


def test_a_chosen_backend_holds_under_checkpoint_recomputation(monkeypatch):
    """On a GPU autograd recomputes in a thread of its own, which chose nothing."""
    chosen, blend = [], injection_ops.injection_blend

    def spy(*given):
        chosen.append(current_backend())
        return blend(*given)

    monkeypatch.setattr(injection_ops, "injection_blend", spy)
    hybrid = tiny_hybrid().freeze_base().train()
    hybrid.gradient_checkpointing_enable({"use_reentrant": False})
    with backend("reference"):
        loss = hybrid(tokens(), labels=tokens()).loss
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert len(chosen) >= 2 * 3, "each injection ran once forward and again in backward"
    assert set(chosen) == {"reference"}


@torch.no_grad()
def test_a_cache_filled_with_another_number_is_refused():
    hybrid, ids = tiny_hybrid(), tokens()
    cache = hybrid(ids[:, :4], num_recursion_steps=3).past_key_values
    with pytest.raises(ValueError, match=r"\(36 TRM layers, n = 2\), got one filled with 48, n = 3\."):
        hybrid(ids[:, 4:5], **as_argument(cache))
    got = hybrid(ids[:, 4:], **as_argument(cache), num_recursion_steps=3).logits
    torch.testing.assert_close(got, hybrid(ids, num_recursion_steps=3).logits[:, 4:], rtol=1e-5, atol=1e-5)
    with hybrid.disable_injection():
        cache = hybrid(ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="got one filled with 0"):
        hybrid(ids[:, 4:5], **as_argument(cache))


# Bases that cannot be wrapped


def test_bases_that_are_refused():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    refused = (
        BertForMaskedLM(BertConfig(vocab_size=9, **sizes)),
        BertLMHeadModel(BertConfig(vocab_size=9, **sizes)),
        T5(T5Config(d_model=16, d_kv=8, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)),
        LlamaModel(tiny_base().config),  # without a head
    )
    for model in refused:
        name = type(model).__name__
        with pytest.raises(ValueError, match=f"expected a decoder-only causal language model .*got {name}"):
            HybridModel(llm_model=model, config=tiny_config(injection_layers=[1]))
    with pytest.raises(ValueError, match="to be a model of transformers, got Linear"):
        HybridModel(llm_model=torch.nn.Linear(1, 1), config=tiny_config())
    with pytest.raises(ValueError, match=r"got HybridConfig. By name: HybridModel\(llm_model="):
        HybridModel(tiny_base(), tiny_config())
    with pytest.raises(ValueError, match="expected config to be a HybridConfig, got dict"):
        HybridModel(llm_model=tiny_base(), config={"injection_layers": [1]})
    base = tiny_base()
    object.__setattr__(base.config, "hidden_size", None)
    with pytest.raises(ValueError, match="config to have hidden_size, got none in LlamaForCausalLM"):
        HybridModel(llm_model=base, config=tiny_config())
    with pytest.raises(ValueError, match=r"base without a TRM, got one that has .*unwrap\(\)"):
        HybridModel(llm_model=tiny_hybrid().llm_model, config=tiny_config())
    with pytest.raises(ValueError, match=r"injection_layers in 0\.\.3 for a base of 3 layers, got \[4\]"):
        HybridModel(llm_model=tiny_base(), config=tiny_config(injection_layers=[4]))
    with pytest.raises(ValueError, match="expected llm_model, or a config with base_config, got neither"):
        HybridModel(tiny_config())


def test_a_refused_base_is_left_as_it_was():
    base, ids = tiny_base(), tokens()
    want, names = base(ids).logits, list(base.state_dict())
    with pytest.raises(ValueError, match="injection_layers"):
        HybridModel(llm_model=base, config=tiny_config(injection_layers=[1, 7]))
    assert list(base.state_dict()) == names and torch.equal(base(ids).logits, want)


def test_an_injection_that_does_not_happen_is_an_error():
    hybrid = tiny_hybrid()
    hybrid.llm_model.model.layers[1]._forward_hooks.clear()
    with pytest.raises(RuntimeError, match="expected 3 injections in this forward, got 2"):
        hybrid(tokens())


def test_calls_that_do_not_fit():
    hybrid, ids = tiny_hybrid(), tokens()
    with pytest.raises(ValueError, match="input_ids or inputs_embeds, got both or neither"):
        hybrid()
    embeds = hybrid.get_input_embeddings()(ids)
    assert embeds.shape[-1] == WIDTH
    torch.testing.assert_close(hybrid(inputs_embeds=embeds).logits, hybrid(ids).logits)
    with pytest.raises(ValueError, match="got both or neither"):
        hybrid(ids, inputs_embeds=embeds)


def test_trms_lie_where_a_base_computes_whose_weights_are_brought_for_the_call():
    base, ids = tiny_base(), tokens()
    want = base(ids).logits
    accelerate.cpu_offload(base, torch.device("cpu"))
    assert {p.device.type for p in base.parameters()} == {"meta"}

    hybrid = HybridModel(llm_model=base, config=tiny_config())

    assert {p.device.type for p in hybrid.trm_parameters()} == {"cpu"}
    assert torch.equal(hybrid(ids).logits, want)


def test_made_from_a_config_alone():
    config = tiny_config()
    config.base_config = tiny_base().config
    assert isinstance(AutoModelForCausalLM.from_config(config), HybridModel)
