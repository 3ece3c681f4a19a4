"""FSDP2 on two processes: what one process computes, files that any number loads, nothing lost by a kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hybrid import HybridModel, presets
from hybrid.bases import KNOWN_BASES
from hybrid.info import on_meta
from hybrid.model.injection import Injection
from hybrid.model.injection_points import decoder_layers
from hybrid.training import checkpoints as run_state
from hybrid.training import shard
from hybrid.training.loop import train
from hybrid.training.phases import enter
from hybrid.training.settings import TrainSettings
from tests.support import forked, ranks, two_ranks, two_ranks_loading
from tests.support.tiny_text import TEXT, Counting, character_tokenizer, save_base, tiny_base, tiny_hybrid

ROOT = Path(__file__).parents[3]


def rows(items=40):
    return Counting(items)


def hybrid_in(phase, base):
    model = tiny_hybrid(LlamaForCausalLM.from_pretrained(base), num_cycles=2, blending_strategy="gated")
    enter(model, phase)
    return model


def settings(folder, batch_size, **changes):
    few = {"steps": 8, "learning_rate": 3e-3, "log_every": 1, "save_every": 2, "accumulate": 2}
    return TrainSettings(folder, batch_size=batch_size, **few | changes)


def two(folder, phase=1, checkpointing=False):
    return ranks.run(lambda: two_ranks.train_on_two(folder, phase, checkpointing))


def two_of_torchrun(folder, where, at):
    return torchrun("tests.support.two_ranks", folder, where, at)


def torchrun(module, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    return subprocess.run(
        [*command, module, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def numbers_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        [line.get("loss", 0), line.get("grad_norm", 0), *line.get("held_out", {}).values()] for line in lines
    ]


def assert_close(ours, others):
    assert len(ours) == len(others)
    for one, two in zip(ours, others, strict=True):
        assert one == pytest.approx(two, rel=1e-6, abs=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Beside `base`: `one`, the run that one process did."""
    folder = tmp_path_factory.mktemp("runs")
    save_base(folder / "base")
    train(hybrid_in(1, folder / "base"), rows(), settings(folder / "one", 2), {"new": rows(5)})
    return folder


@pytest.fixture(scope="module")
def ended(folder):
    """`two`: the same run by two processes, with checkpointing."""
    return two(folder / "two", checkpointing=True)


def test_two_processes_compute_what_one_does(folder, ended):
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_close(numbers_of(folder / "two"), numbers_of(folder / "one"))


