"""What the tests of `probe_dtype` share: a small model in float32, the dtypes of its passes, and autocast's state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastadv
from tests.models import TinyModel
from tests.support import batch, gradients, ready

LOW, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
NUMBERS: dict[str, Any] = {"epsilon": 0.5, "step_size": 0.3, "steps": 3, "scope": "sample"}
PGD = partial(fastadv.PGD, embedding="word_embeddings", **NUMBERS)


def tiny() -> TinyModel:
    return ready(FULL)[0]


def autocast_state() -> tuple[Any, ...]:
    """Of the CPU: on or off, to what, whether casts are kept, and how many are around."""
    torch.autocast_increment_nesting()
    depth = torch.autocast_decrement_nesting()
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled(), depth


@contextlib.contextmanager
def matmuls(module: nn.Linear) -> Iterator[list[torch.dtype]]:
    """The dtype of what a linear layer returns to each pass that takes gradients."""
    seen: list[torch.dtype] = []

    def look(*call: Any) -> None:
        if torch.is_grad_enabled():  # not to the Bregman teacher
            seen.append(call[-1].dtype)

    handle = module.register_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def stepped(make: Callable[..., fastadv.Method], dtype: torch.dtype | None, **options: Any) -> dict[str, Tensor]:
    """The gradients of one step."""
    model, data = tiny(), batch()
    adv = make(model, embedding="word_embeddings", probe_dtype=dtype, **options)
    torch.manual_seed(2)
    adv.backward(lambda: model(**data), mask=data["attention_mask"])
    adv.close()
    return gradients(model)


def never(*_: Any, **__: Any) -> None:
    raise AssertionError
