"""The recursion, or a whole injection point, in one cooperative launch."""
