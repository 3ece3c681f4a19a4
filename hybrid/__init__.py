"""A recursive block inside a frozen language model. Needs neither a GPU nor Triton to be imported."""

from hybrid.config import HybridConfig
from hybrid.halting import Halting, StepRecord, TokenHalting, record_steps
from hybrid.model import CombinedTRMLLM, HybridModel
from hybrid.presets import PresetConfigs

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
