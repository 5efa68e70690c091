"""See that a closure of the user's runs the forward, and no backward."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastadv.engine.safety import rng
from fastadv.engine.safety.inventory import Inventory

if TYPE_CHECKING:
    from fastadv.engine.model.parallelism import Parallelism

GRADIENT = attrgetter("grad")
CALLED_BACKWARD = (
    "the closure called backward, or its loss did: the gradient of {name} changed while the closure ran. It must only "
    "run the forward and return the loss, or gradients count once per pass. A loss that goes back by itself, chunk by "
    "chunk: take the plain one; or compute its gradients with torch.autograd.grad in the forward of a "
    "torch.autograd.Function, and return them, times the incoming gradient, from the backward. A pipeline's schedule: "
    "fastadv.integrations.pipeline runs it"
)


class Watched:
    """Calls closures, and looks each time whether one has touched a gradient.

    A gradient is another than before, or its version has moved: neither is read, which would wait for the device.

    Args:
        inventory: of the model, up to date.
        parallelism: of the model. FSDP2 gathers gradients out of sight until it reduces them; a forward of FSDP1 or
            ZeRO-3 takes them from their parameters, so that nothing can be seen.
    """

    def __init__(self, inventory: Inventory, parallelism: Parallelism) -> None:
        self._model = inventory.model
        self._parameters = [] if parallelism.flat else inventory.parameters
        self._units = parallelism.units

    def __call__(self, closure: Callable[[], Any]) -> Any:
        """Return what the closure returns.

        Raises:
            RuntimeError: it called backward.
        """
        if rng.capturing():
            return closure()
        before, versions = self._look()
        output = closure()
        after, later = self._look()
        if versions != later or not all(map(is_, before, after)):
            same = [a is b and v == w for a, b, v, w in zip(before, after, versions, later, strict=True)]
            raise RuntimeError(CALLED_BACKWARD.format(name=self._name(same.index(False))))
        return output

    def _look(self) -> tuple[list[Tensor | None], list[int]]:
        """The gradients and their versions; -1 where there is none."""
        found: list[Tensor | None] = list(map(GRADIENT, self._parameters))
        if self._units:  # FSDP2 adds to a DTensor's own part, whose version alone moves
            parts = [getattr(gradient, "_local_tensor", gradient) for gradient in found]
            found = [*parts, *self._units.unreduced()]
        return found, [-1 if gradient is None else gradient._version for gradient in found]

    def _name(self, index: int) -> str:
        """The parameter with this gradient, as the model calls it."""
        if index >= len(self._parameters):
            return "a sharded parameter"
        named = self._model.named_parameters()
        return next((name for name, one in named if one is self._parameters[index]), "a parameter")
