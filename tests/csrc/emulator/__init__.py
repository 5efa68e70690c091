"""The CUDA sources on the CPU: docs/kernels.md, "CUDA on the CPU"."""
