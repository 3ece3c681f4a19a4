"""The tools people train and serve with: peft, Trainer, gradient checkpointing, device_map."""

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LoraConfig,
    LoraModel,
    PeftModel,
    get_peft_model,
)
from peft.utils import register_peft_method
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hybrid import HybridModel
from tests.support.tiny import awaken, tiny_base, tiny_config, tiny_hybrid, tokens
from trm_kernels import TRM

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["trm", "trm_before"])


def test_lora_on_the_base_trains_together_with_the_trm(tmp_path):
    model = get_peft_model(tiny_hybrid(), LORA).train()
    trainable = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert {("lora" in n, "trm" in n) for n in trainable} == {(True, False), (False, True)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if name in trainable and not name.endswith(("y_init", "z_init")):  # behind a cycle without gradient
            assert not torch.equal(parameter, trainable[name]), name
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_hybrid(), tmp_path).eval()
    assert torch.equal(again(input_ids=tokens()).logits, model(input_ids=tokens()).logits)
    told = model.generate(input_ids=tokens(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    without = model.generate(
        input_ids=tokens(), max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False
    )
    assert torch.equal(told, without)


def test_lora_on_all_linear_layers_leaves_the_trm_alone():
    model = get_peft_model(tiny_hybrid(), LoraConfig(r=2, target_modules="all-linear"))
    names = [name for name, _ in model.named_parameters() if "lora" in name]
    assert names and not any("trm" in name for name in names)


def test_lora_inside_the_base_says_how_to_save(tmp_path):
    base = get_peft_model(tiny_base(), LoraConfig(r=2, target_modules=["q_proj"])).get_base_model()
    hybrid = awaken(HybridModel(llm_model=base, config=tiny_config()))
    with pytest.raises(ValueError, match="expected a base without adapters inside"):
        hybrid.save_pretrained(tmp_path / "a")
    hybrid.save_pretrained(tmp_path / "b", save_base=False)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        row = tokens(1, 9, seed=i)[0]
        return {"input_ids": row, "labels": row}


SHALLOW = {"num_cycles": 1, "trm_num_layers": 1, "injection_layers": [0, 2]}


def arguments_for(folder, steps):
    return TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        save_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("sampling", ["fixed", "uniform"])
def test_trainer_trains_and_resumes(sampling, phase, tmp_path, monkeypatch):
    tiny_base().save_pretrained(tmp_path / "base")
    missing = []
    warn = Trainer._issue_warnings_after_load
    monkeypatch.setattr(
        Trainer, "_issue_warnings_after_load", lambda self, keys: (missing.append(keys), warn(self, keys))
    )

    def run(folder, steps, resume=None):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        changes = {"recursion_sampling": sampling, "num_recursion_steps": 4} | SHALLOW
        hybrid = awaken(HybridModel(llm_model=base, config=tiny_config(**changes)))
        if phase == 1:
            hybrid.freeze_base()
        arguments = arguments_for(tmp_path / folder, steps)
        Trainer(hybrid, arguments, train_dataset=Rows()).train(resume_from_checkpoint=resume)
        return hybrid

    torch.manual_seed(0)  # of the blocks
    straight = run("straight", 6)
    torch.manual_seed(0)
    run("cut", 3)
    resumed = run("cut", 6, tmp_path / "cut" / "checkpoint-3")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut" / "checkpoint-6")
    for (name, a), b, c in zip(
        straight.named_parameters(), resumed.parameters(), again.parameters(), strict=True
    ):
        assert torch.equal(a, b) and torch.equal(a, c), name
    assert [(keys.missing_keys, keys.unexpected_keys) for keys in missing] == [([], [])]
    assert again.draw_recursion_steps() == resumed.draw_recursion_steps(0), "a new run counts from the start"


@pytest.mark.parametrize(
    "wrapper", ["PEFT", pytest.param("PEFT of a frozen TRM", marks=pytest.mark.slow), "a module"]
)
def test_trainer_resumes_counting_draws_inside_of_a_wrapper(wrapper, tmp_path):
    def run(folder, steps, resume=None, **changes):
        torch.manual_seed(0)
        hybrid = tiny_hybrid(recursion_sampling="uniform", num_recursion_steps=4, **SHALLOW)
        if wrapper.startswith("PEFT"):
            lora = LORA if wrapper == "PEFT" else LoraConfig(r=2, target_modules=["q_proj"])
            model = get_peft_model(hybrid, lora)
        else:
            model = Inside(hybrid)
        drawn = []
        draw = hybrid.draw_recursion_steps
        hybrid.draw_recursion_steps = lambda *args: drawn.append(draw(*args)) or drawn[-1]
        arguments = arguments_for(tmp_path / folder, steps)
        for name, value in changes.items():
            setattr(arguments, name, value)
        Trainer(model, arguments, train_dataset=Rows()).train(resume_from_checkpoint=resume)
        return drawn, [p.detach() for p in hybrid.parameters()]

    drawn, straight = run("straight", 6)
    before, _ = run("cut", 3)
    after, resumed = run("cut", 6, tmp_path / "cut" / "checkpoint-3")
    assert before + after == drawn and len(drawn) == 12
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    again, _ = run("cut", 6, tmp_path / "cut" / "checkpoint-3", restore_callback_states_from_checkpoint=True)
    assert again == after


class Inside(torch.nn.Module):
    """A model of the user's own around a hybrid."""

    def __init__(self, hybrid):
        super().__init__()
        self.hybrid = hybrid

    def forward(self, input_ids, labels):
        return self.hybrid(input_ids, labels=labels)


def test_a_trainer_of_another_model_keeps_no_draws(tmp_path):
    trainer = Trainer(tiny_base(), arguments_for(tmp_path, 3), train_dataset=Rows())
    trainer.train()
    assert not any("Draws" in name for name in trainer.state.stateful_callbacks)


def test_only_the_base_may_be_missing_from_a_file_of_the_trms():
    hybrid = tiny_hybrid()
    state = hybrid.state_dict()
    trms = {name: t for name, t in state.items() if "trm" in name}
    base = {name: t for name, t in state.items() if "trm" not in name}
    first, last = min(trms), "llm_model.lm_head.weight"

    def missing(given):
        return hybrid.load_state_dict(given, strict=False).missing_keys

    assert missing(trms) == missing(state) == []
    assert missing({k: t for k, t in trms.items() if k != first}) == [first]
    assert missing({k: t for k, t in state.items() if k != last}) == [last], "a whole model lacks a tensor"
    assert set(missing(base)) == set(trms)
    with pytest.raises(RuntimeError, match="Missing key"):
        hybrid.load_state_dict(trms)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients, replayed = [], []
    for checkpointing in (False, True):
        hybrid = tiny_hybrid(grad_cycles=None).freeze_base().train()
        if checkpointing:
            hybrid.gradient_checkpointing_enable()
            for module in hybrid.modules():
                if isinstance(module, TRM):
                    # before it: a replay stops where the last tensor that is needed was made again
                    module.register_forward_pre_hook(lambda *_: replayed.append(1))
        hybrid(tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad for p in hybrid.trm_parameters()])
    # transformers 5.17 also checkpoints the layer around it, so there it is replayed once more
    assert len(replayed) >= 2 * 3, "each TRM ran once forward and again in backward"
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("save", ["all", "layer", "step"])
def test_gradients_in_eval_mode_where_a_cache_is_filled(save):
    """What is computed again would append its keys to the cache again."""
    gradients = []
    for use_cache in (False, True):
        hybrid = tiny_hybrid(trm_save=save)
        hybrid(tokens(), labels=tokens(), use_cache=use_cache).loss.backward()
        gradients.append([p.grad for p in hybrid.trm_parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_base_that_came_with_gradient_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        base = tiny_base()
        if checkpointing:
            base.gradient_checkpointing_enable()
        hybrid = awaken(HybridModel(llm_model=base, config=tiny_config(injection_layers=[2]))).train()
        hybrid.load_state_dict(tiny_hybrid(injection_layers=[2]).state_dict())
        hybrid(tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad for p in hybrid.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


OFFLOADED = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "disk",
    "model.layers.2": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


def test_device_map_with_cpu_and_disk(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    want = awaken(HybridModel(llm_model=base, config=tiny_config()))
    want.save_pretrained(tmp_path / "hybrid")
    want.save_pretrained(tmp_path / "whole", save_base=True)
    logits = want(tokens()).logits

    offload = {"device_map": OFFLOADED, "offload_folder": tmp_path / "offload"}
    parted = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", **offload)
    assert parted.llm_model.model.layers[0].mlp.up_proj.weight.is_meta, "the base's layer is on disk"
    assert {p.device.type for p in parted.trm_parameters()} == {"cpu"}, "the TRM is where its layer computes"
    assert torch.equal(parted(tokens()).logits, logits)
    parted.freeze_base().train()(tokens(), labels=tokens()).loss.backward()
    assert sum(p.grad is not None for p in parted.trm_parameters()) > 0
    parted.eval().save_pretrained(tmp_path / "again")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(tokens()).logits, logits)

    for folder in ("hybrid", "whole"):
        placed = AutoModelForCausalLM.from_pretrained(
            tmp_path / folder,
            device_map="auto",
            max_memory={"cpu": 60_000},  # bytes: most of it must go to disk
            offload_folder=tmp_path / f"offload-{folder}",
        )
        assert any(p.is_meta for p in placed.parameters())
        assert torch.equal(placed(tokens()).logits, logits)


def test_peft_keeps_a_trm_for_each_adapter(tmp_path):
    """What stands in for a PEFT method of our own: TRMs as modules that are saved with an adapter."""
    lora = LoraConfig(r=1, target_modules=["q_proj"], modules_to_save=["trm", "trm_before"])
    model = get_peft_model(tiny_hybrid(awake=False), lora, adapter_name="one")
    model.add_adapter("two", lora)
    ids, base = tokens(), tiny_base()(tokens()).logits

    def logits(of, adapter):
        of.set_adapter(adapter)
        return of.eval()(input_ids=ids).logits

    with torch.no_grad():
        for size, adapter in enumerate(("one", "two"), 1):
            for name, parameter in model.named_parameters():
                if f"modules_to_save.{adapter}.out_proj" in name:
                    parameter.fill_(size / 100)
        want = {adapter: logits(model, adapter) for adapter in ("one", "two")}
        assert not torch.allclose(want["one"], want["two"])
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, base), (
                "its own TRM is fresh: the base, bit for bit"
            )
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny_hybrid(awake=False), tmp_path / "one", adapter_name="one")
        again.load_adapter(tmp_path / "two", adapter_name="two")
        for adapter, then in want.items():
            assert torch.equal(logits(again, adapter), then)


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_an_adapters_folder_gives_the_hybrid_and_the_adapter(task, tmp_path):
    tiny_hybrid().save_pretrained(tmp_path / "hybrid", save_base=True)
    lora = LoraConfig(task_type=task, target_modules=["q_proj"], modules_to_save=["trm", "trm_before"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid"), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save.default.out_proj" in name:
                parameter.fill_(0.01)
    model.eval().save_pretrained(tmp_path / "adapter")
    if task is None:
        with pytest.raises(ValueError, match="'hybrid.model.hybrid_model' which is not in the import allow"):
            AutoPeftModel.from_pretrained(tmp_path / "adapter")
        again = AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["hybrid"])
    else:
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(again(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_an_adapter_of_a_fresh_hybrid_says_how_to_load_it(tmp_path):
    """Its config names no folder. Wrapped with the same config, base and adapter are what was saved."""
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["trm", "trm_before"])
    model = get_peft_model(tiny_hybrid(seed=1), lora).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save.default" in name:
                parameter.add_(0.01)
    with pytest.warns(UserWarning, match="names no base, .* wrap the base with the same config"):
        model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_hybrid(seed=1, awake=False), tmp_path / "adapter")
    assert torch.equal(again(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


@pytest.mark.parametrize("loader", [HybridModel, AutoModelForCausalLM])
def test_an_adapter_of_a_loaded_hybrid_names_its_folder(loader, tmp_path, recwarn):
    """Saved with its base or without, and whoever loaded it: PEFT and TRL find the hybrid by that name."""
    tiny_base().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    HybridModel(llm_model=base, config=tiny_config()).save_pretrained(tmp_path / "hybrid")
    hybrid = loader.from_pretrained(tmp_path / "hybrid")
    assert hybrid.name_or_path == hybrid.config.name_or_path == str(tmp_path / "hybrid")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["trm"])
    model = get_peft_model(hybrid, lora)
    model.save_pretrained(tmp_path / "adapter")
    model.add_adapter("two", lora)
    model.save_pretrained(tmp_path / "adapter", selected_adapters=["default"])
    assert not [w for w in recwarn if "names no base" in str(w.message)]
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(again.get_base_model(), HybridModel)


def test_why_the_trm_is_no_peft_method():
    """When this fails PEFT has opened its list of methods: docs/training-tools.md says that it has not."""
    with pytest.raises(ValueError, match="Unknown PEFT type TRM, please add an entry"):
        register_peft_method(name="trm", config_cls=LoraConfig, model_cls=LoraModel)
