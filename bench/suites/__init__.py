"""`pytest bench`: pytest-benchmark's."""
