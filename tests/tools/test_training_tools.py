"""docs/training-tools.md: every tool trains a hybrid on two processes, and all take the same steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybrid import HybridModel
from tests.support import tiny_text

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--config_file", EXAMPLES / "configs/two_processes.yaml"]


def launched(launch, tool, base, out, *more) -> str:
    """The line of losses."""
    command = [sys.executable, *launch, EXAMPLES / "training_tools.py", "--tool", tool, "--base", base]
    done = subprocess.run([*command, "--out", out, *more], capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr[-3000:]
    return next(line for line in done.stdout.splitlines() if line.startswith("losses"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(a base's folder, what one process prints)"""
    folder = tmp_path_factory.mktemp("tools")
    base = tiny_text.save_base(folder / "base")
    return base, launched([], "accelerate", base, folder / "alone")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launch, tool",
    [(TORCHRUN, "trainer"), (TORCHRUN, "ddp"), (TORCHRUN, "fsdp2"), (ACCELERATE, "accelerate")],
)
def test_two_processes_take_the_steps_of_one(launch, tool, alone, tmp_path):
    base, want = alone
    assert launched(launch, tool, base, tmp_path / "out") == want
    assert_is_trained(tmp_path / "out" / ("checkpoint-2" if tool == "trainer" else ""))


def assert_is_trained(folder):
    hybrid = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(hybrid, HybridModel)
    assert any(p.count_nonzero() for n, p in hybrid.named_parameters() if n.endswith("out_proj.weight"))


@pytest.fixture(scope="module")
def extensions(tmp_path_factory):
    """Where DeepSpeed compiles an operation, once: minutes on a busy machine."""
    return os.environ.get("TORCH_EXTENSIONS_DIR") or str(tmp_path_factory.mktemp("extensions"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(stage, alone, extensions, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed", reason="deepspeed is no dependency; pip install deepspeed==0.19.8")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", extensions)
    base, want = alone
    config = EXAMPLES / f"configs/deepspeed_zero{stage}.json"
    assert launched(TORCHRUN, "trainer", base, tmp_path / "out", "--deepspeed", config) == want
    assert_is_trained(tmp_path / "out" / "checkpoint-2")


def test_the_configs_are_the_ones_the_page_shows():
    page = (EXAMPLES.parent / "docs/training-tools.md").read_text(encoding="utf-8")
    for path in sorted((EXAMPLES / "configs").iterdir()):
        assert f"examples/configs/{path.name}" in page
    assert torch.__version__.partition("+")[0] in page
