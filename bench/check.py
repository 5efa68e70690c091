"""There is no figure for a wrong answer: contestants' gradients against those of one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from bench.race import relative_error

Step = Callable[[], object]


def same_gradients(model: nn.Module, right: Step, others: Mapping[str, Step], tolerance: float) -> None:
    """Every parameter by itself, relative; or below what rounding leaves of a gradient that is zero."""
    want = gradients(model, right)
    for name, step in others.items():
        for (parameter, wanted), found in zip(want.items(), gradients(model, step).values(), strict=True):
            floor = 1e-7 * wanted.numel() ** 0.5  # the gradient of a key's bias is zero but for rounding
            close = relative_error(found, wanted) <= tolerance or (found - wanted).norm() <= floor
            assert close, f"{name}: {parameter}"


def gradients(model: nn.Module, step: Step) -> dict[str, Tensor]:
    """Of one step, by parameter."""
    model.zero_grad()
    step()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
