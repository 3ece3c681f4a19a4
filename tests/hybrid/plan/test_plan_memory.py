"""The planner's bytes are those that a real step allocates: in both phases, on one rank and on two."""

import json
import os

import pytest
import torch

from tests.support import ranks
from tests.support.real_training import CASES, Bytes, as_rank, measured, planned, run_of
from trm_kernels.runtime.backend import interpreting

TOLERANCE = 0.02
pytestmark = pytest.mark.skipif(interpreting(), reason="the reference runs, which needs no interpreter")


def compare(plan, real):
    for what, predicted, found in zip(plan._fields, plan, real, strict=True):
        assert predicted == pytest.approx(found, rel=TOLERANCE), (what, predicted, found)


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_one_rank(name, phase):
    run = run_of(name, phase, shards=0)
    compare(planned(run), measured(run))


def test_adapters_are_counted_as_peft_makes_them():
    run = run_of("llama", phase=2, shards=0, lora=4)
    compare(planned(run), measured(run))


def test_stochastic_rounding_keeps_what_is_planned():
    pytest.importorskip("torchao.optim", reason="torchao is not installed")
    run = run_of("llama", phase=2, shards=0)
    assert run.dtype == "bfloat16"
    with torch.compiler.set_stance("force_eager"):  # what is kept is the same without compiling
        compare(planned(run), measured(run, stochastic_rounding=True))


def two_ranks(folder, names):
    """What each of two processes measured, which divide everything between them (FSDP2 over gloo)."""

    def measure():
        rank = int(os.environ["RANK"])
        (folder / f"{rank}.json").write_text(json.dumps(as_rank(rank, ranks.COUNT, folder, names)))

    ended = ranks.run(measure)
    assert ended.returncode == 0, ended.stderr[-3000:]
    measured_by = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks.COUNT))
    return [{name: Bytes(*figures) for name, figures in found.items()} for found in measured_by]


SOME = ("qwen3, checkpointing",)


@pytest.mark.parametrize(
    "names", [SOME, pytest.param(tuple(CASES), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_two_ranks(names, tmp_path):
    """All cases by night in one test: the processes start once, however tests are divided among workers."""
    for found in two_ranks(tmp_path, names):
        for name in names:
            for phase in (1, 2):
                compare(planned(run_of(name, phase, shards=2)), found[f"{name}, {phase}"])


def test_float32_weights_on_one_rank_are_gathered_in_bfloat16(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        run = run_of("llama", phase=2, shards=1)
        assert run.is_wrapped and run.dtype == "float32"
        compare(planned(run), measured(run))
    finally:
        torch.distributed.destroy_process_group()
