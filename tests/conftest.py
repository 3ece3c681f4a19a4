"""What holds for every test: fresh memory is NaN, the backend is `auto`, the interpreter can be trusted."""

import gc
import os
import warnings

import pytest

# torch is imported where it is used: workers wait for the process that hands out tests, which needs none

gc.disable()  # what is imported stays


def pytest_sessionstart(session):
    """Triton's interpreter, in each process that runs tests: xdist's plugin is where they are handed out."""
    if session.config.pluginmanager.hasplugin("dsession"):
        return
    from trm_kernels.runtime.backend import interpreting

    if interpreting():
        from tests.support.interpreter import mend
        from tests.support.quick_interpreter import quicken

        mend()
        quicken()


def pytest_collection_finish():
    """From here on the garbage collector looks at what tests make, not at all that is imported each time."""
    gc.collect()
    gc.freeze()
    # a small model is thousands of objects: at the usual 700 a tenth of the time is the collector's
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


def pytest_collection_modifyitems(items):
    """The marker `kernels` skips a test where no kernel can run."""
    import torch

    from trm_kernels.runtime.backend import interpreting

    if interpreting() or torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("kernels"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device or TRITON_INTERPRET=1"))


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    """An output that a kernel forgot to write shows itself: `torch.empty` is filled in deterministic mode."""
    import torch

    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        # the fill is what is wanted of this mode, not advice on each op that has no deterministic form
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
        yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True, scope="session")
def _nothing_waits_for_the_disk():
    """No test cuts the power; those of the order in which files reach the disk put a spy of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _backend_is_auto():
    from trm_kernels.runtime.backend import backend

    with backend("auto"):
        yield
