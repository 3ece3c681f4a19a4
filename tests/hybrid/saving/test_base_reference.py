"""The base that is loaded again is the one that was wrapped, or one sentence says why not."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, GenerationConfig

from hybrid import HybridConfig, HybridModel
from hybrid.model.injection_points import decoder_layers
from hybrid.saving import base_checksum, base_reference
from hybrid.saving.base_reference import base_tensors
from tests.support import forked
from tests.support.tiny import awaken, tiny_base, tiny_config, tokens


@pytest.fixture
def folder(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(folder, **arguments):
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


def wrapped(base):
    return awaken(HybridModel(llm_model=base, config=tiny_config())).freeze_base().eval()


def is_whole(folder):
    return any("trm" not in name for name in load_file(folder / "model.safetensors"))


@torch.no_grad()
def check_comes_back(hybrid, folder, is_whole_then, ids=None):
    ids = tokens() if ids is None else ids
    want = hybrid(ids).logits
    hybrid.save_pretrained(folder)
    assert is_whole(folder) == is_whole_then
    assert torch.equal(loaded(folder)(ids).logits, want)


# The checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("size", [1, 7, 1000, 2**18 + 5])
def test_each_value_counts_and_its_place(dtype, size):
    t = torch.randint(-100, 100, (size,), generator=torch.Generator().manual_seed(0)).to(dtype)
    before = base_checksum.tensor_sums([("t", t)])
    assert base_checksum.tensor_sums([("t", t.clone())]) == before
    for place in {0, size // 2, size - 1}:
        other = t.clone()
        other[place] += 1
        assert base_checksum.tensor_sums([("t", other)]) != before
    if size > 1:
        t[0] = 5
        t[-1] = 6
        assert base_checksum.tensor_sums([("t", t.flip(0))]) != base_checksum.tensor_sums([("t", t)])


def test_devices_that_have_no_integer_dot_get_the_same_sums():
    words = torch.arange(3 * 2**17 + 77) * 1_000_003
    low, high = base_checksum._weights(words.device)
    whole, rest = words[: 3 * 2**17].view(-1, 2**17), words[3 * 2**17 :]
    of_whole = (whole * low + (whole >> 32) * high).sum(1)
    of_rest = (rest * low[:77] + (rest >> 32) * high[:77]).sum()
    found = torch.cat(base_checksum._chunk_sums(words))
    assert torch.equal(found, torch.cat([of_whole, of_rest[None]]))


@pytest.mark.parametrize("column", [0, 1, 6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_column_of_turned_signs_is_seen(column, dtype):
    """All changes are in the same bits of their words, the uppermost of them for some columns."""
    t = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = base_checksum.tensor_sums([("t", t)])
    for change in (-1, 2):
        other = t.clone()
        other[:, column] *= change
        assert base_checksum.tensor_sums([("t", other)]) != before


# What was done to the base


@pytest.mark.parametrize("row", [7, 50, 98])
def test_one_changed_row_of_an_embedding_is_kept(folder, tmp_path, row):
    hybrid = wrapped(loaded(folder))
    with torch.no_grad():
        hybrid.get_input_embeddings().weight[row] *= 1.5
    check_comes_back(hybrid, tmp_path / "hybrid", is_whole_then=True, ids=torch.full((1, 4), row))


@pytest.mark.parametrize("size", [107, 90])
def test_embeddings_that_were_resized_before(folder, tmp_path, size):
    base = loaded(folder)
    base.resize_token_embeddings(size, mean_resizing=False)
    check_comes_back(wrapped(base), tmp_path / "hybrid", is_whole_then=True, ids=torch.full((1, 4), size - 1))


def test_an_adapter_that_was_merged_before(folder, tmp_path):
    lora = get_peft_model(loaded(folder), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    check_comes_back(wrapped(lora.merge_and_unload()), tmp_path / "hybrid", is_whole_then=True)


def test_what_was_overridden_when_it_was_loaded(folder, tmp_path):
    check_comes_back(wrapped(loaded(folder, rms_norm_eps=0.5)), tmp_path / "hybrid", is_whole_then=False)


def test_a_change_after_a_save_is_noticed(folder, tmp_path):
    hybrid = wrapped(loaded(folder))
    check_comes_back(hybrid, tmp_path / "hybrid", is_whole_then=False)
    with torch.no_grad():
        hybrid.llm_model.lm_head.weight[:, 1].neg_()
    check_comes_back(hybrid, tmp_path / "hybrid", is_whole_then=True)


def test_only_the_trm_is_asked_for_where_the_base_would_be_lost(folder, tmp_path):
    hybrid = wrapped(loaded(folder))
    with torch.no_grad():
        hybrid.llm_model.lm_head.weight[3, 3] += 1
    with pytest.raises(ValueError, match=r"save_base=False .* lm_head.weight has changed"):
        hybrid.save_pretrained(tmp_path / "hybrid", save_base=False)
    assert not (tmp_path / "hybrid").exists()


def test_another_base_in_its_place_is_refused(folder, tmp_path):
    hybrid = wrapped(loaded(folder))
    hybrid.save_pretrained(tmp_path / "hybrid")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"expected the base that this hybrid was saved with .*other weights"
    ):
        loaded(tmp_path / "hybrid")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_same_base_in_another_dtype_is_the_same(folder, tmp_path, dtype):
    wrapped(loaded(folder)).save_pretrained(tmp_path / "hybrid")
    assert loaded(tmp_path / "hybrid", dtype=dtype).llm_model.dtype == dtype


# Where it came from


def test_a_subfolder_is_found(folder, tmp_path):
    tiny_base(seed=1).save_pretrained(folder / "second")
    hybrid = wrapped(loaded(folder, subfolder="second"))
    check_comes_back(hybrid, tmp_path / "hybrid", is_whole_then=False)
    assert HybridConfig.from_pretrained(tmp_path / "hybrid").base_subfolder == "second"
    (folder / "config.json").unlink()  # the other one is not needed
    (folder / "model.safetensors").unlink()
    assert torch.equal(loaded(tmp_path / "hybrid")(tokens()).logits, hybrid(tokens()).logits)


def test_a_base_of_variant_files_alone_is_saved_whole(tmp_path, caplog):
    tiny_base().save_pretrained(tmp_path / "base", variant="fp16")
    hybrid = wrapped(loaded(tmp_path / "base", variant="fp16"))
    check_comes_back(hybrid, tmp_path / "hybrid", is_whole_then=True)
    assert "saved with the TRM, for its folder does not give it without further arguments" in caplog.text
    with pytest.raises(ValueError, match="save_base=False expected a base that can be loaded again"):
        hybrid.save_pretrained(tmp_path / "other", save_base=False)


@pytest.mark.parametrize("is_changed", [False, True])
def test_files_that_are_no_safetensors_are_loaded_again(folder, tmp_path, is_changed):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    base = loaded(folder)
    if is_changed:
        with torch.no_grad():
            base.model.norm.weight[3] += 1
    check_comes_back(wrapped(base), tmp_path / "hybrid", is_whole_then=is_changed)


@pytest.mark.parametrize("is_changed", [False, True])
def test_a_gguf_file_is_read_again(tmp_path, is_changed):
    pytest.importorskip("gguf", reason="the extra trm-hybrid[gguf] is not installed")
    from tests.hybrid.saving.test_gguf_base import MERGES, WORDS, tiny_llama, write_gguf

    write_gguf(tiny_llama(), tmp_path / "tiny.gguf", WORDS, MERGES, special=3)
    base = loaded(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    if is_changed:
        with torch.no_grad():
            base.model.norm.weight[3] += 1
    hybrid = awaken(HybridModel(llm_model=base, config=tiny_config(injection_layers=[1]))).eval()
    check_comes_back(hybrid, tmp_path / "hybrid", is_changed, tokens() % len(WORDS))


def test_without_memory_to_load_it_again_it_is_saved(folder, tmp_path, monkeypatch):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("hybrid.saving.base_reference._ROOM_TO_LOAD", 1e15)
    check_comes_back(wrapped(loaded(folder)), tmp_path / "hybrid", is_whole_then=True)


# Where it is saved


@pytest.mark.parametrize("place", ["base", "link", "./base", "base/"])
def test_the_bases_own_folder_is_refused(folder, tmp_path, place, monkeypatch):
    hybrid = wrapped(loaded(folder))
    (tmp_path / "link").symlink_to(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.chdir(tmp_path)
    for save_base in (None, True, False):
        with pytest.raises(ValueError, match="expected another folder than the base's own"):
            hybrid.save_pretrained(place, save_base=save_base)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_of_another_model_is_refused(folder, tmp_path):
    tiny_base(seed=3).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="holds a model of the type 'llama'"):
        wrapped(loaded(folder)).save_pretrained(tmp_path / "other")


# What else comes back


def test_settings_of_generation_and_a_frozen_base(folder, tmp_path):
    hybrid = wrapped(loaded(folder))
    hybrid.generation_config = GenerationConfig(
        max_new_tokens=5, repetition_penalty=1.7, eos_token_id=[2, 17]
    )
    hybrid.save_pretrained(tmp_path / "hybrid")
    again = loaded(tmp_path / "hybrid")
    for name in ("max_new_tokens", "repetition_penalty", "eos_token_id"):
        assert getattr(again.generation_config, name) == getattr(hybrid.generation_config, name)
    assert not any(p.requires_grad for _, p in again.base_named_parameters())


@pytest.mark.parametrize("save_base", [None, True])
def test_fields_of_the_config_are_taken_by_from_pretrained(folder, tmp_path, save_base):
    wrapped(loaded(folder)).save_pretrained(tmp_path / "hybrid", save_base=save_base)
    for loader in (HybridModel, AutoModelForCausalLM):
        again = loader.from_pretrained(tmp_path / "hybrid", num_recursion_steps=5)
        assert again.config.num_recursion_steps == 5


@pytest.mark.parametrize("broken", [lambda t: t * float("nan"), lambda t: t.long(), lambda t: t.bool()])
def test_tensors_that_are_no_numbers_are_refused(folder, tmp_path, broken):
    wrapped(loaded(folder)).save_pretrained(tmp_path / "hybrid")
    file = tmp_path / "hybrid" / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: broken(tensors[name])}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="expected floating numbers"):
        loaded(tmp_path / "hybrid")


def test_base_tensors_in_a_file_of_the_trm_are_refused(folder, tmp_path):
    hybrid = wrapped(loaded(folder))
    hybrid.save_pretrained(tmp_path / "hybrid")
    file = tmp_path / "hybrid" / "model.safetensors"
    stranger = {"llm_model.lm_head.weight": hybrid.llm_model.lm_head.weight.detach().clone()}
    save_file(load_file(file) | stranger, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"expected tensors of the TRMs alone .* got llm_model.lm_head.weight"
    ):
        loaded(tmp_path / "hybrid")


def test_unwrap_gives_the_base_back(folder):
    base, ids = loaded(folder), tokens()
    names, want = list(base.state_dict()), base(ids).logits
    hybrid = awaken(HybridModel(llm_model=base, config=tiny_config())).freeze_base()
    assert hybrid.unwrap() is base
    assert list(base.state_dict()) == names
    assert all(p.requires_grad for p in base.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert torch.equal(base(ids).logits, want)
    with pytest.raises(ValueError, match="got one that was unwrapped"):
        hybrid(ids)
    assert torch.equal(HybridModel(llm_model=base, config=tiny_config())(ids).logits, want)


@pytest.mark.parametrize("wrong", ["another base", "another size"])
def test_a_refused_load_gives_the_base_back(folder, tmp_path, wrong):
    wrapped(loaded(folder)).save_pretrained(tmp_path / "hybrid")
    base, fields = loaded(folder), {}
    if wrong == "another base":
        base.model.norm.weight.data[0] += 1
    else:
        fields = {"trm_intermediate_size": 24}
    names, learns = list(base.state_dict()), [p.requires_grad for p in base.parameters()]
    with pytest.raises((ValueError, RuntimeError)):
        HybridModel.from_pretrained(tmp_path / "hybrid", llm_model=base, **fields)
    assert list(base.state_dict()) == names and [p.requires_grad for p in base.parameters()] == learns
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    HybridModel(llm_model=base, config=tiny_config())


def test_every_tensor_of_a_file_is_looked_at(folder):
    hybrid = wrapped(loaded(folder))
    assert dict(base_tensors(hybrid)).keys() == load_file(folder / "model.safetensors").keys()


def add_a_bias(base):
    base.lm_head.bias = torch.nn.Parameter(torch.randn(base.lm_head.out_features), requires_grad=False)


def tie(base):
    base.lm_head.weight = base.model.embed_tokens.weight


def take_a_norm_out(base):
    base.model.norm = torch.nn.Identity()


@pytest.mark.parametrize("change", [add_a_bias, tie, take_a_norm_out])
def test_a_tensor_that_came_or_went_after_a_save(folder, tmp_path, change):
    hybrid = wrapped(loaded(folder))
    hybrid.save_pretrained(tmp_path / "hybrid")
    change(hybrid.llm_model)
    with pytest.raises(ValueError, match="has changed since it was wrapped"):
        hybrid.save_pretrained(tmp_path / "hybrid", save_base=False)
    hybrid.save_pretrained(tmp_path / "whole")
    assert is_whole(tmp_path / "whole")


@pytest.mark.parametrize("save_base", [None, True])
@pytest.mark.parametrize("lack", ["all", "trm"])
def test_a_state_dict_that_lacks_tensors_is_refused_and_nothing_lost(folder, tmp_path, save_base, lack):
    hybrid = wrapped(loaded(folder))
    hybrid.save_pretrained(tmp_path / "hybrid")
    before = (tmp_path / "hybrid" / "model.safetensors").read_bytes()
    some = {} if lack == "all" else {n: t for n, t in hybrid.state_dict().items() if "trm" not in n}
    with pytest.raises(ValueError, match="expected a state_dict with all tensors"):
        hybrid.save_pretrained(tmp_path / "hybrid", state_dict=some, save_base=save_base)
    with pytest.raises(ValueError, match="expected no variant, got 'x'"):
        hybrid.save_pretrained(tmp_path / "hybrid", variant="x")
    assert (tmp_path / "hybrid" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_a_state_dict_of_a_wrapper_is_refused_by_its_prefix(folder, tmp_path, prefix):
    """torch.compile's module and AveragedModel's put a prefix before each name."""
    hybrid = wrapped(loaded(folder))
    state = {f"{prefix}{name}": t for name, t in hybrid.state_dict().items()}
    with pytest.raises(ValueError, match=rf"It has {prefix}llm_model\.\S+: take what precedes the name"):
        hybrid.save_pretrained(tmp_path / "hybrid", state_dict=state)


def test_weights_without_a_config_are_not_overwritten(folder, tmp_path):
    (tmp_path / "hybrid").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "hybrid" / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"which holds model-00001-of-00002.safetensors without a hybrid's"):
        wrapped(loaded(folder)).save_pretrained(tmp_path / "hybrid")


@torch.no_grad()
def test_threads_that_save_one_model_do_not_meet(folder, tmp_path):
    hybrid = wrapped(loaded(folder))
    want = hybrid(tokens()).logits
    reference = hybrid.config.base_model_name_or_path

    def save(i):
        hybrid.save_pretrained(tmp_path / str(i % 4), save_base=True if i % 2 else None)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(save, range(16)))
    assert hybrid.config.base_model_name_or_path == reference
    for i in range(4):
        assert is_whole(tmp_path / str(i)) == bool(i % 2)
        assert torch.equal(loaded(tmp_path / str(i))(tokens()).logits, want)


@torch.no_grad()
def test_lora_that_is_merged_would_count_twice(folder, tmp_path):
    base, ids = loaded(folder), tokens()
    want = base(ids).logits
    hybrid = HybridModel(llm_model=base, config=tiny_config(lora_rank=2)).eval()
    for name, p in hybrid.named_parameters():
        if "lora_B" in name:
            p.normal_()
    for module in hybrid.modules():
        if hasattr(module, "merge"):
            module.merge()
    with pytest.raises(ValueError, match="got some that is merged"):
        hybrid.save_pretrained(tmp_path / "hybrid")
    assert not (tmp_path / "hybrid").exists()
    torch.testing.assert_close(hybrid.unwrap()(ids).logits, want, rtol=1e-4, atol=1e-5)


def test_a_base_that_was_cast_comes_back_in_its_dtype(folder, tmp_path):
    check_comes_back(wrapped(loaded(folder)).bfloat16(), tmp_path / "hybrid", is_whole_then=False)


def test_a_base_in_a_dtype_that_cannot_be_compared_is_said(folder, tmp_path, monkeypatch):
    """From a float32 file to float16 is not the same as by way of bfloat16."""
    wrapped(loaded(folder, dtype=torch.bfloat16)).save_pretrained(tmp_path / "hybrid")
    said = []
    monkeypatch.setattr(base_reference.logger, "warning", said.append)
    assert loaded(tmp_path / "hybrid", dtype=torch.float16).llm_model.dtype == torch.float16
    assert len(said) == 1 and "in float16, and there are checksums in bfloat16 alone" in said[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"base_checksums": ["a"]},
        {"base_checksums": {"float32": 5}},
        {"base_checksums": {"nope": "a"}},
        {"base_subfolder": ["x"]},
        {"base_gguf_file": 5},
        {"base_revision": {}},
        {"base_is_frozen": "no"},
    ],
    ids=str,
)
def test_what_a_file_says_of_the_base_is_checked(folder, tmp_path, fields):
    wrapped(loaded(folder)).save_pretrained(tmp_path / "hybrid")
    file = tmp_path / "hybrid" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ValueError, match=f"expected {next(iter(fields))}"):
        loaded(tmp_path / "hybrid")


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000], ids=["list", "cut", "deep"])
def test_settings_of_generation_that_are_none_are_named(folder, tmp_path, content):
    wrapped(loaded(folder)).save_pretrained(tmp_path / "hybrid")
    (tmp_path / "hybrid" / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config.json: expected a JSON object"):
        loaded(tmp_path / "hybrid")


def test_a_number_too_large_for_its_dtype_is_refused(folder, tmp_path):
    wrapped(loaded(folder)).save_pretrained(tmp_path / "hybrid")
    file = tmp_path / "hybrid" / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].double() + 1e300}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="expected floating numbers"):
        loaded(tmp_path / "hybrid")


def test_what_will_be_otherwise_when_it_is_loaded_is_said(folder, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hybrid.saving.save_hybrid.logger.warning", said.append)
    hybrid = wrapped(loaded(folder))
    hybrid.config.use_cache = False
    hybrid.save_pretrained(tmp_path / "a")
    assert said == []
    hybrid.config.rms_norm_eps = 0.5
    hybrid.injection_enabled = False
    hybrid.save_pretrained(tmp_path / "b")
    assert ["config.rms_norm_eps was set to 0.5" in said[0], "switched off" in said[1]] == [True, True]


# A base that FSDP2 has split, of which a process has parts


def as_one_of_two(act, folder, into):
    """`act` with a mesh of two processes, of which one is here, forked: torch remembers which part it had.

    Nobody answers, so a save that asks the other one fails.
    """

    def alone():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        act(folder, into, init_device_mesh("cpu", (2,)))

    assert forked.run(alone) == 0


def split(hybrid, mesh):
    """`hybrid` in parts; its TRMs' tensors as they were."""
    whole = {name: t.clone() for name, t in hybrid.state_dict().items() if "trm" in name}
    for unit in (*decoder_layers(hybrid.llm_model), hybrid):
        fully_shard(unit, mesh=mesh)
    return whole


