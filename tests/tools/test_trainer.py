"""Trainer: the loss of a fresh hybrid is its base's, however it counts, smooths, accumulates or averages."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from hybrid import HybridModel
from tests.support.tiny import awaken, tiny_base, tiny_config, tokens


class Rows(torch.utils.data.Dataset):
    """Rows of 12 tokens, of some of which the first ones are not counted."""

    def __init__(self, number=16):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, i):
        row = tokens(1, 12, seed=i)[0]
        labels = row.clone()
        labels[: i % 4] = -100
        return {"input_ids": row, "labels": labels}


def losses(model, folder, compute_loss_func=None, **changes):
    """Those that two steps log; with evaluation, that too."""
    arguments = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.0,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "disable_tqdm": True,
        "average_tokens_across_devices": True,
    }
    arguments = TrainingArguments(folder, **(arguments | changes))
    given = {"train_dataset": Rows(), "eval_dataset": Rows(4), "compute_loss_func": compute_loss_func}
    trainer = Trainer(model, arguments, **given)
    trainer.train()
    logs = [{k: v for k, v in log.items() if k in ("loss", "eval_loss")} for log in trainer.state.log_history]
    return [log for log in logs if log]


# GPT-2's class does not tell Trainer that it shifts labels, falcon's and bloom's layers answer with tuples
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_the_loss_of_a_fresh_hybrid_is_its_bases(family, tmp_path):
    base, fresh = tiny_base(family), HybridModel(llm_model=tiny_base(family), config=tiny_config())
    assert fresh.freeze_base().loss_type == base.loss_type
    for changes in ({}, {"label_smoothing_factor": 0.1}, {"average_tokens_across_devices": False}):
        want, got = (losses(model, tmp_path, **changes) for model in (base, fresh))
        assert want == got, changes


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_under_peft_as_well(smoothing, tmp_path):
    class Mine(HybridModel):
        """What a user makes of it."""

    lora = LoraConfig(r=2, target_modules=["q_proj"])
    wrapped = [
        tiny_base(),
        HybridModel(llm_model=tiny_base(), config=tiny_config()),
        Mine(llm_model=tiny_base(), config=tiny_config()),
    ]
    want, *got = (
        losses(get_peft_model(model, lora), tmp_path, label_smoothing_factor=smoothing) for model in wrapped
    )
    assert got == [want, want]


def test_a_causal_model_by_its_name_under_every_name():
    class Mine(HybridModel):
        pass

    # as torch's fully_shard names what it shards
    sharded = type("FSDPMine", (FSDPModule, Mine), {})
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert {"HybridModel", "Mine", sharded.__name__} <= set(known)
    # what walks through the models of transformers still can
    assert any(config.__name__ == "LlamaConfig" for config in MODEL_FOR_CAUSAL_LM_MAPPING)


def test_a_base_that_does_not_take_the_number_of_labels(tmp_path):
    def base():
        model = tiny_base()
        model.accepts_loss_kwargs = False
        return model

    fresh = HybridModel(llm_model=base(), config=tiny_config()).freeze_base()
    assert losses(base(), tmp_path) == losses(fresh, tmp_path)


def deep_hybrid():
    config = tiny_config(injection_layers=[2], num_cycles=3, grad_cycles=None, deep_supervision=True)
    return awaken(HybridModel(llm_model=tiny_base(), config=config)).freeze_base()


def of_last_answer(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize(
    "kept",
    [{"label_smoothing_factor": 0.1}, {"compute_loss_func": of_last_answer}],
    ids=lambda d: next(iter(d)),
)
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_deep_supervision_is_not_dropped_where_trainer_keeps_the_labels(kept, is_wrapped, tmp_path):
    hybrid = deep_hybrid()
    before = [p.detach().clone() for p in hybrid.parameters()]
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["trm"])
    model = get_peft_model(hybrid, lora) if is_wrapped else hybrid
    with pytest.raises(ValueError, match="label smoothing and loss functions keep the labels from the model"):
        losses(model, tmp_path, **kept)
    assert all(torch.equal(p, q) for p, q in zip(before, deep_hybrid().parameters(), strict=True))


def test_deep_supervision_counts_under_trainer(tmp_path):
    """The loss that is logged is the mean over the cycles, evaluation is of the last answer."""
    deep = losses(deep_hybrid(), tmp_path)
    hybrid = deep_hybrid()
    hybrid.config.deep_supervision = False
    last = losses(hybrid, tmp_path)
    assert [log["eval_loss"] for log in deep[2:]] == [log["eval_loss"] for log in last[2:]]
    of_cycles = []
    for cycles in (1, 2, 3):
        hybrid.config.update({"num_cycles": cycles, "grad_cycles": cycles})
        of_cycles.append(losses(hybrid, tmp_path)[0]["loss"])
    assert deep[0]["loss"] == pytest.approx(sum(of_cycles) / 3, rel=1e-6)
    assert abs(deep[0]["loss"] - last[0]["loss"]) > 1e-3


@pytest.mark.slow
def test_two_processes_average_as_with_the_base(tmp_path):
    """What is logged under torchrun, by gloo, of a fresh hybrid and of its base."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "import torch\n"
        "from hybrid import HybridModel\n"
        "from tests.tools.test_trainer import losses\n"
        "from tests.support.tiny import tiny_base, tiny_config\n"
        "fresh = HybridModel(llm_model=tiny_base(), config=tiny_config()).freeze_base()\n"
        "for smoothing in (0.0, 0.1):\n"
        "    got = [losses(m, sys.argv[1], label_smoothing_factor=smoothing) for m in (tiny_base(), fresh)]\n"
        "    assert got[0] == got[1], got\n"
        "torch.distributed.destroy_process_group()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, script, tmp_path / "out"], capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr[-2000:]
