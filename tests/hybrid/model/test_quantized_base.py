"""A TRM trains on a base of 8 or 4 bits, by the packages themselves; its files refer to that base."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from hybrid import HybridConfig, HybridModel
from hybrid.cli import main
from hybrid.model.quantized_base import is_quantized
from hybrid.saving.loading import load_model
from hybrid.training.loop import train
from hybrid.training.phases import enter
from hybrid.training.settings import TrainSettings
from tests.hybrid.cli.test_cli import refused, train_command
from tests.support.tiny_text import CHARACTERS, FIELDS, TEXT, Counting, character_tokenizer

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes", "LLM.int8()": "bitsandbytes"}
# of bfloat16: 1 byte a weight and 5 a row (scale, zero point) for 2; 1/2 a weight and 1/64 for its scale
SHARE = {"int8": (64 + 5) / 128, "nf4": (1 / 2 + 1 / 64) / 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a base whose linear layers have whole blocks of 64 weights, in bfloat16."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    others = {"bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.2}
    config = LlamaConfig(**sizes, **others, vocab_size=len(CHARACTERS))
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    (folder / "new.txt").write_text(TEXT)
    (folder / "known.txt").write_text(TEXT[:400])
    return folder


def loaded(folder, name):
    pytest.importorskip(PACKAGES[name], reason=f"{PACKAGES[name]} is not installed")
    if name in SHARE:
        return load_model(str(folder), quantize_base=name)
    how = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16)


def wrapped(base, seed=1):
    torch.manual_seed(seed)
    model = HybridModel(llm_model=base, config=HybridConfig(**FIELDS))
    enter(model, 1)
    return model


def nbytes(model):
    """Of all storages in the linear layers of `model`, whatever holds them."""
    found = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.out_features != len(CHARACTERS):
            weight = module.weight
            if hasattr(weight, "qdata"):
                parts = [weight.qdata, weight.scale, weight.zero_point]
            elif (state := getattr(weight, "quant_state", None)) is not None:
                parts = [weight.data, state.absmax, state.state2.absmax]
            else:
                parts = [weight]
            found |= {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in parts}
    return sum(found.values())


@pytest.mark.parametrize("name", PACKAGES)
def test_a_trm_trains_on_it_and_comes_back_with_it(name, folder, tmp_path):
    base = loaded(folder, name)
    plain = load_model(str(folder))
    assert is_quantized(base) and not is_quantized(plain)
    if name in SHARE:
        assert nbytes(base) / nbytes(plain) == pytest.approx(SHARE[name], rel=0.02)
    ids = torch.stack([Counting()[i]["input_ids"] for i in range(2)])
    model = wrapped(base)
    with torch.no_grad():
        before = base(ids).logits
    settings = TrainSettings(tmp_path / "run", steps=20, batch_size=4, learning_rate=1e-2, save_every=10)
    result = train(model, Counting(), settings, {"new": Counting(5)})
    assert result.held_out_after["new"] < result.held_out_before["new"] - 0.1
    with torch.no_grad(), model.eval().disable_injection():
        assert torch.equal(model(ids).logits, before), "the base is as it was"

    files = {path.name: path.stat().st_size for path in result.checkpoint.iterdir()}
    assert files["model.safetensors"] < 4 * sum(p.numel() for p in model.trm_parameters()) + 4000, "TRM only"
    assert "quantization_config" not in json.loads((result.checkpoint / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(result.checkpoint)
    assert is_quantized(again.llm_model), "as it was trained on"
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(again.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))


def dequantized(weight):
    if hasattr(weight, "dequantize") and hasattr(weight, "qdata"):
        return weight.dequantize()
    if (state := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state)
    return None


@pytest.mark.parametrize("name", PACKAGES)
def test_gradients_pass_through_it(name, folder):
    """As through the same weights in bfloat16; also where it was evaluated before, wrapped or not."""
    ids = torch.stack([Counting()[i]["input_ids"] for i in range(2)])
    base, plain = loaded(folder, name), load_model(str(folder))
    with torch.no_grad():
        for ours, theirs in zip(base.parameters(), plain.parameters(), strict=True):
            if (values := dequantized(ours)) is not None:
                theirs.copy_(values)
        base(ids)
    gradients = []
    for model in (wrapped(base), wrapped(plain)):
        with torch.no_grad():
            model.eval()(ids)
        model.train()(ids, labels=ids, num_recursion_steps=2).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.trm_parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[1].norm()


@pytest.mark.parametrize("name", PACKAGES)
def test_it_cannot_learn_nor_be_written(name, folder, tmp_path):
    model = wrapped(loaded(folder, name))
    with pytest.raises(ValueError, match="base in float32 or bfloat16 for phase 2, .* got a quantized one"):
        enter(model, 2)
    with pytest.raises(ValueError, match="expected a base that can be had again .* save_base=False"):
        model.save_pretrained(tmp_path, save_base=True)
    assert len(model._base_sums) == len(list(model.base_named_parameters())), "all of it is remembered"
    model.save_pretrained(tmp_path / "trm")
    weight = model.llm_model.model.layers[1].mlp.up_proj.weight
    (weight.qdata if hasattr(weight, "qdata") else weight.data).flatten()[:64] ^= 1
    with pytest.raises(ValueError, match="expected a base that can be had again"):
        model.save_pretrained(tmp_path / "changed")


def test_the_command(folder, tmp_path, capsys):
    pytest.importorskip("torchao", reason="torchao is not installed")
    command = train_command(folder, folder, tmp_path / "run", "--quantize-base", "int8")
    assert main([*command, "--gradient-checkpointing", "--save-every", "3"]) == 0
    assert main([*command, "--gradient-checkpointing", "--resume"]) == 0
    capsys.readouterr()
    error = refused(capsys, *train_command(folder, folder, tmp_path / "run"), "--resume")
    assert "expected quantized {" in error and "got None" in error
    assert main(["generate", "--model", str(tmp_path / "run"), "--prompt", "1 and"]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("int8", "--phase", "2"), "expected phase 1 with --quantize-base, .* got 2"),
        (("nf4", "--shard"), "expected --quantize-base or --shard, got both"),
    ],
)
def test_what_cannot_be_combined(words, says, folder, tmp_path, capsys):
    command = train_command(folder, folder, tmp_path, "--quantize-base", *words)
    assert re.search(says, refused(capsys, *command))


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_without_its_package_the_error_says_how_to_install_it(name, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hybrid.extras.find_spec", lambda package: None)
    error = refused(capsys, *train_command(folder, folder, tmp_path, "--quantize-base", name))
    assert f"pip install 'trm-hybrid[{PACKAGES[name]}]'" in error
