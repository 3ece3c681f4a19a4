"""The door: launches run or are kept, for the thread that asked and nobody else."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from trm_kernels.ops.add_rms_norm import add_rms_norm
from trm_kernels.runtime import tuning
from trm_kernels.runtime.launch import arch_of, is_recording, launch, record


class Kernel:
    """Stands for a kernel: keeps what it was started with."""

    def __init__(self):
        self.started = []

    def __getitem__(self, grid):
        return lambda *args, **meta: self.started.append((grid, args, meta))


def test_a_launch_starts_the_kernel():
    kernel, x = Kernel(), torch.zeros(4)
    launch(kernel, (3,), x, 7, BLOCK_M=2)
    assert kernel.started == [((3,), (x, 7), {"BLOCK_M": 2})]


def test_a_recorded_launch_does_not_start():
    kernel, x = Kernel(), torch.zeros(4)
    with record("sm90") as launches:
        assert is_recording()
        launch(kernel, (3,), x, 7, BLOCK_M=2)
    assert kernel.started == []
    (kept,) = launches
    assert (kept.kernel, kept.grid, kept.args, kept.meta) == (kernel, (3,), (x, 7), {"BLOCK_M": 2})


def test_a_grid_no_device_takes_is_caught():
    with pytest.raises(AssertionError, match="grid too large"):
        launch(Kernel(), (1, 70_000), torch.zeros(4))


def test_recording_ends_with_its_block_even_on_an_error():
    with record("sm80") as outer:
        with pytest.raises(KeyError), record("sm90"):
            assert arch_of(torch.zeros(1)) == "sm90"
            raise KeyError
        assert arch_of(torch.zeros(1)) == "sm80"
        launch(Kernel(), (1,), torch.zeros(1))
    assert len(outer) == 1
    assert not is_recording()
    assert arch_of(torch.zeros(1)) == "any"


def test_threads_do_not_mix():
    threads = 8
    together = Barrier(threads)

    def work(i: int) -> tuple[int, list[str]]:
        with record(f"sm{i}") as launches:
            archs = []
            for _ in range(50):
                together.wait(timeout=600)
                launch(Kernel(), (i,), torch.zeros(1))
                archs.append(arch_of(torch.zeros(1)))
            assert all(kept.grid == (i,) for kept in launches)
            return len(launches), archs

    with ThreadPoolExecutor(threads) as pool:
        for i, (kept, archs) in enumerate(pool.map(work, range(threads))):
            assert kept == 50
            assert set(archs) == {f"sm{i}"}
    assert not is_recording()


def test_meta_tensors_take_the_kernels_only_while_recorded():
    x, r = (torch.empty(2, 3, 64, device="meta") for _ in range(2))
    with record("sm90") as launches:
        assert add_rms_norm(x, r).shape == x.shape
    assert len(launches) == 1
    add_rms_norm(x, r)
    assert len(launches) == 1


def test_a_row_wider_than_the_table_is_named():
    x, r = (torch.empty(2, 20_000, device="meta") for _ in range(2))
    with (
        record("sm90"),
        pytest.raises(ValueError, match="add_rms_norm: expected a last axis of at most 16384"),
    ):
        add_rms_norm(x, r)


def test_an_arch_without_settings_takes_any():
    assert tuning.lookup("add_rms_norm", "sm12345", 64) == tuning.lookup("add_rms_norm", "any", 64)


def test_fresh_memory_is_nan_in_tests():
    assert torch.empty(64).isnan().all()
    assert torch.zeros(2).new_empty(64, dtype=torch.bfloat16).isnan().all()
