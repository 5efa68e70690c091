"""The eager reference: the published pseudocode, line by line, in plain PyTorch, one file per method.

It is what the tests and the benchmarks compare with. FGM and PGD do what the classic scripts do, on the embedding table
itself: they clone the whole table, move the weight in place, and keep copies of the gradients. AWP moves the weights,
and the others add a perturbation to what was looked up, by a hook. Nothing in the package imports this.
"""

from fastadv.reference.awp import awp
from fastadv.reference.fgm import FGM, fgm
from fastadv.reference.fgsm import fgsm
from fastadv.reference.freeat import FreeAT
from fastadv.reference.freelb import freelb
from fastadv.reference.llr import llr
from fastadv.reference.neftune import neftune
from fastadv.reference.pgd import PGD, pgd
from fastadv.reference.proximal import BregmanProximal
from fastadv.reference.smart import smart
from fastadv.reference.vat import vat
from fastadv.reference.yopo import yopo

__all__ = [
    "FGM",
    "PGD",
    "BregmanProximal",
    "FreeAT",
    "awp",
    "fgm",
    "fgsm",
    "freelb",
    "llr",
    "neftune",
    "pgd",
    "smart",
    "vat",
    "yopo",
]
