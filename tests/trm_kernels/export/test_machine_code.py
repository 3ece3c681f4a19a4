"""What machine code says: barriers between wgmma and writes to shared memory, fences before wgmma."""

import pytest
import torch

from trm_kernels import linear_residual, rope_attention
from trm_kernels.export.compile import Compiled, compile_for
from trm_kernels.export.machine_code import copies_without_fence, parsed, unguarded_writes
from trm_kernels.runtime import tuning
from trm_kernels.runtime.launch import record

MULTIPLY = ["WARPGROUP.ARRIVE", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"]
WAIT, WAIT_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
BARRIER, WRITE, COPY = (
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "STS.128 [R7], R8",
    "LDGSTS.E.BYPASS.128 [R97], [R28.64]",
)
FENCE, END = "FENCE.VIEW.ASYNC.S", "EXIT"


def listing(*lines: str) -> str:
    """As cuobjdump prints it: 16 bytes an instruction."""
    return "".join(
        f"        /*{16 * i:04x}*/   {line} ;    /* 0x0000000c00fc6947 */\n" for i, line in enumerate(lines)
    )


@pytest.mark.parametrize(
    ("lines", "places"),
    [
        ([*MULTIPLY, WAIT, WRITE, END], [3]),
        ([*MULTIPLY, WAIT, BARRIER, WRITE, END], []),
        ([*MULTIPLY, BARRIER, WAIT, WRITE, END], [4]),  # others may still read behind that barrier
        ([*MULTIPLY, WAIT_BUT_ONE, BARRIER, COPY, WAIT, WRITE, END], [6]),
        ([*MULTIPLY, WAIT_BUT_ONE, BARRIER, COPY, WAIT, BARRIER, WRITE, END], []),
        ([WRITE, BARRIER, *MULTIPLY, WAIT, "@P0 BRA 0x0", END], [0]),  # in the next turn
        ([WRITE, BARRIER, *MULTIPLY, WAIT, "@!P0 BRA 0x70", BARRIER, WRITE, END], [7]),  # around the barrier
        ([WRITE, BARRIER, *MULTIPLY, WAIT, "BRA 0x80", WRITE, END, BARRIER, WRITE, END], []),
        ([WRITE, BARRIER, *MULTIPLY, WAIT, "BRA.U UP0, 0x80", WRITE, END, BARRIER, WRITE, END], [6]),
        ([WRITE, BARRIER, WRITE, END], []),
    ],
)
def test_a_write_behind_wgmma_needs_a_barrier(lines, places):
    assert unguarded_writes(parsed(listing(*lines))) == [16 * place for place in places]


def test_a_copy_that_wgmma_reads_needs_a_fence():
    assert copies_without_fence(parsed(listing(COPY, BARRIER, *MULTIPLY, WAIT, END)))
    assert not copies_without_fence(parsed(listing(COPY, BARRIER, FENCE, *MULTIPLY, WAIT, END)))
    assert not copies_without_fence(parsed(listing(WRITE, BARRIER, *MULTIPLY, WAIT, END)))


def compiled(op, *shapes, **settings) -> list[Compiled]:
    """The kernels of a call in bfloat16."""
    pytest.importorskip("triton")
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    with record("sm90") as launches:
        op(*tensors, **settings)
    return [compile_for(launch, "sm90") for launch in launches]


def test_a_product_of_two_warpgroups_has_its_barrier():
    (kernel,) = compiled(linear_residual, (2048, 512), (512, 512), (2048, 512), candidate="fused")
    assert kernel.num_warps == 8 and kernel.main_loop.instruction == "wgmma"
    assert kernel.unguarded_writes == 0 and not kernel.complaints(255)


def test_a_kernel_whose_writes_were_not_read_by_hand_is_refused():
    settings = {"positions": None, "num_heads": 8, "causal": True, "implementation": "triton"}
    rows = tuning.ATTENTION["rope_attention_fwd"]["sm90"]
    (of_two_warpgroups,) = (row for row in rows if row.num_warps == 8 and row.max_head_width == 64)
    with tuning.using("rope_attention_fwd", of_two_warpgroups):
        kernel = compiled(rope_attention, (2, 256, 1536), **settings)[-1]
    assert kernel.unguarded_writes and not kernel.complaints(255)
    renamed = Compiled(**{**vars(kernel), "name": "another"})
    assert any("that wgmma may still read" in complaint for complaint in renamed.complaints(255))
