"""Mark a function whose result torch.compile may take for a constant."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant_result(function: F) -> F:
    """As torch.compiler.assume_constant_result does; that imports torch._dynamo, two seconds of CPU time."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
