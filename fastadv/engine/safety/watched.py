"""See that a closure of the user's runs the forward, and no backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, is_
from typing import Any

from torch import nn

from fastadv.engine.safety import rng

GRADIENT = attrgetter("grad")
CALLED_BACKWARD = "the closure called backward: it must only run the forward and return the loss"


class Watched:
    """Calls closures; the first time, it looks whether one has touched a gradient.

    A gradient is another than before, or its version has moved: neither is read, which would wait for the device.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._known: list[Callable[[], Any]] = []

    def __call__(self, closure: Callable[[], Any]) -> Any:
        """Return what the closure returns.

        Raises:
            RuntimeError: it called backward.
        """
        if closure in self._known or rng.capturing():
            return closure()
        before = list(map(GRADIENT, self._parameters))
        versions = [gradient._version for gradient in before if gradient is not None]
        output = closure()
        after = list(map(GRADIENT, self._parameters))
        if not all(map(is_, before, after)) or versions != [grad._version for grad in after if grad is not None]:
            raise RuntimeError(CALLED_BACKWARD)
        self._known.append(closure)
        return output
