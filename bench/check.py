"""There is no figure for a wrong answer: contestants against one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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


def same_embeddings(steps: Mapping[str, Any], start: Tensor, first: Tensor, second: Tensor, tolerance: float) -> None:
    """How far two attack steps, along `first` and `second`, have moved the embeddings from `start`."""
    want: Tensor | None = None
    for name, step in steps.items():
        step.reset()
        step.step(first)
        moved = step.step(second).reshape(start.shape) - start
        want = moved if want is None else want
        assert relative_error(moved, want) <= tolerance, name


def gradients(model: nn.Module, step: Step) -> dict[str, Tensor]:
    """Of one step, by parameter."""
    model.zero_grad()
    step()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
