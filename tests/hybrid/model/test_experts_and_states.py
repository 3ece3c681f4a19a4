"""Bases whose layers have experts, or states in the place of attention, and whose layers differ."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hybrid import HybridModel
from tests.support.tiny import WIDTH, awaken, tiny_config, tokens

_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
# what each has that others have not
FAMILIES = {
    "Mixtral": {"num_local_experts": 4},  # files with other names than its modules
    "Qwen3Moe": _EXPERTS | {"head_dim": 8, "decoder_sparse_step": 1},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "Jamba": {  # layers of two classes
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_expand": 1,
        "mamba_dt_rank": 4,
    },
    # draws matrices by a name that TRMs have too; has kinds of layers that transformers' own rule refuses
    "NemotronH": {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
    "FalconH1": _STATES | {"mamba_d_ssm": 64},  # buffers that no file has, filled from above the layers
}


def base_of(family, **sizes):
    config = getattr(transformers, f"{family}Config")(**_SIZES | sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_equals_its_base_generates_and_is_saved_with_and_without_it(family, tmp_path):
    base_of(family, **FAMILIES[family]).save_pretrained(tmp_path / "base")
    base, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tokens()
    want = base(ids).logits
    hybrid = HybridModel(llm_model=base, config=tiny_config()).eval()
    assert torch.equal(hybrid(ids).logits, want)

    changed = awaken(hybrid)(ids).logits
    assert (changed - want).abs().max() > 1e-3
    said = [hybrid.generate(ids, max_new_tokens=4, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*said)

    if base._is_stateful:  # states cannot be taken back
        with pytest.raises(ValueError, match="not supported with stateful models"):
            hybrid.generate(ids, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=2)

    for whole in (False, True):
        hybrid.save_pretrained(tmp_path / f"saved-{whole}", save_base=whole)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"saved-{whole}")
        assert torch.equal(again(ids).logits, changed)


@pytest.mark.parametrize("family", ["Mamba", "Rwkv"])
@torch.no_grad()
def test_a_base_of_states_alone_goes_without_a_cache(family, tmp_path):
    config = getattr(transformers, f"{family}Config")(vocab_size=99, hidden_size=WIDTH, num_hidden_layers=3)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path / "base")
    base, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tokens()
    greedy = {"max_new_tokens": 3, "do_sample": False}
    want, said = base(ids).logits, base.generate(ids, use_cache=False, **greedy)
    hybrid = HybridModel(llm_model=base, config=tiny_config()).eval()
    assert torch.equal(hybrid(ids).logits, want) and torch.equal(hybrid.generate(ids, **greedy), said)
    if family == "Mamba":
        for call in (hybrid, hybrid.generate):
            with pytest.raises(ValueError, match="states alone.*pass use_cache=False"):
                call(ids, use_cache=True)
    awaken(hybrid).save_pretrained(tmp_path / "hybrid")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")
    assert torch.equal(again.generate(ids, **greedy), hybrid.generate(ids, **greedy))
