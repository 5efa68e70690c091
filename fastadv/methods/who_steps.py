"""Whose steps a teacher follows: the optimizer's, or the owner's of the backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fastadv.engine.owner import Owner

STEPPED_ELSEWHERE = (
    "this optimizer steps none of the model's weights. Where it steps copies of them, which are written back later "
    "(DeepSpeed's ZeRO), attach nothing, and call update() after every engine.step() for which "
    "engine.was_step_applied()"
)


def who_steps(weights: Iterable[Tensor], optimizer: Optimizer, owner: Owner) -> Any:
    """What has `register_step_post_hook`, called when the weights are the new ones.

    Raises:
        ValueError: the optimizer steps none of the weights.
    """
    if owner.steps:
        return owner
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # of accelerate's wrapper
    stepped = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    if not any(id(weight) in stepped for weight in weights):
        raise ValueError(STEPPED_ELSEWHERE)
    return inner


def updates(one: weakref.ref[Any]) -> Callable[..., None]:
    """A hook of an optimizer, which keeps nobody alive."""

    def update(*_: Any) -> None:
        mine = one()
        if mine is not None:
            mine.update()

    return update
