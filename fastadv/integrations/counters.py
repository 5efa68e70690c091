"""Let the figures that a Trainer keeps of its batches count each batch once, however often it is run."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Not a Trainer's figures; a data set may be a long list.
DATA = ("train_dataset", "eval_dataset")

Undo = Callable[[], None]


class Counters:
    """The numbers, lists and dicts that a Trainer has as attributes, during the passes over one batch.

    The first pass that trains writes to them as in plain training. What others write is taken back: later passes, and
    a teacher's before it.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._passes = 0

    @contextlib.contextmanager
    def one_pass(self) -> Iterator[None]:
        """Around each pass."""
        self._passes += torch.is_grad_enabled()
        if self._passes == 1 and torch.is_grad_enabled():
            yield
            return
        undo = _saved_attributes(self._trainer)
        try:
            yield
        finally:
            for one in undo:
                one()


def _saved_attributes(trainer: Any) -> list[Undo]:
    undo: list[Undo] = []
    for name, value in vars(trainer).items():
        if name not in DATA:
            undo += [_of_number(trainer, name, value)] if isinstance(value, (int, float)) else _saved(value)
    return undo


def _of_number(trainer: Any, name: str, value: float) -> Undo:
    return lambda: setattr(trainer, name, value)


def _saved(value: Any) -> list[Undo]:
    """How to put back, in place, what a container or a single number on the device holds."""
    if isinstance(value, dict):
        inside = [undo for one in value.values() if isinstance(one, (dict, list, deque)) for undo in _saved(one)]
        return [_of_dict(value, dict(value)), *inside]
    if isinstance(value, (list, deque)):
        return [_of_list(value, list(value))]
    if isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad:
        return [_of_tensor(value, value.clone())]
    return []


def _of_dict(value: dict[Any, Any], before: dict[Any, Any]) -> Undo:
    def undo() -> None:
        value.clear()
        value.update(before)

    return undo


def _of_list(value: list[Any] | deque[Any], before: list[Any]) -> Undo:
    def undo() -> None:
        value.clear()
        value.extend(before)

    return undo


def _of_tensor(value: Tensor, before: Tensor) -> Undo:
    def undo() -> None:
        value.copy_(before)

    return undo
