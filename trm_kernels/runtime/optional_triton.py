"""Triton where it is installed; elsewhere names that let the op files be imported, and nothing more.

`import trm_kernels` has to work on a machine without Triton. An op file needs three things from
Triton while it is being imported: the decorator `triton.jit`, attributes of `tl` in annotations, and
the modules' names. Whether a kernel may run is not decided here but in `backend.py`.
"""

from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Absent:
        """Stands for a module that is not installed: so are its attributes, and `jit` keeps the function."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, function: Any = None, **_: Any) -> Any:
            return self if function is None else function

    triton = tl = _Absent()

__all__ = ["HAS_TRITON", "tl", "triton"]
