"""lora_rank: LoRA beside the TRM, trained, saved, loaded and switched off with it."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hybrid import HybridConfig, HybridModel
from hybrid.cli import main
from hybrid.model.quantized_base import is_quantized
from hybrid.training.lower_layers import LowerLayers
from hybrid.training.phases import enter
from tests.support import ranks, tiny_text
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
        hybrid.train()(ids, labels=ids).loss.backward()
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns_in_the_trms_dtype_and_comes_back_in_it(dtype, tmp_path):
    """AdamW's small steps are lost in a bfloat16 weight: on a base of bfloat16 it is kept in float32."""
    tiny_base().bfloat16().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = tokens()
    before = base(ids).logits
    hybrid = HybridModel(llm_model=base, config=tiny_config(lora_rank=2, trm_dtype=dtype)).freeze_base()
    assert {str(p.dtype) for p in hybrid.trm_parameters()} == {f"torch.{dtype}"}
    assert {p.dtype for _, p in hybrid.base_named_parameters()} == {torch.bfloat16}
    assert torch.equal(hybrid(ids).logits, before)
    optimizer = torch.optim.AdamW(hybrid.trm_parameters(), lr=1e-2)
    for _ in range(2):
        hybrid.train()(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    want = hybrid.eval()(ids).logits
    for whole in (None, True):
        hybrid.save_pretrained(tmp_path / "saved", save_base=whole)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        for (name, ours), theirs in zip(again.named_parameters(), hybrid.parameters(), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
        assert torch.equal(again(ids).logits, want)
    assert torch.equal(hybrid.unwrap()(ids).logits, before)


def command_for(folder, **changes):
    """A run of 4 steps with LoRA; its base and text are made."""
    base = tiny_text.save_base(folder / "base")
    (folder / "text.txt").write_text(tiny_text.TEXT)
    command = ["train", "--base", base, "--data", folder / "text.txt", "--steps", 4, "--save-every", 2]
    command += ["--sequence-length", 16, "--log-every", 1, "--learning-rate", 1e-2]
    for name, value in (tiny_text.FIELDS | {"lora_rank": 2} | changes).items():
        value = value if isinstance(value, list) else [value]
        command += [f"--{name.replace('_', '-')}", *value]
    return [str(word) for word in command]


@pytest.mark.parametrize("name, package", [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_on_a_base_in_few_bits(name, package, tmp_path):
    pytest.importorskip(package, reason=f"{package} is not installed")
    command = [*command_for(tmp_path, batch_size=2, quantize_base=name), "--output", str(tmp_path / "run")]
    assert main(command) == 0
    last = tmp_path / "run" / "checkpoint-000004"
    straight = AutoModelForCausalLM.from_pretrained(last)
    shutil.rmtree(last)
    assert main([*command, "--resume"]) == 0
    resumed = AutoModelForCausalLM.from_pretrained(last)
    assert is_quantized(resumed.llm_model)
    for (key, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        if "trm" in key:
            assert a.dtype == torch.float32 and torch.equal(a, b), key
        if "lora_B" in key:
            assert a.count_nonzero() > 0, key


def succeed(command):
    assert main(command) == 0


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_split_among_processes(dtype, tmp_path):
    """Two processes with --shard take the steps of one, and write what one writes."""
    found = {}
    for name, batch_size in (("one", 2), ("two", 1)):
        command = command_for(tmp_path, batch_size=batch_size, dtype=dtype)
        command += ["--output", str(tmp_path / name)]
        if name == "one":
            assert main(command) == 0
        else:
            done = ranks.run(partial(succeed, [*command, "--shard"]))
            assert done.returncode == 0, done.stderr[-3000:]
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines if "loss" in line]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name / "checkpoint-000004")
        found[name] = losses, {n: p for n, p in model.named_parameters() if "lora_" in n}
    # FSDP2 computes a unit's LoRA in the base's dtype; AdamW makes a whole step of a gradient near zero
    closeness = 1e-3 if dtype == "float32" else 0.1
    (losses, ours), (others, theirs) = found["one"], found["two"]
    assert losses == pytest.approx(others, rel=closeness / 10)
    assert ours.keys() == theirs.keys() and len(ours) > 0
    for key, p in ours.items():
        assert p.dtype == theirs[key].dtype == torch.float32 and p.count_nonzero() > 0, key
        assert (p - theirs[key]).norm() <= closeness * p.norm(), key


def test_from_the_command_line(tmp_path):
    command = [*command_for(tmp_path, batch_size=2), "--output"]
    base = tmp_path / "base"
    assert main([*command, str(tmp_path / "straight")]) == 0
    shutil.copytree(tmp_path / "straight", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-000004")
    assert main([*command, str(tmp_path / "cut"), "--resume"]) == 0
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
