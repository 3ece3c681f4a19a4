"""What comes back with a saved hybrid besides its weights, for whom, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize, prune
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hybrid import HybridConfig, HybridModel
from tests.support import fresh
from tests.support.tiny import awaken, tiny_base, tiny_config, tiny_hybrid, tokens
from tests.support.tiny_text import character_tokenizer


@pytest.fixture
def base_folder(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(folder, **changes) -> HybridModel:
    base = AutoModelForCausalLM.from_pretrained(folder)
    return awaken(HybridModel(llm_model=base, config=tiny_config(**changes))).eval()


WHOLE = pytest.mark.parametrize("whole", [False, True])
LOADERS = pytest.mark.parametrize("loader", [AutoModelForCausalLM, HybridModel])


# Settings


@WHOLE
@LOADERS
def test_how_it_generates_is_kept(whole, loader, base_folder, tmp_path):
    hybrid = loaded(base_folder)
    settings = {"max_new_tokens": 5, "repetition_penalty": 1.7, "eos_token_id": [2, 17], "pad_token_id": 3}
    for name, value in settings.items():
        setattr(hybrid.generation_config, name, value)
    hybrid.config.pad_token_id = 13
    hybrid.save_pretrained(tmp_path / "hybrid", save_base=whole or None)
    again = loader.from_pretrained(tmp_path / "hybrid")
    assert {name: getattr(again.generation_config, name) for name in settings} == settings
    assert again.config.pad_token_id == 13
    assert torch.equal(again.generate(tokens()), hybrid.generate(tokens()))


@WHOLE
@LOADERS
def test_fields_can_be_given_when_loading(whole, loader, base_folder, tmp_path):
    hybrid = loaded(base_folder)
    hybrid.save_pretrained(tmp_path / "hybrid", save_base=whole or None)
    again = loader.from_pretrained(tmp_path / "hybrid", num_recursion_steps=5, use_cache=False)
    assert again.config.num_recursion_steps == 5 and again.llm_model.config.use_cache is False
    assert torch.equal(again(tokens()).logits, hybrid(tokens(), num_recursion_steps=5).logits)
    with pytest.raises(ValueError, match="num_recursion_step'; did you mean 'num_recursion_steps'"):
        loader.from_pretrained(tmp_path / "hybrid", num_recursion_step=5)
    with pytest.raises(ValueError, match="no field or argument 'device_mapp'; did you mean 'device_map'"):
        loader.from_pretrained(tmp_path / "hybrid", device_mapp="auto")
    with pytest.raises(ValueError, match="num_recursion_steps"):
        loader.from_pretrained(tmp_path / "hybrid", num_recursion_steps=0)


@WHOLE
def test_a_config_can_be_given_itself_or_by_its_folder(whole, base_folder, tmp_path):
    hybrid = loaded(base_folder)
    hybrid.save_pretrained(tmp_path / "hybrid", save_base=whole or None)
    more = HybridConfig.from_pretrained(tmp_path / "hybrid", num_recursion_steps=5)
    more.save_pretrained(tmp_path / "config")
    for config in (more, tmp_path / "config", str(tmp_path / "config")):
        again = HybridModel.from_pretrained(tmp_path / "hybrid", config=config)
        assert torch.equal(again(tokens()).logits, hybrid(tokens(), num_recursion_steps=5).logits)
    with pytest.raises(ValueError, match="there is no such folder"):
        HybridModel.from_pretrained(tmp_path / "hybrid", config=tmp_path / "nowhere")
    _, info = HybridModel.from_pretrained(tmp_path / "hybrid", output_loading_info=True)
    assert not any(info.values()) and "missing_keys" in info
    for config in (hybrid.llm_model.config, {"num_recursion_steps": 5}):
        with pytest.raises(ValueError, match=f"config to be a HybridConfig.*{type(config).__name__}"):
            HybridModel.from_pretrained(tmp_path / "hybrid", config=config)


# Layers on the disk

ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "disk",
    "model.layers.2": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@WHOLE
@pytest.mark.parametrize("wrap", ["before", "after"])
def test_a_base_partly_on_disk_is_saved(whole, wrap, base_folder, tmp_path):
    where = {"device_map": ON_DISK, "offload_folder": tmp_path / "offload"}
    if wrap == "before":
        loaded(base_folder).save_pretrained(tmp_path / "first")
        hybrid = HybridModel.from_pretrained(tmp_path / "first", **where)
    else:
        base = AutoModelForCausalLM.from_pretrained(base_folder, **where)
        hybrid = awaken(HybridModel(llm_model=base, config=tiny_config())).eval()
    assert any(p.is_meta for p in hybrid.parameters())
    hybrid.save_pretrained(tmp_path / "hybrid", save_base=whole or None)
    tensors = load_file(tmp_path / "hybrid" / "model.safetensors")
    assert any("trm" not in name for name in tensors) == whole
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")
    assert torch.equal(again(tokens()).logits, hybrid(tokens()).logits)


# The tokenizer


def with_tokenizer(folder):
    base = tiny_base()
    base.resize_token_embeddings(len(character_tokenizer()), mean_resizing=False)
    base.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)


@WHOLE
def test_the_bases_tokenizer_comes_along(whole, tmp_path):
    with_tokenizer(tmp_path / "base")
    loaded(tmp_path / "base").save_pretrained(tmp_path / "hybrid", save_base=whole or None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hybrid")
    assert tokenizer("one").input_ids == character_tokenizer()("one").input_ids
    write = pipeline("text-generation", str(tmp_path / "hybrid"), device="cpu")
    assert write("one", max_new_tokens=3, min_new_tokens=3, do_sample=False)[0]["generated_text"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid").save_pretrained(tmp_path / "second")
    assert AutoTokenizer.from_pretrained(tmp_path / "second")("one") == tokenizer("one")


def test_a_tokenizer_that_is_there_stays(tmp_path):
    with_tokenizer(tmp_path / "base")
    own = character_tokenizer()
    own.add_tokens(["<mine>"])
    own.save_pretrained(tmp_path / "hybrid")
    before = {path.name: path.read_bytes() for path in (tmp_path / "hybrid").iterdir()}
    loaded(tmp_path / "base").save_pretrained(tmp_path / "hybrid")
    assert {name: (tmp_path / "hybrid" / name).read_bytes() for name in before} == before


def test_no_tokenizer_is_no_error(base_folder, tmp_path):
    loaded(base_folder).save_pretrained(tmp_path / "hybrid")
    assert not list((tmp_path / "hybrid").glob("*token*"))


# Tools that never import the package


def of_others(code: str, modules: Path) -> str:
    """What `code` prints where nothing has imported the package, and remote code is kept in `modules`."""
    return fresh.python(f"import os, sys\nos.environ['HF_MODULES_CACHE'] = {str(modules)!r}\n{code}")


@WHOLE
def test_trust_remote_code_loads_it(whole, tmp_path):
    with_tokenizer(tmp_path / "base")
    hybrid = loaded(tmp_path / "base")
    hybrid.save_pretrained(tmp_path / "hybrid", save_base=whole or None)
    told = of_others(
        f"""
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
folder = {str(tmp_path / "hybrid")!r}
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = AutoTokenizer.from_pretrained(folder)("one", return_tensors="pt").input_ids
print(config.num_recursion_steps, model(ids).logits.sum().item())
model.save_pretrained({str(tmp_path / "again")!r})
""",
        tmp_path / "modules",
    )
    ids = character_tokenizer()("one", return_tensors="pt").input_ids
    assert told.split() == ["2", str(hybrid(ids).logits.sum().item())]
    assert list((tmp_path / "modules").rglob("modeling_trm_hybrid.py")), "the remote code was loaded"
    names = {path.name for path in (tmp_path / "hybrid").iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names, "no code was copied"


def test_without_the_package_the_error_says_how_to_install_it(base_folder, tmp_path):
    loaded(base_folder).save_pretrained(tmp_path / "hybrid")
    told = of_others(
        f"""
