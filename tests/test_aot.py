"""Every kernel compiles for every GPU and keeps within its limits; every op starts the kernels it should."""

import json

import pytest
import torch

from trm_kernels import aot
from trm_kernels.aot import SHARED_LIMIT, compile_for, launches_of
from trm_kernels.backend import interpreting
from trm_kernels.cases import CASES
from trm_kernels.launch import Launch, record
from trm_kernels.ops.add_rms_norm import _add_rms_norm_fwd_kernel

if interpreting():
    pytest.skip("the interpreter does not compile", allow_module_level=True)

ARCHS = ("sm80", "sm89", "sm90")
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@EACH
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_keep_within_their_limits(case, arch):
    jobs = [(shape, dtype) for shape in case.bench for dtype in case.dtypes]
    jobs += [(shape, torch.bfloat16) for shape in case.shapes]
    for shape, dtype in jobs:
        for call in launches_of(case, shape, dtype, arch):
            kernel = compile_for(call, arch)
            complaints = kernel.complaints(case.max_registers)
            assert not complaints, f"{kernel.name} at {shape}, {dtype}, {arch} {' and '.join(complaints)}"
            assert kernel.registers > 0
            assert kernel.shared <= SHARED_LIMIT[arch]


@EACH
def test_ops_start_the_kernels_they_should(case):
    inputs = [t.detach().to("meta") for t in case.inputs(case.shapes[0], torch.float32, 0)]
    with record("sm90") as launches:
        case.op(*inputs)
    assert len(launches) == case.launches
    assert len(launches_of(case, case.shapes[0], torch.float32, "sm90")) == case.launches_with_gradient


def forward_launch(rows: int, stride: int = 1008, **meta: int) -> Launch:
    x, rstd = torch.empty(rows, stride, device="meta"), torch.empty(rows, device="meta")
    sizes = {"D": 1000, "BLOCK_M": 1, "BLOCK_D": 1024, "num_warps": 4, "num_stages": 1} | meta
    return Launch(_add_rms_norm_fwd_kernel, (1,), (x, x, x, rstd, rows, stride, stride, stride, 1e-5), sizes)


def test_a_spill_is_seen():
    kernel = compile_for(forward_launch(64, BLOCK_M=16, num_warps=1), "sm80")
    assert kernel.stack > 0
    assert any("on the stack" in text for text in kernel.complaints(255))


def test_registers_and_shared_memory_have_limits():
    kernel = compile_for(forward_launch(64), "sm90")
    assert kernel.complaints(255) == []
    assert kernel.complaints(8) == [f"takes {kernel.registers} registers of 8"]
    too_much = aot.Compiled("k", "sm89", 32, 0, 100 * 1024, 4, (), b"")
    assert too_much.complaints(255) == ["takes 102400 bytes of shared memory of 101376"]


def test_arguments_are_typed_as_triton_types_them():
    """None, the number 1 and `tl.constexpr` are compiled in; a number beyond 2^31 is 64 bits wide."""
    plain = compile_for(forward_launch(64), "sm90").signature
    assert plain == (*["*fp32"] * 4, *["i32"] * 4, "fp32", *["constexpr"] * 3)
    assert compile_for(forward_launch(1), "sm90").signature[4] == "constexpr"
    assert compile_for(forward_launch(64, stride=2**31), "sm90").signature[5] == "i64"


def test_the_command_prints_a_table_and_writes_the_kernels(monkeypatch, capsys, tmp_path):
    (case, *_) = CASES
    small = type(case)(**{**vars(case), "bench": ((64, 512),), "dtypes": (torch.bfloat16,)})
    monkeypatch.setattr(aot, "CASES", (small,))
    assert aot.main(["--arch", "80", "90", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("_add_rms_norm_bwd_kernel") == 2
    assert "every kernel keeps within its limits" in printed

    facts = json.loads((tmp_path / "sm90" / "add_rms_norm_fwd_kernel-64x512-bfloat16.json").read_text())
    assert facts["name"] == "_add_rms_norm_fwd_kernel"
    assert facts["signature"][0] == "*bf16"
    assert (tmp_path / "sm90" / "add_rms_norm_fwd_kernel-64x512-bfloat16.cubin").read_bytes()[
        :4
    ] == b"\x7fELF"

    monkeypatch.setattr(aot, "CASES", (type(case)(**{**vars(small), "max_registers": 8}),))
    assert aot.main(["--arch", "80"]) == 1
    assert "2 kernels outside their limits" in capsys.readouterr().out


def test_an_unknown_gpu_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        aot.main(["--arch", "42"])
    assert stop.value.code == 2
    assert "invalid choice: 42" in capsys.readouterr().err
