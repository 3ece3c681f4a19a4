"""TRL's trainers: they make the logits themselves, and what they make them of has come through the TRM."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, TrainerCallback

from hybrid import HybridModel
from tests.support import tiny, tiny_text

trl = pytest.importorskip("trl")

TEXTS = Dataset.from_dict({"text": [f"{i} and one is {i + 1}.\n" * (1 + i % 3) for i in range(16)]})
PAIRS = Dataset.from_dict(
    {
        "prompt": [f"{i} and one is" for i in range(16)],
        "chosen": [f" {i + 1}." for i in range(16)],
        "rejected": [" not known" for _ in range(16)],
    }
)
PROMPTS = Dataset.from_dict({"prompt": [f"{i} and one" for i in range(16)]})
STEPS = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "max_grad_norm": 0.0,  # gradients are compared as they come
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def hybrid_of(folder, **changes) -> HybridModel:
    """Of a base that has a folder, and awake; n is not drawn, so that a plain loop takes the same."""
    base = AutoModelForCausalLM.from_pretrained(tiny_text.save_base(folder / "base"))
    changes = {"recursion_sampling": "fixed", "injection_layers": [0, 1, 2]} | changes
    return tiny.awaken(tiny_text.tiny_hybrid(base, **changes)).freeze_base()


class Steps(TrainerCallback):
    """Of each step: the TRM's values, what compute_loss was given, and the gradients it left."""

    def __init__(self):
        self.values, self.inputs, self.gradients = [], [], []

    def watch(self, trainer):
        trainer.add_callback(self)
        compute = trainer.compute_loss

        def recorded(model, inputs, *args, **kwargs):
            trm = trainer.accelerator.unwrap_model(model).trm_parameters()
            self.values.append([p.detach().clone() for p in trm])
            self.inputs.append({k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()})
            return compute(model, inputs, *args, **kwargs)

        trainer.compute_loss = recorded
        trainer.train()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append([p.grad.clone() for p in model.trm_parameters()])


