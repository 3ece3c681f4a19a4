"""The training guide's code, with only its import lines changed, on a tiny LLaMA."""

import torch

from hybrid import CombinedTRMLLM, HybridConfig, PresetConfigs
from tests.support.tiny import tiny_base, tokens


def test_both_phases_as_the_guide_writes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_base().save_pretrained("meta-llama/Llama-2-7b-hf")

    # from transformers import AutoModelForCausalLM, as the guide has it
    from transformers import AutoModelForCausalLM

    config = HybridConfig(
        injection_layers=[1, 3],       # Just 2 injection points
        trm_hidden_size=32,            # Modest TRM size
        trm_num_heads=4,               # Reasonable attention heads
        trm_num_layers=2,              # Shallow TRM stack
        num_recursion_steps=4,         # Basic recursion
    )  # fmt: skip

    # Load pre-trained model (NOT trained from scratch)
    base_model = AutoModelForCausalLM.from_pretrained(
        "meta-llama/Llama-2-7b-hf",
        torch_dtype=torch.float16,
        device_map="auto"
    )  # fmt: skip

    hybrid_model = CombinedTRMLLM(
        llm_model=base_model,
        config=config
    )  # fmt: skip

    # Only TRM components need training initially
    for name, param in hybrid_model.named_parameters():
        if 'trm' not in name.lower():  # fmt: skip
            param.requires_grad = False  # Freeze base model

    trainable = [p for p in hybrid_model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in hybrid_model.trm_parameters()}

    # Phase 1: Train only TRM injection (fast)
    optimizer = torch.optim.AdamW(
        [p for p in hybrid_model.parameters() if p.requires_grad],
        lr=1e-4
    )  # fmt: skip
    before = [p.detach().clone() for p in trainable]
    assert {p.dtype for _, p in hybrid_model.base_named_parameters()} == {torch.float16}
    losses = phase(hybrid_model, optimizer, steps=20)
    assert losses[-1] < losses[0], "the guide never switches injection on, and its code must train"
    assert all(not torch.equal(a, b) for a, b in zip(before, trainable, strict=True))

    # Phase 2: Fine-tune everything (optional)
    for param in hybrid_model.parameters():
        param.requires_grad = True

    optimizer = torch.optim.AdamW(
        hybrid_model.parameters(),
        lr=1e-5  # Lower learning rate
    )  # fmt: skip
    layer = hybrid_model.llm_model.model.layers[0].mlp.up_proj.weight
    kept = layer.detach().clone()
    phase(hybrid_model, optimizer, steps=1)
    assert not torch.equal(layer, kept)


def phase(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        loss = model(tokens(4), labels=tokens(4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_guides_presets():
    assert PresetConfigs.llama_2_70b_enterprise().injection_layers == [8, 16, 24, 32, 40, 48, 56, 64, 72]
    assert PresetConfigs.research_experimental().injection_layers == list(range(4, 81, 4))
    assert PresetConfigs.llama_2_7b_level1().num_recursion_steps == 4
    assert PresetConfigs.llama_2_13b_level2().trm_num_layers == 3
    assert PresetConfigs.tiny().recursion_sampling == "uniform"
