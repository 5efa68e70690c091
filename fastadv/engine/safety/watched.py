"""See that a closure of the user's runs the forward, and no backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastadv.engine.safety import rng
from fastadv.engine.safety.inventory import Inventory

if TYPE_CHECKING:
    from fastadv.engine.model.parallelism import Parallelism

GRADIENT = attrgetter("grad")
CALLED_BACKWARD = (
    "the closure called backward, or its loss did: the gradient of {name} changed while the closure ran. It must only "
    "run the forward and return the loss, or gradients count once per pass. A loss that goes back by itself, chunk by "
    "chunk: take the plain one; or compute its gradients with torch.autograd.grad in the forward of a "
    "torch.autograd.Function, and return them, times the incoming gradient, from the backward"
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
        self._sharded = parallelism.sharded

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
        if self._sharded:  # FSDP2 adds to a DTensor's own part, whose version alone moves
            parts = [getattr(gradient, "_local_tensor", gradient) for gradient in found]
            found = [*parts, *_unreduced(self._model)]
        return found, [-1 if gradient is None else gradient._version for gradient in found]

    def _name(self, index: int) -> str:
        """The parameter with this gradient, as the model calls it."""
        if index >= len(self._parameters):
            return "a sharded parameter"
        named = self._model.named_parameters()
        return next((name for name, one in named if one is self._parameters[index]), "a parameter")


def _unreduced(model: nn.Module) -> Iterator[Tensor | None]:
    """What FSDP2 holds of gradients that are not reduced yet."""
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", lambda: None)()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for sharded in (one for group in groups if group is not None for one in group.fsdp_params):
            yield sharded.unsharded_accumulated_grad
            yield getattr(getattr(sharded, "_unsharded_param", None), "grad", None)
