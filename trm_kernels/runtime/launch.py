"""The one door to the device: every kernel launch passes through `launch`.

`record()` keeps launches instead of running them. On tensors of the "meta" device this shows, without a GPU,
which kernels an op would start, on what grid and with which arguments.

A launcher (the function of an op file that allocates and launches) becomes visible to `torch.compile`
and `torch.export` by `@launcher`. The custom op it turns into needs a fake: a function from shapes to
shapes. A launcher whose launches are kept and thrown away is just that, so it is its own fake.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, is_dataclass
from functools import partial, wraps
from typing import Any, get_type_hints

import torch
from torch import Tensor

from trm_kernels.runtime.constant import constant_result

_GRID_LIMITS = (2**31 - 1, 2**16 - 1, 2**16 - 1)  # programs along each axis, the same on every CUDA device


@dataclass(frozen=True)
class Launch:
    """What one kernel launch was asked for."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


@dataclass(frozen=True)
class _RecordedLaunches:
    arch: str | None
    launches: list[Launch] = field(default_factory=list)


_recording: ContextVar[_RecordedLaunches | None] = ContextVar("trm_kernels_recording", default=None)

LAUNCHERS: dict[str, Callable[..., Any]] = {}  # what each custom op runs, by the op's name


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Starts a kernel on the device of its tensors, or keeps the launch while recording.

    Args:
        kernel: A function with `triton.jit`.
        grid: Programs along each axis.
        args: The kernel's arguments; at least one tensor, or Triton's descriptor of one.
        meta: Its constants, and Triton's options.
    """
    recording = _recording.get()
    if recording is not None:
        recording.launches.append(Launch(kernel, grid, args, meta))
        return
    assert all(n <= limit for n, limit in zip(grid, _GRID_LIMITS, strict=False)), f"grid too large: {grid}"
    device = next(tensors_of(args)).device
    # Triton starts kernels on the current device, which need not be the one that holds the tensors
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **meta)


def tensors_of(args: tuple[Any, ...]) -> Iterator[Tensor]:
    """The tensors among a launch's arguments, those that a descriptor stands for included."""
    return (t for t in (getattr(a, "base", a) for a in args) if isinstance(t, Tensor))


@contextmanager
def record(arch: str | None = None) -> Iterator[list[Launch]]:
    """Keeps launches instead of running them, for the thread (the context) that entered.

    Args:
        arch: Settings are chosen as if the tensors were on it, such as "sm90". None: by each tensor's device.

    Yields:
        The launches, in order.
    """
    recording = _RecordedLaunches(arch)
    token = _recording.set(recording)
    try:
        yield recording.launches
    finally:
        _recording.reset(token)


@constant_result
def is_recording() -> bool:
    """Whether launches are being kept instead of run."""
    return _recording.get() is not None


def arch_of(t: Tensor) -> str:
    """The name under which `tuning` knows the device of `t`: "sm90", or "any" where it is no GPU."""
    return _recorded_arch() or ("any" if t.device.type != "cuda" else _arch_of_device(t.device.index))


@constant_result
def _recorded_arch() -> str | None:
    recording = _recording.get()
    return None if recording is None else recording.arch


@constant_result
def _arch_of_device(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm{major}{minor}"


def launcher(
    function: Callable[..., Any] | None = None, *, mutates_args: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """Register a launcher as the custom op `trm_kernels::<its name>`.

    Every parameter and the result need annotations, from which PyTorch reads the op's schema. A schema has
    neither dataclasses nor named tuples: a parameter that is one becomes its fields there, and theirs. Who
    calls the op passes the fields, and the launcher is given the whole again.

    Args:
        function: Allocates and launches.
        mutates_args: The parameters, or fields, that it writes to: tensors, or lists of them.
    """
    if function is None:
        return partial(launcher, mutates_args=mutates_args)
    function = _with_fields(function)

    def fake(*args: Any, **kwargs: Any) -> Any:
        with nullcontext() if is_recording() else record():
            return function(*args, **kwargs)

    name = function.__name__.lstrip("_")
    LAUNCHERS[name] = function
    op = torch.library.custom_op(f"trm_kernels::{name}", function, mutates_args=mutates_args)
    op.register_fake(fake)
    return op


def _with_fields(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the fields of its dataclasses and named tuples as parameters, in their place."""
    signature = inspect.signature(function)
    kinds = [p.annotation for p in signature.parameters.values()]
    if not any(map(_field_types, kinds)):
        return function
    flat_parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
        for parameter in signature.parameters.values()
        for name, kind in _leaves(parameter.name, parameter.annotation)
    ]
    flat_signature = signature.replace(parameters=flat_parameters)

    @wraps(function)
    def flat(*args: Any, **kwargs: Any) -> Any:
        values = iter(flat_signature.bind(*args, **kwargs).args)
        return function(*(_build(kind, values) for kind in kinds))

    flat.__signature__ = flat_signature  # type: ignore[attr-defined]
    return flat


def _field_types(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass or a named tuple and their types; none of anything else."""
    return get_type_hints(kind) if is_dataclass(kind) or hasattr(kind, "_fields") else {}


def _leaves(name: str, kind: Any) -> Iterator[tuple[str, Any]]:
    """(name, type) of what a value of this type is made of, down to tensors, numbers, strings and lists."""
    if not (fields := _field_types(kind)):
        yield name, kind
    for field_name, field_kind in fields.items():
        yield from _leaves(field_name, field_kind)


def _build(kind: Any, values: Iterator[Any]) -> Any:
    """A value of this type, made of its leaves, in order."""
    fields = _field_types(kind)
    return kind(*(_build(field_kind, values) for field_kind in fields.values())) if fields else next(values)
