"""From files and data sets to rows of tokens."""

from typing import TYPE_CHECKING

from hybrid.lazy import names_of

if TYPE_CHECKING:
    from hybrid.data.blocks import TokenBlocks
    from hybrid.data.sources import Sources, documents
    from hybrid.data.stream import TokenStream

_WHERE = {
    "Sources": "hybrid.data.sources",
    "TokenBlocks": "hybrid.data.blocks",
    "TokenStream": "hybrid.data.stream",
    "documents": "hybrid.data.sources",
}

__all__ = ["Sources", "TokenBlocks", "TokenStream", "documents"]

__getattr__, __dir__ = names_of(__name__, _WHERE)
