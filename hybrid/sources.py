"""What `hybrid.data` has of sources, under the name that it had before."""

from hybrid.data.sources import Sources, documents

__all__ = ["Sources", "documents"]