def test_their_checkpoint_is_a_plain_folder(folder, ended):
    checkpoint = folder / "two" / "checkpoint-000008"
    model, one = (
        AutoModelForCausalLM.from_pretrained(path)
        for path in (checkpoint, folder / "one" / "checkpoint-000008")
    )
    assert isinstance(model, HybridModel)
    for ours, others in zip(model.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(ours, others, rtol=1e-3, atol=1e-5)
    files = {path.name for path in checkpoint.iterdir()}
    assert not [name for name in files if not name.endswith((".json", ".safetensors"))]
    base = load_file(checkpoint / "model-00001-of-00001.safetensors").keys()
    assert base == {name for name, _ in model.named_parameters() if "trm" in name}, "the TRM only"


def test_one_process_goes_on_from_two_and_two_from_one(folder, ended, tmp_path):
    def copy(name, step):
        target = folder / f"{name}-goes-on"
        target.mkdir()
        for path in ("run.json", "metrics.jsonl"):
            (target / path).write_bytes((folder / name / path).read_bytes())
        checkpoint = run_state.checkpoint_of(folder / name, step)
        (target / checkpoint.name).mkdir()
        for path in checkpoint.iterdir():
            (target / checkpoint.name / path.name).write_bytes(path.read_bytes())
        return target

    alone, together = copy("two", 6), copy("one", 6)
    train(hybrid_in(1, folder / "base"), rows(), settings(alone, 2), {"new": rows(5)}, resume=True)
    assert_close(numbers_of(alone), numbers_of(folder / "one"))
    again = two(together)
    assert again.returncode == 0, again.stderr[-3000:]
    assert_close(numbers_of(together), numbers_of(folder / "one"))


@pytest.mark.slow  # three launches of two processes
def test_a_killed_process_loses_nothing(folder):
    for where, at in (("step", 3), ("save", 2)):
        killed = two_of_torchrun(folder / "killed", where, at)
        assert killed.returncode != 0
        assert "SIGKILL" in killed.stderr
    assert run_state.latest(folder / "killed").name == "checkpoint-000002"
    ended = two(folder / "killed")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_close(numbers_of(folder / "killed"), numbers_of(folder / "one"))
    assert not list((folder / "killed").glob(".saving-*"))


def test_a_signal_to_one_process_ends_both_after_the_same_step(folder):
    told = two_of_torchrun(folder / "told", "told", at=3)
    assert told.returncode != 0
    assert "Signal 15 (SIGTERM) received" in told.stderr and "SIGKILL" not in told.stderr
    assert "SIGTERM after step 3, which is saved" in told.stdout
    assert run_state.latest(folder / "told").name == "checkpoint-000003"
    so_far = numbers_of(folder / "told")
    assert_close(so_far, numbers_of(folder / "one")[: len(so_far)])


def test_both_phases_split_and_the_whole_model_comes_out(folder, tmp_path):
    """Phase 2 trains everything: its checkpoint needs the base no more."""
    train(hybrid_in(2, folder / "base"), rows(), settings(folder / "one-2", 2, steps=3), {"new": rows(5)})
    ended = two(folder / "two-2", phase=2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    model = AutoModelForCausalLM.from_pretrained(folder / "two-2" / "checkpoint-000008")
    assert model.config.base_model_name_or_path is None
    assert_close(numbers_of(folder / "two-2")[:2], numbers_of(folder / "one-2")[:2])


def test_there_must_be_processes_to_split_among(folder, tmp_path):
    with pytest.raises(ValueError, match=r"processes to split the model among \(torchrun.*\), got one"):
        train(hybrid_in(1, folder / "base"), rows(), settings(tmp_path, 2, shard=True))


def test_one_process_reads_the_weights(tmp_path):
    """Also where embeddings are tied: the same losses and files as if every process had loaded them."""
    model = tiny_base(tie_word_embeddings=True).bfloat16()
    model.save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    for name in ("new.txt", "known.txt"):
        (tmp_path / name).write_text(TEXT[:600])
    ended = ranks.run(lambda: two_ranks_loading.load_and_train(tmp_path))
    assert ended.returncode == 0, ended.stderr[-3000:]
    for phase in ("1", "2", "hybrid"):
        assert numbers_of(tmp_path / f"first-{phase}") == numbers_of(tmp_path / f"all-{phase}")
        one, other = (run_state.checkpoint_of(tmp_path / f"{who}-{phase}", 3) for who in ("first", "all"))
        for file in one.glob("*.safetensors"):
            assert file.read_bytes() == (other / file.name).read_bytes()


def split_70b():
    """As the first of 64 processes; this one is a rank from then on."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (64,))
    config = presets.PresetConfigs.llama_2_70b_enterprise()
    model = on_meta(config, KNOWN_BASES["llama-2-70b"], dtype=torch.bfloat16)
    enter(model, 1)
    shard.shard(model, mesh)

    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    injections = [m for m in units if isinstance(m, Injection)]
    layers = list(decoder_layers(model.llm_model))
    assert len(injections) == 9 and all(isinstance(layer, FSDPModule) for layer in layers)
    assert len(units) == 9 + 80 + 1

    def group(unit):
        return unit._get_fsdp_state()._fsdp_param_group

    for unit in units:
        ours = [p.sharded_param for p in group(unit).fsdp_params]
        policy = unit._get_fsdp_state()._mp_policy
        assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
        kept = torch.float32 if unit in injections else torch.bfloat16
        assert {p.dtype for p in ours} == {kept} and {p.requires_grad for p in ours} == {unit in injections}
        if unit in injections:
            assert {id(p) for p in ours} == {id(p) for p in unit.parameters()}
    here = sum(shard.local(p).nbytes for p in model.parameters())
    everything = sum(p.nbytes for p in model.parameters())
    assert 1 <= here / (everything / 64) < 1.001, here
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    assert {p.dtype for p in optimizer.param_groups[0]["params"]} == {torch.float32}


def test_a_70b_is_split_without_weights():
    """On the meta device, for 64 processes: every TRM a unit of float32, the base frozen in bfloat16."""
    assert forked.run(split_70b) == 0
