"""HybridModel: injection points inside a frozen language model, their cache, masks and halting."""

from typing import TYPE_CHECKING

from hybrid.lazy import names_of

if TYPE_CHECKING:
    from hybrid.model.hybrid_model import CombinedTRMLLM, HybridModel

_WHERE = {
    "CombinedTRMLLM": "hybrid.model.hybrid_model",
    "HybridModel": "hybrid.model.hybrid_model",
}

__all__ = ["CombinedTRMLLM", "HybridModel"]

__getattr__, __dir__ = names_of(__name__, _WHERE)
