"""Cooperative launches: all programs of a grid at once, or none. Where one is impossible, and what then.

It is impossible on a device without support; where the driver refuses, as it refuses a grid larger than what
fits at once (under MPS a process may have only a part of the multiprocessors); and in a CUDA graph that is
captured before any call, since the barrier's counter has to lie outside of the graph's memory.

`"auto"` then launches the same kernel once a phase and warns, once a process and reason. A regime that was
asked for by name is an error instead.
"""

import ctypes
import sys
import warnings
from collections.abc import Callable
from functools import cache

import torch

from trm_kernels.runtime.launch import is_recording

_ATTRIBUTE = 95  # CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH
_REFUSALS = (  # what the driver calls its errors 720, 801 and 800
    "too many blocks in cooperative launch",
    "operation not supported",
    "operation not permitted",
)

_refused: dict[torch.device, str] = {}  # devices on which one was refused, and why: they are not asked again
_warned: set[str] = set()


class Impossible(RuntimeError):
    """A cooperative launch that did not happen: nothing ran."""


def cooperatively(device: torch.device, start: Callable[[], None]) -> None:
    """`start()`, which makes one cooperative launch on `device`. Errors: Impossible, with the reason."""
    if not _is_supported(device):
        raise Impossible(f"{device} does not support cooperative launches")
    if device in _refused:
        raise Impossible(_refused[device])
    try:
        start()
    except RuntimeError as error:
        says = str(error).removeprefix("Triton Error [CUDA]: ")
        if says not in _REFUSALS:
            raise
        _refused[device] = f"the driver refuses a cooperative launch on {device}: {says}"
        raise Impossible(_refused[device]) from error


def asked_for(why: Impossible) -> RuntimeError:
    """The error for a caller who named the regime."""
    return RuntimeError(
        f"trm_recursion: the regime 'one_launch' was asked for, and it cannot run: {why}. 'per_phase' runs "
        "the same kernel, launched once a phase; 'auto' takes that by itself."
    )


def warn(why: Impossible) -> None:
    """Warns, once a process and reason, which regime runs instead, and why."""
    if (text := str(why)) not in _warned:
        _warned.add(text)
        warnings.warn(
            f"trm_recursion: the regime 'one_launch' of the settings table cannot run: {text}. 'per_phase' "
            "runs in its place: the same kernel, launched once a phase.",
            stacklevel=2,
        )


def _is_supported(device: torch.device) -> bool:
    return device.type != "cuda" or is_recording() or _has_attribute(device.index)


@cache
def _has_attribute(index: int) -> bool:
    """Whether the driver reports support for its device of that number."""
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    device, value = ctypes.c_int(), ctypes.c_int()
    status = driver.cuDeviceGet(ctypes.byref(device), index) or driver.cuDeviceGetAttribute(
        ctypes.byref(value), _ATTRIBUTE, device
    )
    if status:
        raise RuntimeError(f"trm_recursion: the CUDA driver gave error {status} for device {index}.")
    return bool(value.value)
