"""auto | triton | reference: which code runs an op. The decision is made here and nowhere else.

`auto` is Triton for tensors on a CUDA device and the reference elsewhere. `triton` is Triton or an
error that says why it cannot run. `reference` is eager PyTorch everywhere.

    with backend("reference"): ...     # for a block
    backend("reference")               # from here on

Like `torch.set_grad_enabled`, a choice holds for the thread (the context) that made it.
"""

import os
from contextvars import ContextVar, Token
from types import TracebackType

import torch
from torch import Tensor

from trm_kernels.runtime.constant import constant_result
from trm_kernels.runtime.launch import is_recording
from trm_kernels.runtime.optional_triton import HAS_TRITON

NAMES = ("auto", "triton", "reference")

_chosen: ContextVar[str] = ContextVar("trm_kernels_backend", default="auto")


class backend:  # noqa: N801  used like a function, as torch.no_grad is
    """Chooses the backend: a call sets it, a `with` block sets it and restores the one before.

    Args:
        name: "auto" for Triton on CUDA and the reference elsewhere; "triton" for kernels or an error;
            "reference" for eager PyTorch everywhere.

    Raises:
        ValueError: For an unknown name.
        RuntimeError: For "triton" where no kernel can run.
    """

    def __init__(self, name: str) -> None:
        if name not in NAMES:
            raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}.")
        if name == "triton" and not is_recording() and (why := _why_no_triton()):
            raise RuntimeError(f"backend: 'triton' cannot run here: {why}.")
        self.name = name
        self._before: Token[str] = _chosen.set(name)

    def __enter__(self) -> "backend":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _chosen.reset(self._before)


@constant_result
def current_backend() -> str:
    """The name chosen for this thread. A compiled graph keeps the one in force while it was traced."""
    return _chosen.get()


def describe(device: torch.device) -> str:
    """One line for a log: which code runs for tensors on `device`, and why."""
    name = current_backend()
    if name != "auto":
        return f"backend: {name} (asked for)"
    if device.type == "cuda":
        return "backend: triton (auto: a CUDA device)"
    why = f"computing on {device.type}" if torch.cuda.is_available() else "no CUDA device"
    return f"backend: reference (auto: {why})"


def runs_triton(op: str, *tensors: Tensor, has_kernel: bool = True, choice: str | None = None) -> bool:
    """Whether an op runs its Triton kernel on these tensors.

    Tensors on the "meta" device count as CUDA tensors while launches are recorded.

    Args:
        op: Its public name, for the error.
        tensors: Its inputs; the first one's device decides.
        has_kernel: False where these tensors have only a reference: "auto" takes it, "triton" is an error.
        choice: A backend to use instead of the one chosen for this thread.

    Raises:
        RuntimeError: When "triton" was asked for and cannot run.
    """
    name = choice or current_backend()
    device = tensors[0].device.type
    is_recorded = device == "meta" and is_recording()
    if name == "reference" or (name == "auto" and not (has_kernel and (device == "cuda" or is_recorded))):
        return False
    if not has_kernel:
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        raise RuntimeError(
            f"{op}: the backend 'triton' was asked for, and this op has no Triton kernel for {dtype} tensors."
        )
    if is_recorded and HAS_TRITON:
        return True
    if why := _why_no_triton():
        raise RuntimeError(f"{op}: Triton cannot run here: {why}. backend('reference') runs anywhere.")
    if device == "cuda" or (device == "cpu" and interpreting()):
        return True
    raise RuntimeError(f"{op}: the backend 'triton' expects CUDA tensors, got {device} tensors.")


@constant_result
def interpreting() -> bool:
    """Whether Triton's interpreter is on (TRITON_INTERPRET=1): kernels then run on CPU tensors, slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@constant_result
def _why_no_triton() -> str | None:
    if not HAS_TRITON:
        return "the package triton is not installed"
    if not torch.cuda.is_available() and not interpreting():
        return "PyTorch finds no CUDA device, and Triton's interpreter is off (TRITON_INTERPRET=1)"
    return None
