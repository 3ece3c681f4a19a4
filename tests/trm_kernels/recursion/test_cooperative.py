"""Where a cooperative launch is impossible: "auto" goes per phase and says so once, a name is an error."""

import ctypes
import warnings
from types import SimpleNamespace

import pytest
import torch

from tests.trm_kernels.recursion.test_recursion import DEVICE, make
from trm_kernels import trm_recursion
from trm_kernels.recursion.one_launch import cooperative, grid_barrier, launchers
from trm_kernels.recursion.one_launch.cooperative import Impossible
from trm_kernels.recursion.one_launch.kernel import count_phases
from trm_kernels.runtime import tuning
from trm_kernels.runtime.backend import backend


class Calls:
    """A recursion that the settings table would have run in one launch."""

    def __init__(self, monkeypatch) -> None:
        monkeypatch.setattr(tuning, "_REGIME_CHOICES", {"any": (tuning.Regime("one_launch"),)})
        self.trm, self.refuses, self.cooperative, self.others = (
            make(num_layers=1, intermediate_size=48),
            None,
            0,
            0,
        )
        self.x = torch.randn(1, 2, 64, device=DEVICE)
        start = launchers.launch

        def launch(*args, **meta):
            if not meta.get("launch_cooperative_grid"):
                self.others += 1
            else:
                self.cooperative += 1
                if self.refuses:
                    raise RuntimeError(self.refuses)
            start(*args, **meta)

        monkeypatch.setattr(launchers, "launch", launch)

    @torch.no_grad()
    def run(self, regime: str) -> torch.Tensor:
        weights = [layer(self.x.dtype) for layer in self.trm.layers]
        state = self.x, self.x, self.x
        sizes = {"num_heads": self.trm.num_heads, "num_recursion_steps": 1}
        with backend("triton"):
            return trm_recursion(*state, weights, regime=regime, **sizes)[0]


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(cooperative, "_warned", set())
    monkeypatch.setattr(cooperative, "_refused", {})
    return Calls(monkeypatch)


def impossible_by(calls: Calls, monkeypatch, how: str) -> str:
    """Make it so, and tell what the message has to say."""
    if how == "the device":
        monkeypatch.setattr(cooperative, "_is_supported", lambda device: False)
        return f"{DEVICE}.* does not support cooperative launches"
    if how == "a captured graph":

        def capturing(device):
            raise Impossible("it expected a call before a CUDA graph is captured")

        monkeypatch.setattr(launchers, "counter_for", capturing)
        return "before a CUDA graph is captured"
    calls.refuses = "Triton Error [CUDA]: too many blocks in cooperative launch"
    return "the driver refuses .*: too many blocks in cooperative launch"


@pytest.mark.kernels
@pytest.mark.parametrize("how", ["the device", "the driver", "a captured graph"])
def test_auto_goes_per_phase_and_says_so_once(how, calls, monkeypatch):
    want, tries = calls.run("one_launch"), 1
    assert calls.cooperative == 1
    says = impossible_by(calls, monkeypatch, how)
    with pytest.warns(UserWarning, match=f"cannot run: .*{says}.*'per_phase' runs in its place"):
        assert torch.equal(calls.run("auto"), want), "the same kernel"
    assert calls.others == count_phases(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls.run("auto")
    tries += how == "the driver"
    assert calls.cooperative == tries, "a device that refused is not asked again"


@pytest.mark.kernels
@pytest.mark.parametrize("how", ["the device", "the driver", "a captured graph"])
def test_a_name_is_an_error_that_names_the_other_way(how, calls, monkeypatch):
    says = impossible_by(calls, monkeypatch, how)
    with pytest.raises(RuntimeError, match=f"'one_launch' was asked for, .*{says}.*'per_phase' runs"):
        calls.run("one_launch")
    assert not calls.others
    calls.run("per_phase")
    assert calls.others == count_phases(2)


@pytest.mark.kernels
def test_another_error_is_let_through_and_the_counter_is_zero_again(calls):
    counter = grid_barrier.counter_for(calls.x.device)
    counter.fill_(5)
    calls.refuses = "Triton Error [CUDA]: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        calls.run("auto")
    assert counter.item() == 0 and not calls.others


def test_the_driver_is_asked_for_the_attribute(monkeypatch):
    """CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH is 95; device 3 of four has the handle 13, and no support."""

    def get(device, index):
        device._obj.value = 10 + index
        return 0 if index < 4 else 101

    def attribute(value, number, device):
        value._obj.value = int(number == 95 and device.value != 13)
        return 0

    driver = SimpleNamespace(cuDeviceGet=get, cuDeviceGetAttribute=attribute)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    try:
        cooperative._has_attribute.cache_clear()
        assert cooperative._is_supported(torch.device("cuda", 2))
        assert not cooperative._is_supported(torch.device("cuda", 3))
        with pytest.raises(RuntimeError, match="error 101 for device 4"):
            cooperative._is_supported(torch.device("cuda", 4))
    finally:
        cooperative._has_attribute.cache_clear()


def test_the_first_call_of_all_cannot_be_captured(monkeypatch):
    monkeypatch.setattr(grid_barrier, "_counters", {})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(Impossible, match="expected a call before a CUDA graph is captured"):
        grid_barrier.counter_for(torch.device("cuda", 0))


def test_counters_are_zero_before_any_other_stream_counts(monkeypatch):
    waited = []
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: waited.append(True))
    monkeypatch.setattr(grid_barrier, "_counters", {})
    monkeypatch.setattr(grid_barrier.Counters, "__init__", lambda self, device: None)
    monkeypatch.setattr(grid_barrier.Counters, "take", lambda *_: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(2):
        grid_barrier.counter_for(torch.device("cuda", 0))
    assert waited == [True], "once, after they were made"
