"""The interpreter computes what a GPU would, once its traps are mended."""

import pytest
import torch

from trm_kernels.backend import interpreting

if not interpreting():
    pytest.skip("Triton's interpreter is off: TRITON_INTERPRET=1 turns it on", allow_module_level=True)

import triton

from tests.interpreter import FOUND, TRAPS, _sum_kernel


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_no_trap_is_left(trap):
    assert trap.is_right()


def test_mends_answer_to_traps():
    """Without the mends these answers were wrong; where a Triton gets one right, its mend stays out."""
    if not triton.__version__.startswith("3.7."):
        pytest.skip(f"the traps of Triton 3.7 are known, this is {triton.__version__}: found {FOUND}")
    assert FOUND == ["rounding to bfloat16", "bfloat16 arithmetic", "bfloat16 dot", "bfloat16 sum"]


def test_float32_is_left_alone():
    x = torch.randn(16, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(1)
    _sum_kernel[(1,)](x, out, N=16)
    assert out.item() == pytest.approx(x.sum().item(), rel=1e-6)