sys.modules["hybrid"] = None
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(tmp_path / "hybrid")!r}, trust_remote_code=True)
except Exception as error:
    print(str(error).splitlines()[-1])
""",
        tmp_path / "modules",
    )
    assert "pip install trm-hybrid" in told


def test_where_the_package_is_imported_nothing_is_asked(base_folder, tmp_path):
    loaded(base_folder).save_pretrained(tmp_path / "hybrid")
    config = json.loads((tmp_path / "hybrid" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_trm_hybrid.HybridModel"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", trust_remote_code=True)
    assert type(again) is HybridModel and not again.config.auto_map
    AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")  # no question, which would wait for an answer


# Files that cannot be right

FIRST = "llm_model.model.layers.0.trm_before.in_proj.weight"
BAD_TENSORS = {
    "NaN": (lambda t: t.fill_(float("nan")), "got some that are none"),
    "infinite": (lambda t: t.fill_(float("inf")), "got some that are none"),
    "int64": (lambda t: t.to(torch.int64), "got torch.int64"),
    "bool": (lambda t: t > 0, "got torch.bool"),
    "complex": (lambda t: t.to(torch.complex64), "got torch.complex64"),
}


@WHOLE
@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_tensors_that_are_no_weights(kind, whole, base_folder, tmp_path):
    loaded(base_folder).save_pretrained(tmp_path / "hybrid", save_base=whole or None)
    file = tmp_path / "hybrid" / "model.safetensors"
    tensors = load_file(file)
    change, message = BAD_TENSORS[kind]
    tensors[FIRST] = change(tensors[FIRST].clone())
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{FIRST}: expected floating numbers, {message}") as error:
        AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["./hybird", "/nowhere/hybrid", "a/b/hybrid", "~/nowhere/hybrid"])
def test_a_mistyped_folder_asks_no_hub(name, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    with pytest.raises(ValueError, match="there is no such folder"):
        HybridModel.from_pretrained(name)


@pytest.mark.parametrize("load", [HybridModel, HybridConfig])
def test_a_base_is_no_hybrid(load, base_folder):
    with pytest.raises(ValueError, match=r"without TRMs \(llama\). HybridModel\(llm_model=.* puts them into"):
        load.from_pretrained(base_folder)


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


COMPUTED = {
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.5), lambda m: prune.remove(m, "weight")),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
        lambda m: parametrize.remove_parametrizations(m, "weight"),
    ),
    "spectral norm": (torch.nn.utils.spectral_norm, torch.nn.utils.remove_spectral_norm),
}


@pytest.mark.parametrize("place", ["trm.in_proj", "self_attn.q_proj"])
@pytest.mark.parametrize("how", COMPUTED)
def test_a_tensor_that_is_computed_is_refused_until_it_is_plain(how, place, tmp_path):
    """Its file would hold weight_orig, or the like, and not the weight that loading looks for."""
    put, remove = COMPUTED[how]
    hybrid = tiny_hybrid()
    layer = hybrid.base_model.layers[1]
    put(layer.get_submodule(place))
    with pytest.raises(
        ValueError, match=f"1 that are computed .* loading: llm_model.*layers.1.{place}.weight"
    ):
        hybrid.save_pretrained(tmp_path, save_base=True)
    assert not list(tmp_path.iterdir())
    want = hybrid(tokens()).logits
    remove(layer.get_submodule(place))
    hybrid.save_pretrained(tmp_path, save_base=True)
    assert torch.equal(HybridModel.from_pretrained(tmp_path)(tokens()).logits, want)


def test_a_hook_of_somebody_elses_computes_no_weight(tmp_path):
    class Named:
        name = "forward"

        def __call__(self, module, given):
            return None

    hybrid = tiny_hybrid()
    hybrid.base_model.layers[1].trm.register_forward_pre_hook(Named())
    hybrid.save_pretrained(tmp_path, save_base=True)
    HybridModel.from_pretrained(tmp_path)


def test_a_computed_tensor_of_the_base_is_no_matter_where_the_trms_are_saved(tmp_path):
    bases = [tiny_base() for _ in range(2)]
    for base in bases:
        prune.l1_unstructured(base.model.layers[1].self_attn.q_proj, "weight", 0.5)
    hybrid = awaken(HybridModel(llm_model=bases[0], config=tiny_config()))
    hybrid.save_pretrained(tmp_path, save_base=False)
    again = HybridModel.from_pretrained(tmp_path, llm_model=bases[1])
    assert all(
        torch.equal(a, b) for a, b in zip(hybrid.trm_parameters(), again.trm_parameters(), strict=True)
    )
