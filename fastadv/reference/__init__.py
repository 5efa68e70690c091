"""The eager reference: the published pseudocode, line by line, in plain PyTorch, one file per method.

It is what the tests and the benchmarks compare with, so it does what the classic scripts do, on the embedding table
itself: it clones the whole table, moves the weight in place, and keeps copies of the gradients. Nothing in the package
imports it.
"""

from fastadv.reference.fgm import FGM, fgm
from fastadv.reference.pgd import PGD, pgd

__all__ = ["FGM", "PGD", "fgm", "pgd"]
