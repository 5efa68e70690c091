"""The modules of a model, listed again only when its tree has changed: walking it costs more than a step's own work."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


class Inventory:
    """Modules, parameters and buffers of one model, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules: list[nn.Module] = []
        self._children: list[tuple[dict[str, nn.Module | None], dict[str, nn.Module | None]]] = []

    def modules(self) -> list[nn.Module]:
        """Every module once, as `model.modules()` lists them."""
        if not self._modules or any(now != before for now, before in self._children):
            self._modules = list(self.model.modules())
            self._children = [(module._modules, dict(module._modules)) for module in self._modules]
        return self._modules

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter; one that two modules share comes twice."""
        for module in self._modules or self.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    yield parameter

    def buffers(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Every buffer, with the module that has it and its name there."""
        for module in self._modules or self.modules():
            if module._buffers:
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        yield module, name, buffer
