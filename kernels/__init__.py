"""Triton kernels, one file per op. Installed as `fastadv.kernels`."""
