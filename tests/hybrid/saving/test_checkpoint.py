"""A hybrid on disk: TRM tensors beside a reference, the whole model without one, and damaged files."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hybrid import HybridModel
from tests.support import forked
from tests.support.tiny import awaken, tiny_base, tiny_config, tiny_hybrid, tokens


@pytest.fixture
def base_folder(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def saved(base_folder, tmp_path):
    """(hybrid of a base that was loaded from a folder, the folder it is saved in)"""
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    hybrid = awaken(HybridModel(llm_model=base, config=tiny_config())).eval()
    hybrid.save_pretrained(tmp_path / "hybrid")
    return hybrid, tmp_path / "hybrid"


def same(a, b) -> bool:
    return torch.equal(a(tokens()).logits, b(tokens()).logits)


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, HybridModel])
def test_trm_tensors_only_beside_a_reference(saved, base_folder, loader):
    hybrid, folder = saved
    tensors = load_file(folder / "model.safetensors")
    assert tensors and all("trm" in name for name in tensors)
    assert json.loads((folder / "config.json").read_text())["base_model_name_or_path"] == str(base_folder)
    assert not list(folder.glob(".saving-*")), "nothing half-written is left"
    again = loader.from_pretrained(folder)
    assert isinstance(again, HybridModel) and not again.training
    assert same(again, hybrid)
    again.save_pretrained(folder.parent / "second")
    assert load_file(folder.parent / "second" / "model.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])  # gpt2, gemma2: tied embeddings
def test_the_whole_model_when_there_is_no_reference(family, tmp_path):
    hybrid = tiny_hybrid(family)
    hybrid.save_pretrained(tmp_path)
    assert any("trm" not in name for name in load_file(tmp_path / "model.safetensors"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(again, hybrid)
    assert again.config.base_model_name_or_path is None
    again.save_pretrained(tmp_path / "second")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "second"), hybrid)


@pytest.mark.parametrize("how", ["adamw", "fused adamw", "in place"])
def test_a_trained_base_is_never_lost(saved, how, tmp_path):
    """Phase 2: the reference no longer says what the base is, so everything is saved."""
    hybrid, _ = saved
    if how == "in place":
        hybrid.llm_model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    else:
        optimizer = torch.optim.AdamW(hybrid.parameters(), lr=1e-5, fused="fused" in how)
        hybrid(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    hybrid.save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert same(again, hybrid)
    assert again.config.base_model_name_or_path is None
    assert hybrid.config.base_model_name_or_path is not None, "the model in memory keeps its reference"


def test_training_the_trm_alone_keeps_the_file_small(saved, tmp_path):
    hybrid, _ = saved
    hybrid.freeze_base()
    optimizer = torch.optim.AdamW([p for p in hybrid.parameters() if p.requires_grad], lr=1e-3)
    hybrid(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    hybrid.bfloat16().float()  # a change of dtype is not training... but it did round the base
    hybrid.save_pretrained(tmp_path / "rounded")
    assert any("trm" not in name for name in load_file(tmp_path / "rounded" / "model.safetensors"))


def test_a_cast_base_still_counts_as_the_reference(saved, tmp_path):
    hybrid, _ = saved
    hybrid.llm_model.to(torch.bfloat16)
    hybrid.save_pretrained(tmp_path / "cast")
    assert all("trm" in name for name in load_file(tmp_path / "cast" / "model.safetensors"))


def test_dtypes_are_decided_not_inherited(saved, tmp_path):
    """transformers loads into the dtype a parameter was made in, and the TRM's says which: trm_dtype."""
    hybrid, folder = saved
    hybrid.save_pretrained(tmp_path / "whole", save_base=True)
    want = {name: p for name, p in hybrid.named_parameters() if "trm" in name}
    for place in (folder, tmp_path / "whole"):
        again = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
        assert {p.dtype for _, p in again.base_named_parameters()} == {torch.bfloat16}
        for name, parameter in again.named_parameters():
            if "trm" in name:
                assert torch.equal(parameter, want[name]), f"{name} was rounded on the way"


def test_saving_again_leaves_no_weights_of_before(saved):
    """Whole and sharded first, then the TRM alone: no shard or index of the first may be left."""
    hybrid, folder = saved
    hybrid.save_pretrained(folder, save_base=True, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert same(AutoModelForCausalLM.from_pretrained(folder), hybrid)
    hybrid.save_pretrained(folder)
    assert [p.name for p in folder.glob("*safetensors*")] == ["model.safetensors"]
    assert same(AutoModelForCausalLM.from_pretrained(folder), hybrid)


def test_a_state_dict_and_a_config_are_a_model_without_a_folder():
    """As `from_pretrained(None, config=..., state_dict=...)` of transformers has it."""
    hybrid = tiny_hybrid()
    got = HybridModel.from_pretrained(None, config=hybrid.config, state_dict=hybrid.state_dict())
    assert torch.equal(got(tokens()).logits, hybrid(tokens()).logits)


def test_sharded_trm_tensors(saved, tmp_path):
    hybrid, _ = saved
    hybrid.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "shards"), hybrid)


