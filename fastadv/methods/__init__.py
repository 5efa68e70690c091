"""The methods, one file each; each reads like its paper."""

from fastadv.methods.base import Method, StepResult
from fastadv.methods.fgm import FGM
from fastadv.methods.fgsm import FGSM
from fastadv.methods.freeat import FreeAT
from fastadv.methods.freelb import FreeLB
from fastadv.methods.pgd import PGD
from fastadv.methods.replay import repeat
from fastadv.methods.yopo import YOPO

__all__ = ["FGM", "FGSM", "PGD", "YOPO", "FreeAT", "FreeLB", "Method", "StepResult", "repeat"]
