"""Closures that fail where they are told to, and whether a step is as good as new afterwards."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.models import Stateful
from tests.support import batch, record, same_bits, seeded

PLACES = ["before", "after", "forward", "backward"]


class Trap:
    """A closure that fails in pass `index`: before or after the forward, inside it, or in its backward."""

    def __init__(self, model: Stateful, data: dict[str, Tensor], index: int, place: str, error: BaseException) -> None:
        self.model, self.data = model, data
        self.index, self.place, self.error = index, place, error
        self.passes = 0

    def __call__(self) -> Tensor:
        now = self.passes == self.index
        self.passes += 1
        if now and self.place == "before":
            raise self.error
        with self.inside() if now and self.place == "forward" else contextlib.nullcontext():
            output = self.model(self.data["input_ids"], self.data["labels"])
        if now and self.place == "after":
            self.model.still.train()  # as if it failed between changing a mode and changing it back
            raise self.error
        if now and self.place == "backward":
            output.logits.register_hook(self.fail)
        return output.loss

    @contextlib.contextmanager
    def inside(self) -> Any:
        handle = self.model.head.register_forward_pre_hook(self.fail)
        try:
            yield
        finally:
            handle.remove()

    def fail(self, *_: Any) -> None:
        raise self.error


def prepare(earlier: str) -> tuple[Stateful, dict[str, Tensor]]:
    """A model, a batch, and gradients from before the step: none, all, or where a normal backward leaves them."""
    model, data = seeded(Stateful, dtype=torch.float32), batch()
    if earlier != "none":
        model(data["input_ids"], data["labels"]).loss.backward()
    if earlier == "all":
        for p in model.parameters():
            p.grad = torch.randn_like(p)
    return model, data


def check_as_new(adv: Any, model: Stateful, data: dict[str, Tensor], make: Callable[..., Any], **options: Any) -> None:
    """The next step of `adv` and the first step of a new one on a copy agree, bit for bit."""
    twin = copy.deepcopy(model)
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        its.grad = None if mine.grad is None else mine.grad.clone()
    fresh = make(twin, embedding=twin.embed, **options)
    seen = []
    for method, net in ((adv, model), (fresh, twin)):
        torch.manual_seed(11)
        with record(net) as embedded:
            result = method.backward(lambda net=net: net(data["input_ids"], data["labels"]).loss)
        seen.append((embedded, result, torch.get_rng_state()))
    (embedded, result, rng), (embedded2, result2, rng2) = seen
    assert all(same_bits(a, b) for a, b in zip(embedded, embedded2, strict=True))
    assert same_bits(result.loss, result2.loss)
    assert torch.equal(rng, rng2)
    assert adv.attacked == fresh.attacked
    for (name, mine), its in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (its.grad is None), name
        assert mine.grad is None or same_bits(mine.grad, its.grad), name
    for (name, mine), its in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert same_bits(mine, its), name
