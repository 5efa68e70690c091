"""The methods, one file each; each reads like its paper."""

from fastadv.methods.base import Method, StepResult
from fastadv.methods.fgm import FGM
from fastadv.methods.pgd import PGD

__all__ = ["FGM", "PGD", "Method", "StepResult"]
