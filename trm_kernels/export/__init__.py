"""Kernels compiled ahead of time, with or without a GPU, and C source made of them."""
