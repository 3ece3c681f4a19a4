"""PEFT's own tests of decoders, on hybrids: every method, with the models that its tests name made here.

    make peers ARGS=tests/peers/peft_decoders.py

The tests load models from the hub by name; here a name stands for a tiny hybrid on disk, of the same family
and with a W_out that is not zero. Tests that want a tokenizer or another model from the hub are skipped.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, OPTConfig

from hybrid import HybridConfig, HybridModel
from tests.peers.sources import import_tests
from tests.support.tiny import awaken

import_tests("peft", {})


class _NotThere: ...


try:
    import diffusers  # noqa: F401  the common tests import it, for tests of images
except ImportError:
    import sys
    from types import SimpleNamespace

    sys.modules["diffusers"] = SimpleNamespace(StableDiffusionPipeline=_NotThere)  # type: ignore[assignment]
from peft_tests import test_decoder_models  # noqa: E402

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = _SIZES | {"intermediate_size": 64, "num_key_value_heads": 4}
BASES = {
    "trl-internal-testing/tiny-random-LlamaForCausalLM": LlamaConfig(**_LLAMA),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": GPT2Config(**_SIZES),
    "hf-internal-testing/tiny-random-gpt2": GPT2Config(**_SIZES),
    "peft-internal-testing/tiny-random-OPTForCausalLM": OPTConfig(
        **_SIZES, ffn_dim=64, word_embed_proj_dim=32
    ),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """model name -> the folder of a hybrid with its base inside"""
    found = {}
    for name, config in BASES.items():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config)
        hybrid = HybridModel(
            llm_model=base,
            config=HybridConfig(
                injection_layers=[1, 2],
                trm_hidden_size=24,
                trm_num_heads=3,
                trm_num_layers=1,
                trm_intermediate_size=32,
                num_recursion_steps=2,
            ),
        )
        found[name] = str(tmp_path_factory.mktemp("hybrids") / name.rpartition("/")[2])
        awaken(hybrid, 0.1).save_pretrained(found[name], save_base=True)
    return found


@pytest.fixture(autouse=True)
def local_models(monkeypatch, folders):
    """Names of models mean those folders; what is not there skips the test."""
    for auto in (AutoModelForCausalLM, AutoConfig):
        theirs = auto.from_pretrained.__func__

        def from_pretrained(cls, name, *args, theirs=theirs, **kwargs):
            name = folders.get(str(name), name)
            if "/" in str(name) and not str(name).startswith("/"):
                pytest.skip(f"{name} is on the hub")
            return theirs(cls, name, *args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", classmethod(from_pretrained))

    def no_tokenizer(name, *args, **kwargs):
        pytest.skip(f"the tokenizer of {name} is on the hub")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", no_tokenizer)


class TestDecoderModels(test_decoder_models.TestDecoderModels):
    transformers_class = AutoModelForCausalLM
