"""Adversarial training for language models, as fast as the hardware allows.

>>> import fastadv  # doctest: +SKIP
>>> adv = fastadv.PGD(model, epsilon=1.0, step_size=0.3, steps=3)  # doctest: +SKIP
>>> adv.backward(lambda: model(**batch).loss, mask=batch["attention_mask"])  # doctest: +SKIP
"""

from importlib.metadata import PackageNotFoundError, version

from fastadv.methods import (
    AWP,
    FGM,
    FGSM,
    LLR,
    PGD,
    SMART,
    VAT,
    YOPO,
    BregmanProximal,
    EmbeddingMethod,
    Found,
    FreeAT,
    FreeLB,
    Method,
    NEFTune,
    Pass,
    Step,
    StepResult,
    repeat,
)

try:
    __version__ = version("fastadv")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

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
    "Pass",
    "Step",
    "StepResult",
    "__version__",
    "repeat",
]
