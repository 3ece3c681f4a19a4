"""The interpreter computes what a GPU would, once its traps are mended."""

import pytest
import torch

from trm_kernels.runtime.backend import interpreting

if not interpreting():
    pytest.skip("Triton's interpreter is off: TRITON_INTERPRET=1 turns it on", allow_module_level=True)

import triton

from tests.support.interpreter import FOUND, TRAPS, _sum_kernel

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_no_trap_is_left(trap):
    assert trap.is_right()


def test_mends_answer_to_traps():
    """Without the mends these answers were wrong; where a Triton gets one right, its mend stays out."""
    release = ".".join(triton.__version__.split(".")[:2])
    bfloat16 = [
        "rounding to bfloat16",
        "bfloat16 arithmetic",
        "bfloat16 dot",
        "whole numbers to bfloat16",
        "bfloat16 sum",
    ]
    known = {"3.6": ["loop bounds", *bfloat16], "3.7": bfloat16, "3.9": bfloat16}
    if release not in known:
        pytest.skip(f"nobody has looked at Triton {release} yet; found here: {FOUND}")
    assert known[release] == FOUND


def test_float32_is_left_alone():
    x = torch.randn(16, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(1)
    _sum_kernel[(1,)](x, out, N=16)
    assert out.item() == pytest.approx(x.sum().item(), rel=1e-6)
