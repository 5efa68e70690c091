# ruff: noqa: F405 - the names come with a star, for type checkers alone
"""Adversarial training for language models, as fast as the hardware allows.

`import fastadv` by itself loads no torch: the methods come with the first of the names below that is used.

Examples:
    >>> import fastadv  # doctest: +SKIP
    >>> adv = fastadv.PGD(model, epsilon=0.1, step_size=0.05, scope="sample")  # doctest: +SKIP
    >>> adv.backward(lambda: model(**batch).loss, mask=batch["attention_mask"])  # doctest: +SKIP
"""

from importlib import import_module as _import_module
from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from fastadv.auto_classes import register as _register

# A public name is one line here, and one in fastadv.methods, which everything is taken from.
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
    "__version__",
    "repeat",
    "suggest_radius",
]

try:
    __version__ = _version("fastadv")
except _PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

if TYPE_CHECKING:
    from fastadv.methods import *  # noqa: F403 - what of it is public here says __all__
else:  # hidden from type checkers: a misspelt name stays an error there
    # What the methods load in any case, or costs nothing, so that `fastadv.ops` needs no import of its own.
    _PARTS = ("classic", "engine", "llm", "methods", "native", "ops", "packed")

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used (PEP 562)."""
        if name in _PARTS:
            return _import_module(f"fastadv.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(_import_module("fastadv.methods"), name)
        globals()[name] = value  # from now on an attribute like any other
        return value

    def __dir__() -> list[str]:
        return sorted(__all__)


_register()  # what `fastadv train` saves opens with transformers' Auto classes
