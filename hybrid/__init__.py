"""A recursive block inside a frozen language model. Needs neither a GPU nor Triton to be imported.

Nothing heavy is imported before a name is asked for, or transformers is imported: with it the class is
registered.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hybrid.registration import register_with_transformers

if TYPE_CHECKING:
    from hybrid.config import HybridConfig
    from hybrid.model.halting import Halting, StepRecord, TokenHalting, record_steps
    from hybrid.model.hybrid_model import CombinedTRMLLM, HybridModel
    from hybrid.presets import PresetConfigs

_WHERE = {
    "CombinedTRMLLM": "hybrid.model.hybrid_model",
    "Halting": "hybrid.model.halting",
    "HybridConfig": "hybrid.config",
    "HybridModel": "hybrid.model.hybrid_model",
    "PresetConfigs": "hybrid.presets",
    "StepRecord": "hybrid.model.halting",
    "TokenHalting": "hybrid.model.halting",
    "record_steps": "hybrid.model.halting",
}

__all__ = [
    "CombinedTRMLLM",
    "Halting",
    "HybridConfig",
    "HybridModel",
    "PresetConfigs",
    "StepRecord",
    "TokenHalting",
    "record_steps",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
