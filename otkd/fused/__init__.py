"""Kernels that keep intermediate results on the chip instead of writing them to memory."""
