"""Modules with weights: TRM, and the TRM paper's own model with the fused recursion inside."""
