"""Let transformers' Auto classes know fastadv's classifier, at no cost for who does not use them.

A class can be registered when the module that keeps the register is there. If transformers has imported it already,
that is now; else it is right after it does (docs/design/0016-models-that-load.md).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def _configuration() -> None:
    """Light: whoever reads a configuration imports no model."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from fastadv.train.configuration_mean_pool import MeanPoolConfig

    AutoConfig.register(MeanPoolConfig.model_type, MeanPoolConfig, exist_ok=True)


def _model() -> None:
    from transformers.models.auto.modeling_auto import AutoModelForSequenceClassification

    from fastadv.train.configuration_mean_pool import MeanPoolConfig
    from fastadv.train.modeling_mean_pool import MeanPoolClassifier

    AutoModelForSequenceClassification.register(MeanPoolConfig, MeanPoolClassifier, exist_ok=True)


REGISTERS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _configuration,
    "transformers.models.auto.modeling_auto": _model,
}


def register() -> None:
    """Register what can be registered now, and wait for the rest."""
    for name, action in REGISTERS.items():
        if name in sys.modules:
            _try(action)
        else:
            sys.meta_path.insert(0, _Waiting(name, action))


def _try(action: Callable[[], None]) -> None:
    """Register; a transformers that has changed must still be importable."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is not the importer's fault
        warnings.warn(f"transformers' Auto classes cannot load fastadv's classifiers: {error}", stacklevel=2)


class _Waiting(MetaPathFinder):
    """Find one module as it would be found without this, and have an action run after it is imported."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self.action)
        return spec


class _Then(Loader):
    """Load as `loader` does, and then run an action."""

    def __init__(self, loader: Loader, action: Callable[[], None]) -> None:
        self.loader, self.action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader  # from now on nothing shows that it was found this way
        self.loader.exec_module(module)
        _try(self.action)
