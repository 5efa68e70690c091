"""The modules of a model, listed again only when its tree has changed: walking it costs more than a step's own work."""

from __future__ import annotations

from torch import Tensor, nn


class Inventory:
    """Modules, parameters and buffers of one model, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules: list[nn.Module] = []
        self._children: list[dict[str, nn.Module | None]] = []

    def modules(self) -> list[nn.Module]:
        """Every module once, as `model.modules()` lists them."""
        if not self._modules or [module._modules for module in self._modules] != self._children:
            self._modules = list(self.model.modules())
            self._children = [dict(module._modules) for module in self._modules]
        return self._modules

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter of `modules()`; one that two modules share comes twice."""
        every = [module._parameters for module in self._modules]
        return [parameter for some in every if some for parameter in some.values() if parameter is not None]

    def buffers(self) -> list[tuple[nn.Module, str, Tensor]]:
        """Every buffer of `modules()`, with the module that has it and its name there."""
        having = [module for module in self._modules if module._buffers]
        return [(one, name, buffer) for one in having for name, buffer in one._buffers.items() if buffer is not None]