def log_probs(model, ids, mask):
    """[B, T - 1] of the tokens 1 to T."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


def assert_gradients_of_a_plain_loop(steps, twin, loss_of):
    """Each step's gradients are those of `loss_of(twin, inputs)` at that step's values."""
    assert len(steps.gradients) == len(steps.inputs) == 2
    twin.train()
    for values, inputs, got in zip(steps.values, steps.inputs, steps.gradients, strict=True):
        with torch.no_grad():
            for parameter, value in zip(twin.trm_parameters(), values, strict=True):
                parameter.copy_(value)
        twin.zero_grad()
        loss_of(twin, inputs).backward()
        for parameter, gradient in zip(twin.trm_parameters(), got, strict=True):
            assert gradient.abs().max() > 0
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=1e-6)


def nll(model, inputs, smoothing=0.0, dft=False):
    ids, labels = inputs["input_ids"], inputs["labels"][:, 1:]
    if smoothing:
        logits = model(input_ids=ids, attention_mask=inputs["attention_mask"], use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), labels, label_smoothing=smoothing)
    of_token = log_probs(model, ids, inputs["attention_mask"]) * (labels != -100)
    if dft:
        of_token = of_token * of_token.exp().detach()
    return -of_token.sum() / (labels != -100).sum()


@pytest.mark.parametrize("loss", ["nll", "dft", "smoothed"])
def test_sft(loss, tmp_path):
    hybrid, steps = hybrid_of(tmp_path), Steps()
    twin = copy.deepcopy(hybrid)
    chosen = {"label_smoothing_factor": 0.1} if loss == "smoothed" else {"loss_type": loss}
    steps.watch(
        trl.SFTTrainer(
            hybrid,
            trl.SFTConfig(tmp_path / "out", max_length=32, **chosen, **STEPS),
            train_dataset=TEXTS,
            processing_class=tiny_text.character_tokenizer(),
        )
    )
    smoothing = chosen.get("label_smoothing_factor", 0.0)
    assert_gradients_of_a_plain_loop(steps, twin, lambda m, i: nll(m, i, smoothing, loss == "dft"))


def dpo(model, inputs, reference):
    def of_sequences(of):
        of_token = log_probs(of, inputs["input_ids"], inputs["attention_mask"])
        chosen, rejected = (of_token * inputs["completion_mask"][:, 1:]).sum(1).chunk(2)
        return chosen - rejected

    with torch.no_grad():
        before = of_sequences(reference)
    return -F.logsigmoid(0.1 * (of_sequences(model) - before)).mean()


@pytest.mark.parametrize("kind", ["fresh wrap", "reloaded", "whole"])
def test_dpo(kind, tmp_path):
    hybrid, steps = hybrid_of(tmp_path), Steps()
    reference = hybrid.llm_model  # what a fresh hybrid is
    if kind != "fresh wrap":
        hybrid.save_pretrained(tmp_path / "hybrid", save_base=kind == "whole")
        hybrid = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid").freeze_base()
        reference = copy.deepcopy(hybrid)
    twin, reference = copy.deepcopy(hybrid), copy.deepcopy(reference)
    trainer = trl.DPOTrainer(
        hybrid,
        args=trl.DPOConfig(tmp_path / "out", beta=0.1, **STEPS),
        train_dataset=PAIRS,
        processing_class=tiny_text.character_tokenizer(),
    )
    assert isinstance(trainer.ref_model, HybridModel) == (kind != "fresh wrap")
    steps.watch(trainer)
    assert_gradients_of_a_plain_loop(steps, twin, lambda m, i: dpo(m, i, reference))


def grpo(model, inputs, reference=None, beta=0.0):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    completion, length = inputs["completion_mask"], inputs["completion_ids"].shape[1]
    of_token = log_probs(model, ids, mask)[:, -length:]
    ratio = (of_token - of_token.detach()).exp()
    loss = -ratio * inputs["advantages"][:, None]
    if reference is not None:
        with torch.no_grad():
            difference = log_probs(reference, ids, mask)[:, -length:]
        difference = difference - of_token
        loss = loss + beta * ratio * (difference.exp() - difference - 1)
    return (loss * completion).sum() / inputs["num_items_in_batch"]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo(beta, tmp_path):
    hybrid_of(tmp_path).save_pretrained(tmp_path / "hybrid")
    hybrid, steps = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid").freeze_base(), Steps()
    twin, reference = copy.deepcopy(hybrid), copy.deepcopy(hybrid)
    tokenizer = tiny_text.character_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trl.GRPOTrainer(
        hybrid,
        reward_funcs=lambda completions, **_: [float(sum(map(ord, c)) % 7) for c in completions],
        args=trl.GRPOConfig(
            tmp_path / "out",
            num_generations=4,
            max_completion_length=8,
            beta=beta,
            use_bias_correction_kl=True,
            **STEPS,
        ),
        train_dataset=PROMPTS,
        processing_class=tokenizer,
    )
    steps.watch(trainer)
    assert_gradients_of_a_plain_loop(steps, twin, lambda m, i: grpo(m, i, reference if beta else None, beta))


def test_sft_of_lora_beside_the_trm(tmp_path):
    hybrid = hybrid_of(tmp_path)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["trm", "trm_before"])
    trainer = trl.SFTTrainer(
        hybrid,
        trl.SFTConfig(tmp_path / "out", max_length=32, **STEPS),
        train_dataset=TEXTS,
        processing_class=tiny_text.character_tokenizer(),
        peft_config=lora,
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    behind_no_gradient = ("y_init", "z_init")  # are never reached in the first of the cycles
    for name, parameter in trainer.model.named_parameters():
        if name in before and not name.endswith(behind_no_gradient) and "lora_A" not in name:
            assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("kind", ["nll", "dft", "smoothed", "dpo", "grpo"])
def test_deep_supervision_is_refused_where_the_trainer_makes_the_loss(kind, tmp_path):
    deep = hybrid_of(tmp_path, num_cycles=2, grad_cycles=None, deep_supervision=True)
    tokenizer = tiny_text.character_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    given = {"processing_class": tokenizer}
    if kind == "dpo":
        trainer = trl.DPOTrainer(
            deep, args=trl.DPOConfig(tmp_path / "out", **STEPS), train_dataset=PAIRS, **given
        )
    elif kind == "grpo":
        config = trl.GRPOConfig(tmp_path / "out", num_generations=4, max_completion_length=4, **STEPS)
        given["reward_funcs"] = lambda completions, **_: [float(len(c)) for c in completions]
        trainer = trl.GRPOTrainer(deep, args=config, train_dataset=PROMPTS, **given)
    else:
        chosen = {"label_smoothing_factor": 0.1} if kind == "smoothed" else {"loss_type": kind}
        config = trl.SFTConfig(tmp_path / "out", max_length=32, **chosen, **STEPS)
        trainer = trl.SFTTrainer(deep, config, train_dataset=TEXTS, **given)
    with pytest.raises(ValueError, match="deep_supervision expected the loss to be the model's own"):
        trainer.train()


MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
CHATS = Dataset.from_dict(
    {
        "messages": [
            [{"role": "user", "content": f"{i} and one"}, {"role": "assistant", "content": f"is {i + 1}."}]
            for i in range(16)
        ]
    }
)
COMPLETIONS = PAIRS.rename_column("chosen", "completion").remove_columns("rejected")
WAYS = {
    "completion only": (COMPLETIONS, {"completion_only_loss": True}),
    "prompt too": (COMPLETIONS, {"completion_only_loss": False}),
    "assistant only": (CHATS, {"assistant_only_loss": True}),
    "packed": (TEXTS, {"packing": True}),
    "packed, wrapped": (TEXTS, {"packing": True, "packing_strategy": "wrapped"}),
}


def first_step(trainer):
    """(inputs, loss) of the first step."""
    seen, compute = [], trainer.compute_loss

    def recorded(model, inputs, *args, **kwargs):
        loss = compute(model, inputs, *args, **kwargs)
        seen.append((inputs, (loss[0] if isinstance(loss, tuple) else loss).item()))
        return loss

    trainer.compute_loss = recorded
    trainer.train()
    return seen[0]


def fresh_and_base(folder):
    base = AutoModelForCausalLM.from_pretrained(tiny_text.save_base(folder / "base"))
    return tiny_text.tiny_hybrid(copy.deepcopy(base), injection_layers=[0, 1, 2]).freeze_base(), base


@pytest.mark.parametrize("way", WAYS)
def test_sft_of_a_fresh_hybrid_begins_with_its_bases_loss(way, tmp_path):
    rows, chosen = WAYS[way]
    tokenizer = tiny_text.character_tokenizer()
    tokenizer.chat_template = MARKED
    losses = []
    for number, model in enumerate(fresh_and_base(tmp_path)):
        arguments = STEPS | {"max_steps": 1, "max_length": 48} | chosen
        config = trl.SFTConfig(tmp_path / f"out{number}", **arguments)
        inputs, loss = first_step(
            trl.SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
        )
        losses.append(loss)
    assert losses[0] == losses[1]
    learns = "".join(tiny_text.CHARACTERS[i] for i in inputs["labels"][0] if i != -100)
    assert ("and one" in learns) == (way not in ("completion only", "assistant only"))
    if way == "packed":
        assert inputs["position_ids"].diff().ne(1).any(), "several documents in a row"


def test_dpo_of_a_fresh_hybrid_has_its_bases_precomputed_reference(tmp_path):
    found = []
    for number, model in enumerate(fresh_and_base(tmp_path)):
        arguments = STEPS | {"max_steps": 1, "precompute_ref_log_probs": True}
        trainer = trl.DPOTrainer(
            model,
            args=trl.DPOConfig(tmp_path / f"out{number}", **arguments),
            train_dataset=PAIRS,
            processing_class=tiny_text.character_tokenizer(),
        )
        _, loss = first_step(trainer)
        rows = trainer.train_dataset
        found.append((loss, list(rows["ref_chosen_logps"]), list(rows["ref_rejected_logps"])))
    assert found[0] == found[1]
    assert len(set(found[0][1])) > 1


def test_a_peft_config_that_leaves_the_trm_out_says_so(tmp_path):
    hybrid, _ = fresh_and_base(tmp_path)
    trainer = trl.SFTTrainer(
        hybrid,
        trl.SFTConfig(tmp_path / "out", max_length=32, **STEPS),
        train_dataset=TEXTS,
        processing_class=tiny_text.character_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    with pytest.warns(UserWarning, match="learns nothing in this training"):
        trainer.train()
