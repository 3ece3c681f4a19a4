"""A recursive block inside a frozen language model. Needs neither a GPU nor Triton to be imported.

Nothing heavy is imported before a name is asked for, or transformers is imported: with it the class is
registered.
"""

from typing import TYPE_CHECKING

from hybrid.lazy import names_of
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


__getattr__, __dir__ = names_of(__name__, _WHERE)

register_with_transformers()
