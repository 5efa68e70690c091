"""Triton kernels: their values in the interpreter, and what they compile to."""