def test_the_trms_of_a_split_hybrid_are_saved_with_their_bases_checksum(folder, tmp_path):
    as_one_of_two(save_whole_trms, folder, tmp_path)


def save_whole_trms(folder, into, mesh):
    hybrid = wrapped(loaded(folder))
    hybrid.save_pretrained(into / "before")
    whole = split(hybrid, mesh)
    hybrid.save_pretrained(into / "after", state_dict=whole)
    configs = [json.loads((into / name / "config.json").read_text()) for name in ("before", "after")]
    assert configs[0]["base_checksums"] == configs[1]["base_checksums"]
    again = loaded(into / "after").state_dict()
    assert all(torch.equal(again[name], t) for name, t in whole.items())


def test_a_base_that_is_split_already_is_refused_with_what_to_do(folder, tmp_path):
    as_one_of_two(wrap_what_is_split, folder, tmp_path)


def wrap_what_is_split(folder, _, mesh):
    base = fully_shard(loaded(folder), mesh=mesh)
    told = r"whole parameters, got model\.embed_tokens\.weight split among processes\. For FSDP2 wrap"
    with pytest.raises(ValueError, match=told):
        wrapped(base)


def test_of_a_split_hybrid_that_was_not_saved_before(folder, tmp_path):
    as_one_of_two(save_for_the_first_time, folder, tmp_path)


def save_for_the_first_time(folder, into, mesh):
    hybrid = wrapped(loaded(folder))
    hybrid.save_pretrained(into / "after", state_dict=split(hybrid, mesh), save_base=False)
    checksums = json.loads((into / "after" / "config.json").read_text())["base_checksums"]
    assert checksums.keys() == {"float32"}
    loaded(into / "after")  # which compares
    other = tiny_base(seed=1)
    with pytest.raises(ValueError, match="got one with other weights"):
        HybridModel.from_pretrained(into / "after", llm_model=other)


def test_a_split_base_that_learns_is_not_taken_for_the_one_in_its_files(folder, tmp_path):
    as_one_of_two(save_a_base_that_learns, folder, tmp_path)


def save_a_base_that_learns(folder, into, mesh):
    hybrid = wrapped(loaded(folder)).requires_grad_(True)
    with pytest.raises(ValueError, match="has changed since it was wrapped"):
        hybrid.save_pretrained(into / "after", state_dict=split(hybrid, mesh), save_base=False)
