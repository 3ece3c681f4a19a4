"""One decision, made in one place: which code runs an op."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from trm_kernels.ops.add_rms_norm import add_rms_norm, add_rms_norm_ref
from trm_kernels.runtime.backend import backend, current_backend, describe, interpreting, runs_triton

ROOT = Path(__file__).parents[3]
no_kernel_can_run = pytest.mark.skipif(
    torch.cuda.is_available() or interpreting(),
    reason="a kernel can run here: there is a GPU or the interpreter",
)


def run_python(code: str, **environment: str) -> str:
    """What a fresh Python prints, without the interpreter of Triton unless asked for."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="expected one of auto, triton, reference, got 'cuda'"):
        backend("cuda")
    assert current_backend() == "auto"


@no_kernel_can_run
def test_triton_without_a_device_says_why():
    with pytest.raises(RuntimeError, match="'triton' cannot run here: PyTorch finds no CUDA device"):
        backend("triton")
    assert current_backend() == "auto"


def test_a_block_restores_what_was_before():
    with backend("reference"):
        with backend("auto"):
            assert current_backend() == "auto"
        assert current_backend() == "reference"
        with pytest.raises(KeyError), backend("auto"):
            raise KeyError
        assert current_backend() == "reference"
    assert current_backend() == "auto"


def test_a_call_persists():
    backend("reference")
    assert current_backend() == "reference"


def test_threads_do_not_mix():
    threads = 8
    together = Barrier(threads)

    def work(i: int) -> set[str]:
        name = ("auto", "reference")[i % 2]
        seen = set()
        for _ in range(50):
            with backend(name):
                together.wait(timeout=600)
                seen.add(current_backend())
        return seen

    with ThreadPoolExecutor(threads) as pool:
        for i, seen in enumerate(pool.map(work, range(threads))):
            assert seen == {("auto", "reference")[i % 2]}


def test_a_log_line_says_which_and_why(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    with backend("reference"):
        assert describe(cuda) == "backend: reference (asked for)"
    assert describe(cuda) == "backend: triton (auto: a CUDA device)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert describe(cpu) == "backend: reference (auto: no CUDA device)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert describe(cpu) == "backend: reference (auto: computing on cpu)"


def test_auto_on_cpu_tensors_is_the_reference():
    x, r = (torch.randn(3, 40, requires_grad=True) for _ in range(2))
    assert not runs_triton("add_rms_norm", x, r)
    y = add_rms_norm(x, r)
    assert torch.equal(y, add_rms_norm_ref(x, r))
    assert "AddRMSNorm" not in type(y.grad_fn).__name__


@pytest.mark.kernels
@pytest.mark.skipif(not (torch.cuda.is_available() or interpreting()), reason="no kernel can run here")
def test_triton_is_an_error_where_there_is_no_kernel():
    x = torch.zeros(2, 4, dtype=torch.float64)
    with backend("triton"), pytest.raises(RuntimeError, match="no Triton kernel for float64 tensors"):
        add_rms_norm(x, x)


@pytest.mark.kernels
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_is_an_error_for_tensors_off_the_device():
    with backend("triton"), pytest.raises(RuntimeError, match="expects CUDA tensors, got cpu tensors"):
        add_rms_norm(torch.zeros(2, 4), torch.zeros(2, 4))


@pytest.mark.kernels
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_on_cuda_tensors_is_triton():
    x = torch.zeros(2, 4, device="cuda")
    assert runs_triton("add_rms_norm", x)
    assert not runs_triton("add_rms_norm", x, has_kernel=False)


def test_importing_needs_no_triton():
    said = run_python(
        """
import sys
sys.modules["triton"] = None  # import triton now fails as if it were not installed
import torch, trm_kernels, trm_kernels.testing.cases, trm_kernels.export.check
x = torch.ones(2, 4)
assert trm_kernels.add_rms_norm(x, x).shape == (2, 4)
try:
    trm_kernels.backend("triton")
except RuntimeError as error:
    print(error)
"""
    )
    assert said == "backend: 'triton' cannot run here: the package triton is not installed."


def test_importing_touches_no_gpu():
    said = run_python(
        "import torch, trm_kernels, trm_kernels.testing.cases; print(torch.cuda.is_initialized())",
        CUDA_VISIBLE_DEVICES="",
    )
    assert said == "False"
