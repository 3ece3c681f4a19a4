"""lora_rank: LoRA beside the TRM, trained, saved, loaded and switched off with it."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hybrid import HybridConfig, HybridModel
from hybrid.cli import main
from hybrid.training.lower_layers import LowerLayers
from hybrid.training.phases import enter
from tests.support import tiny_text
from tests.support.tiny import tiny_base, tiny_config, tokens


def hybrid_of(folder, family="llama", **changes):
    tiny_base(family).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    return HybridModel(llm_model=base, config=tiny_config(lora_rank=2, **changes))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_it_starts_as_the_base_learns_is_saved_and_switched_off(family, tmp_path):
    hybrid, ids = hybrid_of(tmp_path, family).freeze_base(), tokens()
    base = tiny_base(family)(ids).logits
    assert torch.equal(hybrid(ids).logits, base)
    learning = {name for name, p in hybrid.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in hybrid.named_parameters() if "trm" in name}
    assert {"lora_A" in name for name in learning} == {True, False}
    optimizer = torch.optim.AdamW(hybrid.trm_parameters(), lr=1e-2)
    before = {name: p.detach().clone() for name, p in hybrid.named_parameters()}
    for _ in range(3):
        hybrid.training.loop()(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in hybrid.named_parameters():
        if ".lora_" in name or name.endswith("out_proj.weight"):
            assert not torch.equal(p, before[name]), name
        elif "trm" not in name:
            assert torch.equal(p, before[name]), name
    want = hybrid.eval()(ids).logits
    with hybrid.disable_injection():
        assert torch.equal(hybrid(ids).logits, base)
    assert torch.equal(hybrid(ids).logits, want)
    assert {name for name, p in hybrid.named_parameters() if p.requires_grad} == learning

    for whole in (False, True):
        hybrid.save_pretrained(tmp_path / "saved", save_base=whole or None)
        with safe_open(tmp_path / "saved/model.safetensors", "pt") as file:
            assert whole or set(file.keys()) == learning
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert again.config.lora_rank == 2
        assert torch.equal(again(ids).logits, want)


def test_what_it_cannot_be_together_with(tmp_path):
    with pytest.raises(ValueError, match="expected lora_rank to be a count of at least 1, got 0"):
        HybridConfig(lora_rank=0)
    with pytest.raises(ValueError, match="LowerLayers: expected no LoRA"):
        LowerLayers(hybrid_of(tmp_path, injection_layers=[2]).freeze_base())
    for phase in (1, 2):
        hybrid = hybrid_of(tmp_path)
        enter(hybrid, phase)
        assert not any(p.requires_grad for _, p in hybrid.base_named_parameters()), (
            "LoRA in place of the base"
        )


def test_from_the_command_line(tmp_path):
    base = tiny_text.save_base(tmp_path / "base")
    (tmp_path / "text.txt").write_text(tiny_text.TEXT)
    fields = []
    for name, value in (tiny_text.FIELDS | {"lora_rank": 2}).items():
        value = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        fields += [f"--{name.replace('_', '-')}", value]

    command = ["train", "--base", base, "--data", tmp_path / "text.txt", "--steps", 4, "--save-every", 2]
    command += ["--sequence-length", 16, "--batch-size", 2, *fields, "--output"]
    assert main([str(word) for word in (*command, tmp_path / "straight")]) == 0
    shutil.copytree(tmp_path / "straight", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-000004")
    assert main([str(word) for word in (*command, tmp_path / "cut", "--resume")]) == 0
    straight, resumed = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "checkpoint-000004")
        for name in ("straight", "cut")
    )
    config = json.loads((tmp_path / "cut/checkpoint-000004/config.json").read_text())
    assert config["lora_rank"] == 2 and config["base_model_name_or_path"] == str(base)
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
        if "lora_B" in name:
            assert a.count_nonzero() > 0
