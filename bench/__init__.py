"""How fast, how precise and how large, beside others: measured, counted, and put on record."""
