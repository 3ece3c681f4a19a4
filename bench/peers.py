"""Who is timed. A peer is a function from the name of an op to a callable, or None when it has no such op."""

from collections.abc import Callable
from typing import Any

from trm_kernels.backend import backend
from trm_kernels.cases import CASES

Op = Callable[..., Any]
_CASES = {case.name: case for case in CASES}


def eager(name: str) -> Op | None:
    """The reference: eager PyTorch, one kernel for each line of it."""
    return _CASES[name].ref


def ours(name: str) -> Op | None:
    """The Triton kernels, never the reference in their place."""

    def op(*tensors: Any) -> Any:
        with backend("triton"):
            return _CASES[name].op(*tensors)

    return op


PEERS: dict[str, Callable[[str], Op | None]] = {"eager": eager, "ours": ours}
NEEDS_A_GPU = frozenset({"ours"})
