"""What each of two gloo processes runs where DDP wraps a model: late, passed by, compiled, under accumulation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import fastadv
from tests.distributed import sharding, workers
from tests.support import assert_unchanged, gradients, snapshot

Found = dict[str, Tensor]
AWP: dict[str, dict[str, Any]] = {
    "default": {},
    "last": {"clean_weight": 0.0},
    "two": {"steps": 2},
    "attack": {"attack": True},
}
COMPILED: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "inside": lambda model, backend: DistributedDataParallel(torch.compile(model, backend=backend)),
    "outside": lambda model, backend: torch.compile(DistributedDataParallel(model), backend=backend),
    "none": lambda model, backend: torch.compile(model, backend=backend),
}


def passed_by(rank: int, name: str, joined: bool) -> Found:
    """The closure runs the model inside of DDP: refused, nothing is left of it, and the next step is right."""
    model, data = workers.build(), workers.half(rank)
    adv = sharding.made(name, model)
    ddp = DistributedDataParallel(model)
    told, before = "", snapshot(model)
    with Join([ddp]) if joined else contextlib.nullcontext():
        ddp(**data)  # as Lightning does before it calls `backward`
        try:
            workers.step(adv, model, data)
        except RuntimeError as error:
            told = str(error)
        assert_unchanged(model, before)
        if not joined:
            workers.step(adv, ddp, data)
    return {"told": torch.tensor("call the wrapper in the closure" in told), **gradients(model)}


class Inside(nn.Module):
    """Takes a step in its forward, as Lightning's manual optimisation does, whose module DDP wraps."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = workers.build()
        self.adv = [sharding.made(name, self.model)]

    def forward(self, data: dict[str, Tensor], ddp: list[DistributedDataParallel]) -> None:
        workers.step(self.adv[0], self.model, data)
        ddp[0].require_backward_grad_sync = False  # Lightning's, after the inner forward; after the outer it is True


def inside(rank: int, name: str) -> Found:
    """Three optimizer steps."""
    module = Inside(name)
    ddp = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for seed in range(3):
        ddp(workers.half(rank, seed), [ddp])
        ddp.require_backward_grad_sync = True
        optimizer.step()
        optimizer.zero_grad()
    return {key: p.detach() for key, p in module.model.named_parameters()}


def last_without_a_loss(rank: int) -> Found:
    ddp = DistributedDataParallel(workers.build())
    adv = fastadv.PGD(ddp, embedding="word_embeddings", adv_weight=0)
    try:
        workers.step(adv, ddp, workers.half(rank))
    except RuntimeError as error:
        return {"told": torch.tensor("give the last pass a loss" in str(error))}
    return {}


def awp_steps(adv: fastadv.Method, model: nn.Module, batches: list[dict[str, Tensor]], attacks: bool) -> None:
    """A step on each batch; all but the last in `no_sync`, where the model has that."""
    for number, data in enumerate(batches):
        quiet = number + 1 < len(batches) and hasattr(model, "no_sync")
        with model.no_sync() if quiet else contextlib.nullcontext():  # type: ignore[operator]
            attack = (lambda data=data: -model(**data).logits.square().mean()) if attacks else None
            adv.backward(lambda data=data: model(**data), attack=attack)


def awp(model: nn.Module, case: str) -> tuple[fastadv.AWP, bool]:
    """The method, and whether it has an `attack`."""
    options = dict(AWP[case])
    attacks = options.pop("attack", False)
    return fastadv.AWP(model, gamma=0.05, **options), attacks


def awp_accumulation(rank: int, case: str) -> Found:
    model = workers.build()
    ddp = DistributedDataParallel(model)
    adv, attacks = awp(ddp, case)
    awp_steps(adv, ddp, [workers.half(rank, seed) for seed in range(3)], attacks)
    return gradients(model)


class Counted:
    """A backend that runs graphs as they are, and counts the matrix products of those that go backward."""

    def __init__(self) -> None:
        self.products = 0
        backend = aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=self._backward)
        self.backend: Any = backend

    def _backward(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        kinds = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)
        products = sum(node.target in kinds for node in graph.graph.nodes)

        def run(*arguments: Any) -> Any:
            self.products += products
            return graph(*arguments)

        return run


def products(rank: int, form: str) -> Found:
    """Gradients of a compiled model's second step, and the matrix products of its backwards and of a plain one."""
    torch._dynamo.reset()
    counted, model, data = Counted(), workers.build(), workers.half(rank)
    run = COMPILED[form](model, counted.backend)
    run(**data).loss.backward()
    counted.products = 0
    run(**data).loss.backward()
    plain = counted.products
    adv = sharding.made("pgd-sample", run)
    workers.step(adv, run, data)
    model.zero_grad()
    counted.products = 0
    workers.step(adv, run, data)
    found = gradients(model) if form != "none" else {}
    return {**found, "plain": torch.tensor(plain), "step": torch.tensor(counted.products)}


PASSED = ("fgm-table", "pgd-last", "smart", "neftune")
INSIDE = ("pgd-sample", "smart")
FAST: sharding.Cases = {
    "passed-by-fgm-table": (passed_by, ("fgm-table", False)),
    "inside-pgd-sample": (inside, ("pgd-sample",)),
    **{f"awp-{case}": (awp_accumulation, (case,)) for case in AWP},
    "no-loss-ddp": (last_without_a_loss, ()),
}
SLOW: sharding.Cases = {
    **{f"passed-by-{name}": (passed_by, (name, False)) for name in PASSED[1:]},
    "passed-by-in-join": (passed_by, ("pgd-sample", True)),
    "inside-smart": (inside, ("smart",)),
    **{f"products-{form}": (products, (form,)) for form in COMPILED},
}
