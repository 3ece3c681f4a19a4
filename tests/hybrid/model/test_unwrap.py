"""unwrap() gives the language model back as it came, and a second config can be tried on it."""

import pytest
import torch

from hybrid import HybridModel
from hybrid.model.lora import ADAPTER
from tests.support.tiny import awaken, tiny_base, tiny_config, tokens

CONFIGS = {
    "llama": {},
    "gpt2": {},
    "qwen3": {"lora_rank": 2},
    "falcon": {"deep_supervision": True, "grad_cycles": None, "injection_layers": [0, 2]},
}


def all_hooks(model) -> list:
    return [
        hook
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        for hook in hooks.values()
    ]


@pytest.mark.parametrize("family", CONFIGS)
def test_it_is_as_it_came(family):
    base = tiny_base(family).requires_grad_(False)
    next(base.parameters()).requires_grad_()
    base.register_forward_hook(lambda *_: None)
    came = {
        "config": base.config.to_dict(),
        "names": [name for name, _ in base.named_modules()],
        "tensors": {name: t.clone() for name, t in base.state_dict().items()},
        "learns": [p.requires_grad for p in base.parameters()],
        "hooks": all_hooks(base),
    }
    logits, text = base(tokens()).logits, base.generate(tokens(), max_new_tokens=3)

    hybrid = awaken(HybridModel(llm_model=base, config=tiny_config(**CONFIGS[family]))).train()
    hybrid.freeze_base().gradient_checkpointing_enable()
    hybrid.config.update({"pad_token_id": 5, "use_cache": False})
    hybrid.loss_function = lambda *_, **__: torch.zeros(())
    hybrid(tokens(), labels=tokens())
    assert not torch.equal(hybrid.eval()(tokens()).logits, logits)
    hybrid.train()

    given = hybrid.unwrap()
    assert given is base and not base.training
    assert base.config.to_dict() == came["config"]
    assert [name for name, _ in base.named_modules()] == came["names"]
    assert [p.requires_grad for p in base.parameters()] == came["learns"]
    assert all_hooks(base) == came["hooks"]
    state = base.state_dict()
    assert list(state) == list(came["tensors"])
    assert all(torch.equal(state[name], t) for name, t in came["tensors"].items())
    assert torch.equal(base(tokens()).logits, logits)
    assert torch.equal(base.generate(tokens(), max_new_tokens=3), text)
    assert base(tokens(), labels=tokens()).loss > 0

    second = HybridModel(llm_model=base, config=tiny_config(trm_hidden_size=48, injection_layers=[1]))
    assert torch.equal(second(tokens()).logits, logits)
    assert not torch.equal(awaken(second)(tokens()).logits, logits)


def test_merged_adapters_are_taken_out_again():
    base, ids = tiny_base(), tokens()
    logits = base(ids).logits
    hybrid = HybridModel(llm_model=base, config=tiny_config(lora_rank=2))
    for module in base.modules():
        if hasattr(module, "lora_B"):
            torch.nn.init.normal_(module.lora_B[ADAPTER].weight)
            module.merge()
    assert not torch.allclose(hybrid(ids).logits, logits, atol=1e-3), "a test that could not fail"
    torch.testing.assert_close(hybrid.unwrap()(ids).logits, logits)


@pytest.mark.parametrize(
    "use",
    [
        lambda hybrid, folder: hybrid(tokens()),
        lambda hybrid, folder: hybrid.generate(tokens()),
        lambda hybrid, folder: hybrid.save_pretrained(folder / "hybrid"),
        lambda hybrid, folder: list(hybrid.parameters()),
        lambda hybrid, folder: hybrid.freeze_base(),
        lambda hybrid, folder: hybrid.unwrap(),
    ],
)
def test_the_hybrid_says_that_it_gave_it_back(use, tmp_path):
    hybrid = HybridModel(llm_model=tiny_base(), config=tiny_config())
    hybrid.unwrap()
    with pytest.raises(ValueError, match="got one that was unwrapped"):
        use(hybrid, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_was_trained_of_the_base_stays():
    hybrid = HybridModel(llm_model=tiny_base(), config=tiny_config())
    with torch.no_grad():
        hybrid.get_input_embeddings().weight[7] = 1
    assert (hybrid.unwrap().get_input_embeddings().weight[7] == 1).all()
