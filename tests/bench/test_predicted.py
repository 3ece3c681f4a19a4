"""The gate over what is predicted from machine code: it passes, and it fails when a kernel gets slower."""

from dataclasses import replace

import pytest
import triton

from bench import static
from bench.__main__ import main
from bench.measure import cycles, predicted
from bench.measure.cycles import Cycles, KernelCost, blocks_together
from bench.peers.workloads import WORKLOADS
from trm_kernels.export.compile import Compiled
from trm_kernels.export.machine_code import loops, parsed
from trm_kernels.runtime import tuning
from trm_kernels.runtime.backend import interpreting

pytestmark = pytest.mark.skipif(interpreting(), reason="compiles, which needs no interpreter")

RECORD = static.load("cost")


def of_record(workload: str) -> list[str]:
    """What differs from the record."""
    new = predicted.figures(predicted.compare(predicted.RECORDED_CARD, [workload]))
    return static.changes(RECORD["rows"][workload], new["rows"][workload], workload)


# they start what others do, with other rows and settings, which test_aot.py compares
BY_NIGHT = ("W3", "W4-16", "W6-1")


@pytest.mark.parametrize(
    "workload",
    [pytest.param(w.name, marks=pytest.mark.slow if w.name in BY_NIGHT else ()) for w in WORKLOADS],
)
def test_no_kernel_is_predicted_slower(workload):
    if RECORD["triton"] != triton.__version__:
        pytest.skip(f"on record are the kernels of Triton {RECORD['triton']}, this is {triton.__version__}")
    found = of_record(workload)
    assert not found, "\n".join([*found, "If this is meant: `make cost` writes the file anew."])


def test_a_slower_kernel_is_seen(monkeypatch):
    """The blend with tiles of 32 columns: the rows of y are read again for each."""
    row, rows = tuning.gemm("injection_blend", "sm90", 2, True), tuning._GEMMS["injection_blend"]["sm90"]
    slow = tuning.GemmLaunch(2, row.BLOCK_M, BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=2)
    monkeypatch.setitem(tuning._GEMMS["injection_blend"], "sm90", (slow, *rows))
    found = of_record("W5")
    assert any(line.startswith("W5, a step") and line.endswith("WORSE") for line in found), found


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR20], R24 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR12], R24, gsb0 ;
        /*0040*/                   MUFU.EX2 R3, R4 ;
        /*0050*/              @P0  BRA 0x10 ;
        /*0060*/                   LDSM.16.M88.4 R4, [R6] ;
        /*0070*/                   STS [R6], R4 ;
        /*0080*/                   EXIT ;
"""


def a_kernel(**fields: int) -> Compiled:
    sizes = {"registers": 128, "stack": 0, "shared": 96 << 10, "num_warps": 8} | fields
    return Compiled("k", "sm90", signature=(), cubin=b"", **sizes)


def test_instructions_count_for_their_units(monkeypatch):
    """Two warpgroups: 64 x 64 x 16 takes 32 cycles each, 64 x 128 x 16 twice as many, by NVIDIA's peak."""
    monkeypatch.setattr(cycles, "instructions", lambda cubin: parsed(LISTING))
    assert loops(parsed(LISTING)) == [range(1, 6)]
    cost = cycles.kernel_cost(a_kernel(), 3)
    # of shared memory: 8 copies of 512 bytes; two factors of 2 KB; one of 4 KB, the other is in registers
    assert cost.loop == Cycles(tensor=2 * (32 + 64), shared=8 * 4 + 2 * (32 + 32), issue=5 * 2, special=8 * 2)
    assert cost.rest == Cycles(tensor=0, shared=8 * (4 + 1), issue=4 * 2, special=0)
    assert cost.waits, "products and exponentials in one loop"


BY_DESCRIPTORS = """
        /*0000*/                   UTMALDG.2D [UR8], [UR4], desc[UR6] ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR20], R24 ;
        /*0020*/               @P0 BRA 0x60 ;
        /*0030*/               @P1 BRA 0x0 ;
        /*0040*/                   UTMASTG.2D [UR4], [UR8] ;
        /*0050*/                   EXIT ;
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R2 ;
        /*0070*/               @P0 BRA 0x60 ;
        /*0080*/                   BRA 0x10 ;
"""


def test_a_descriptors_copy_counts_once_for_all_warps(monkeypatch):
    """And a wait that stands at the kernel's end, and jumps back from there, is not in the loop."""
    monkeypatch.setattr(cycles, "instructions", lambda cubin: parsed(BY_DESCRIPTORS))
    tiles = "tensordesc<bf16[128, 64]>", "tensordesc<bf16[64, 64]>", "tensordesc<bf16[128, 32]>"
    cost = cycles.kernel_cost(replace(a_kernel(), signature=tiles), 3)
    copied = (128 + 64) / 2 * 64 * 2 / 128  # the mean of both factors
    assert cost.loop == Cycles(tensor=2 * 32, shared=copied + 2 * 32, issue=0.25 + 3 * 2, special=0)
    assert cost.rest.shared == copied


@pytest.mark.parametrize(
    ("fields", "blocks"),
    [
        ({}, 2),
        ({"registers": 129}, 1),  # given out in eights: 136 x 256 threads are more than half of 65536
        ({"shared": 114 << 10}, 1),  # with the kilobyte that the system takes
        ({"registers": 32, "shared": 0}, 8),  # 64 warps
    ],
)
def test_blocks_share_a_multiprocessor_as_far_as_they_fit(fields, blocks):
    assert blocks_together(a_kernel(**fields)) == blocks


def test_a_grid_takes_full_waves_and_a_last_one():
    cost = KernelCost(Cycles(100, 0, 0, 0), Cycles(0, 0, 50, 0), waits=False, blocks=2, stages=9)
    alone = 2 * cycles.LATENCY + 10 * 100 / cycles.REACHED + 50
    assert cost.of_blocks(1, 10) == alone
    assert cost.of_blocks(2, 100) == 2 * 100 * 100 / cycles.REACHED
    assert cost.of_grid(4, 10, 4) == alone
    assert cost.of_grid(8 + 8 + 4, 10, 4) == 2 * cost.of_blocks(2, 10) + alone


def test_few_programs_wait_for_memory():
    """A lone block cannot go around faster than its loads come, so many at a time as it has stages."""
    cost = KernelCost(Cycles(1, 1, 1, 0), Cycles(0, 0, 0, 0), waits=False, blocks=1, stages=3)
    assert cost.of_blocks(1, 10) == 2 * cycles.LATENCY + 10 * cycles.LATENCY / 2


def test_the_command_says_what_is_predicted(monkeypatch, capsys):
    monkeypatch.setattr(predicted, "WORKLOADS", [w for w in WORKLOADS if w.name == "W5"])
    old = static.load("cost") | {"rows": {"W5": {"a step": 1.0}}}
    monkeypatch.setattr(static, "load", lambda name: old)
    assert main(["static", "--cost", "--check"]) == 1
    printed = capsys.readouterr().out
    assert "W5 on h200, predicted: " in printed and "times as fast" in printed
    assert "loses most: _injection_blend_fwd_kernel" in printed
    assert "cost, W5, a step: 1.0 -> " in printed
