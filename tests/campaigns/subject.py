"""A model with its method: what a fault meets, and what its twin does undisturbed."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.campaigns.configurations import Configuration
from tests.campaigns.model import Laden, batch, closure
from tests.campaigns.state import State, bits, state

QUIET = ("applied", "perturbed", "classic")  # the user's own forward is among what can fail: it leaves no traces


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global one is what a model draws from


class Subject:
    """One of two that have the same history, bit for bit."""

    def __init__(self, configuration: Configuration, seed: int) -> None:
        seed_all(seed)
        self.configuration = configuration
        quiet = configuration.action in QUIET
        writes = "nothing" if quiet else "counted" if configuration.compiled else "all"
        self.inner = Laden(configuration.tied, writes).train(not quiet)
        self.inner.still.eval()
        self.model: nn.Module = self.inner
        if configuration.compiled:
            self.model = torch.compile(self.inner, backend=configuration.compiled)
        self.adv = configuration.make(self._given(), **configuration.options)
        self.adv.share = configuration.share
        self.optimizer = torch.optim.SGD(self.inner.parameters(), lr=0.01)
        if hasattr(self.adv, "attach"):
            self.adv.attach(self.optimizer)
        self.data = batch()
        self.closure = closure(self.model, self.data)
        self.found: Any = None
        self.result: Any = None

    def _given(self) -> nn.Module:
        """What the method is made with."""
        return self.model

    def prepare(self, seed: int, new_buffer: bool) -> None:
        """Earlier gradients, and what the action needs; where `new_buffer`, the next pass makes one."""
        earlier = self.configuration.earlier
        if earlier != "kept" or self.configuration.action == "classic":
            self.model.zero_grad(set_to_none=True)
        if earlier == "some":
            seed_all(seed)
            self.closure()["loss"].backward()
        elif earlier == "all":
            generator = torch.Generator().manual_seed(seed)
            for parameter in self.inner.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        if self.configuration.action == "applied":
            seed_all(seed)
            self.found = self.adv.find(self.closure, self.data[1])
        if new_buffer:
            self.inner._buffers.pop("cache", None)
            self.inner._non_persistent_buffers_set.discard("cache")

    def act(self) -> None:
        """What a fault is met in."""
        getattr(self, f"_{self.configuration.action}")()

    def _backward(self) -> None:
        self.result = self.adv.backward(self.closure, self.data[1])

    _unattacked = _backward

    def _find(self) -> None:
        self.result = self.adv.find(self.closure, self.data[1]).values

    def _applied(self) -> None:
        with self.found.applied():
            self.result = self.model(*self.data[:2]).detach()

    def _perturbed(self) -> None:
        with self.adv.perturbed(self.closure, self.data[1]):
            self.result = self.model(*self.data[:2]).detach()

    def _classic(self) -> None:
        first = {"is_first_attack": True} if self.configuration.method == "PGD" else {}
        self.closure()["loss"].backward()
        self.adv.attack(emb_name="embed", **first)
        self.closure()["loss"].backward()
        self.result = self.inner.embed.weight.detach().clone()
        self.adv.restore()

    def recover(self) -> None:
        """What a user does after an error. Only the classic calls ask for something."""
        if self.configuration.action == "classic":
            with contextlib.suppress(RuntimeError):  # nothing was attacked, or all is back
                self.adv.restore()
            self.model.zero_grad(set_to_none=True)

    def update(self) -> None:
        self.optimizer.step()

    def state(self) -> State:
        return state(self.inner)

    def answers(self) -> dict[str, Any]:
        """What the last action brought, and what the method counts."""
        found = {f"result {index}": bits(value) for index, value in enumerate(_tensors(self.result))}
        found.update({f"state of the method, {key}": bits(value) for key, value in self.adv.state_dict().items()})
        if self.configuration.action in ("backward", "find"):
            found["norm"] = bits(self.adv.perturbation_norm)
            found["skipped"] = bits(self.adv.skipped)
        return found


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        return [tensor for value in result.values() for tensor in _tensors(value)]
    return [tensor for value in result or () for tensor in _tensors(value)]
