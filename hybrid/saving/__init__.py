"""A hybrid on disk, where its base came from, and how both are loaded again."""
