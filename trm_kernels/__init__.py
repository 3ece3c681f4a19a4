"""Recursive blocks, fast: tensors in, tensors out. Needs neither a GPU nor Triton to be imported.

An op is imported when its name is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from trm_kernels.runtime.backend import backend  # now: its module has the same name

if TYPE_CHECKING:
    from trm_kernels.modules.curriculum import Depth, RecursionCurriculum
    from trm_kernels.modules.reference_trm import patch_reference_trm
    from trm_kernels.modules.trm import TRM
    from trm_kernels.ops.add_rms_norm import add_rms_norm
    from trm_kernels.ops.attention.decode_attention import decode_attention
    from trm_kernels.ops.attention.rope import rope, rope_angles
    from trm_kernels.ops.attention.rope_attention import rope_attention
    from trm_kernels.ops.injection_blend import injection_blend
    from trm_kernels.ops.injection_in import injection_in
    from trm_kernels.ops.linear_residual import linear_residual
    from trm_kernels.ops.linear_swiglu import linear_swiglu
    from trm_kernels.ops.norm_add import norm_add
    from trm_kernels.ops.rstd_from_squares import rstd_from_squares
    from trm_kernels.ops.swiglu_mlp import swiglu_mlp
    from trm_kernels.recursion.adaptive import Halting, adaptive_recursion
    from trm_kernels.recursion.injection import trm_injection
    from trm_kernels.recursion.recursion import trm_recursion

_WHERE = {
    "Depth": "trm_kernels.modules.curriculum",
    "Halting": "trm_kernels.recursion.adaptive",
    "RecursionCurriculum": "trm_kernels.modules.curriculum",
    "TRM": "trm_kernels.modules.trm",
    "adaptive_recursion": "trm_kernels.recursion.adaptive",
    "add_rms_norm": "trm_kernels.ops.add_rms_norm",
    "decode_attention": "trm_kernels.ops.attention.decode_attention",
    "injection_blend": "trm_kernels.ops.injection_blend",
    "injection_in": "trm_kernels.ops.injection_in",
    "linear_residual": "trm_kernels.ops.linear_residual",
    "linear_swiglu": "trm_kernels.ops.linear_swiglu",
    "norm_add": "trm_kernels.ops.norm_add",
    "patch_reference_trm": "trm_kernels.modules.reference_trm",
    "rope": "trm_kernels.ops.attention.rope",
    "rope_angles": "trm_kernels.ops.attention.rope",
    "rope_attention": "trm_kernels.ops.attention.rope_attention",
    "rstd_from_squares": "trm_kernels.ops.rstd_from_squares",
    "swiglu_mlp": "trm_kernels.ops.swiglu_mlp",
    "trm_injection": "trm_kernels.recursion.injection",
    "trm_recursion": "trm_kernels.recursion.recursion",
}

__all__ = [
    "TRM",
    "Depth",
    "Halting",
    "RecursionCurriculum",
    "adaptive_recursion",
    "add_rms_norm",
    "backend",
    "decode_attention",
    "injection_blend",
    "injection_in",
    "linear_residual",
    "linear_swiglu",
    "norm_add",
    "patch_reference_trm",
    "rope",
    "rope_angles",
    "rope_attention",
    "rstd_from_squares",
    "swiglu_mlp",
    "trm_injection",
    "trm_recursion",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
