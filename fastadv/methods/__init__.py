"""The methods, one file each; each reads like its paper."""

from fastadv.engine.found import Found
from fastadv.engine.owner import Owner
from fastadv.engine.results import Pass, StepResult
from fastadv.engine.step import Step
from fastadv.methods.awp import AWP
from fastadv.methods.base import Method
from fastadv.methods.embedding_method import EmbeddingMethod
from fastadv.methods.fgm import FGM
from fastadv.methods.fgsm import FGSM
from fastadv.methods.freeat import FreeAT
from fastadv.methods.freelb import FreeLB
from fastadv.methods.llr import LLR
from fastadv.methods.neftune import NEFTune
from fastadv.methods.pgd import PGD
from fastadv.methods.proximal import BregmanProximal
from fastadv.methods.radius import Radius, suggest_radius
from fastadv.methods.repeat import repeat
from fastadv.methods.smart import SMART
from fastadv.methods.vat import VAT
from fastadv.methods.yopo import YOPO

__all__ = [
    "AWP",
    "FGM",
    "FGSM",
    "LLR",
    "PGD",
    "SMART",
    "VAT",
    "YOPO",
    "BregmanProximal",
    "EmbeddingMethod",
    "Found",
    "FreeAT",
    "FreeLB",
    "Method",
    "NEFTune",
    "Owner",
    "Pass",
    "Radius",
    "Step",
    "StepResult",
    "repeat",
    "suggest_radius",
]