def test_a_base_of_the_callers(saved, base_folder):
    hybrid, folder = saved
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    shutil.rmtree(base_folder)
    again = HybridModel.from_pretrained(folder, llm_model=base)
    assert again.llm_model is base and same(again, hybrid)
    with pytest.raises(ValueError, match=r"expected the base model at .*base.*If it has moved, base_model"):
        HybridModel.from_pretrained(folder)


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


FIRST = "llm_model.model.layers.0.trm_before.in_proj.weight"
DAMAGES = {
    "missing file": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "expected model.safetensors in .*hybrid, got no such file",
    ),
    "truncated": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-64]
        ),
        "expected a whole safetensors file, got a damaged one",
    ),
    "garbage": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64),
        "expected a whole safetensors file, got a damaged one",
    ),
    "missing tensor": (
        lambda folder: rewrite(folder, lambda t: t.pop(FIRST)),
        f"1 tensors are missing, the first is {FIRST}",
    ),
    "unexpected tensor": (
        lambda folder: rewrite(folder, lambda t: t.update({"trm.more": torch.zeros(1)})),
        "1 tensors are unexpected, the first is trm.more",
    ),
    "another width": (
        lambda folder: rewrite(folder, lambda t: t.update({FIRST: torch.zeros(48, 32)})),
        rf"{FIRST}: expected \(24, 32\), got \(48, 32\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_cannot_be_right_gives_one_error(saved, damage):
    _, folder = saved
    do, message = DAMAGES[damage]
    do(folder)
    with pytest.raises(ValueError, match=message) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "missing tensor", "unexpected tensor", "another width"])
def test_so_does_a_whole_model(damage, tmp_path):
    folder = tmp_path / "hybrid"
    tiny_hybrid().save_pretrained(folder)
    DAMAGES[damage][0](folder)
    with pytest.raises(ValueError, match="HybridModel: ") as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_config(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"trm_hidden_size": 48}))
    with pytest.raises(ValueError, match=r"expected \(48, 32\), got \(24, 32\)"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        tiny_hybrid().save_pretrained(tmp_path / "file")


def test_a_save_killed_in_the_middle_leaves_the_last_good_one(saved):
    """The process dies with the new weights half-way: what is in the folder still loads, unchanged."""
    hybrid, folder = saved

    def save():
        model = HybridModel.from_pretrained(folder)
        for p in model.trm_parameters():
            p.data.zero_()
        transformers_model = HybridModel.__mro__[1]
        write = transformers_model.save_pretrained

        def half(self, place, *args, **kwargs):
            write(self, place, *args, **kwargs)
            file = Path(place) / "model.safetensors"
            file.write_bytes(file.read_bytes()[:100])
            os.kill(os.getpid(), signal.SIGKILL)

        transformers_model.save_pretrained = half
        model.save_pretrained(folder)

    assert forked.run(save) == -signal.SIGKILL
    assert same(AutoModelForCausalLM.from_pretrained(folder), hybrid)
    hybrid.save_pretrained(folder)
    assert same(AutoModelForCausalLM.from_pretrained(folder), hybrid)


def test_no_pickle_is_read_or_written(saved):
    _, folder = saved
    assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors", ".py"}


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_the_hub_gets_the_same_files(saved, how, tmp_path, monkeypatch):
    """The network is cut off at transformers' own upload; what it is handed is looked at."""
    hybrid, folder = saved
    uploads = []
    repository = SimpleNamespace(repo_id="someone/mine")
    hub = SimpleNamespace(create_repo=lambda *_, **__: repository)
    for name in ("hf_api", "create_repo"):  # the one on transformers 5.23, the other on 5.17
        for module in ("transformers.utils.hub", "transformers.modeling_utils"):
            stand_in = (lambda: hub) if name == "hf_api" else hub.create_repo
            monkeypatch.setattr(f"{module}.{name}", stand_in, raising=False)
    card = SimpleNamespace(save=lambda *_: None)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card)
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *_, **__: card)

    def upload(self, working_dir, repo_id, *_, **__):
        uploads.append(
            (repo_id, {p.name: p.read_bytes() for p in Path(working_dir).iterdir() if p.is_file()})
        )

    monkeypatch.setattr(HybridModel, "_upload_modified_files", upload)
    if how == "push_to_hub":
        hybrid.push_to_hub("someone/mine")
    else:
        hybrid.save_pretrained(tmp_path / "mine", push_to_hub=True)
    ((repo_id, files),) = uploads
    assert repo_id == "someone/mine"
    for name in ("model.safetensors", "config.json"):
        assert files[name] == (folder / name).read_bytes()
