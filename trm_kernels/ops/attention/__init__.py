"""Attention and rotary positions: our kernels, and libraries' beside them."""
