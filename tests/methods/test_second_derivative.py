"""LLR and what has no second derivative, though torch differentiates it twice and says nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import fastadv
from tests.models import CLASSES, D, V
from tests.support import assert_gradients, batch, clear, gradients, refused, seeded

Activation = Callable[[Tensor], Tensor]


class FusedLoss(torch.autograd.Function):
    """Cross entropy of a linear layer, as fused ones are: gradients are computed in the forward, and saved."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            inputs = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
            loss = F.cross_entropy(F.linear(*inputs), labels)
            ctx.save_for_backward(*torch.autograd.grad(loss, inputs))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(grads[0] * saved for saved in ctx.saved_tensors), None


class SavedTanh(torch.autograd.Function):
    """Its backward reads an intermediate result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        squared = x.tanh().square()
        ctx.save_for_backward(squared)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * (1 - ctx.saved_tensors[0])


class RightTanh(SavedTanh):
    """Its backward reads its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * (1 - ctx.saved_tensors[0].tanh().square())


class Rectifier(SavedTanh):
    """A mask is a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x > 0)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.saved_tensors[0]


class Twice(SavedTanh):
    """Linear, with a constant for a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


class Model(nn.Module):
    """Words, a mixing layer, an activation, a mean and a head; the loss is fused or plain."""

    def __init__(self, activation: Activation = torch.tanh, *, fused: bool = False, again: bool = False) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, CLASSES, bias=False)
        self.activation, self.fused, self.again = activation, fused, again

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        words = self.embed(ids)
        h = checkpoint(self.block, words, use_reentrant=False) if self.again else self.block(words)
        pooled = h.mean(1)
        if self.fused:
            loss: Tensor = FusedLoss.apply(pooled, self.head.weight, labels)
            return loss
        return F.cross_entropy(self.head(pooled), labels)

    def block(self, words: Tensor) -> Tensor:
        return self.activation(self.mix(words)).tanh()


def step(adv: fastadv.Method, model: nn.Module) -> dict[str, Tensor]:
    data = batch()
    clear(model)
    adv.backward(lambda: model(data["input_ids"], data["labels"]), mask=data["attention_mask"])
    return gradients(model)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "far": {"epsilon": 0.3},
    "l2": {"epsilon": 0.1, "norm": "l2"},
    "fresh": {"dropout": "fresh"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("again", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda again: Model(fused=True, again=again), "FusedLoss"),
        (lambda again: Model(SavedTanh.apply, again=again), "SavedTanh"),
    ],
    ids=["loss", "activation"],
)
def test_refused(build: Callable[[bool], Model], name: str, again: bool, options: str, dtype: torch.dtype) -> None:
    model = seeded(lambda: build(again), dtype=dtype)
    adv = fastadv.LLR(model, **OPTIONS[options])
    for _ in range(2):  # a step that failed has found nothing sound
        refused(model, lambda: step(adv, model), RuntimeError, f"{name} has no second derivative", "plain operation")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("custom", "plain"),
    [(RightTanh, torch.tanh), (Rectifier, torch.relu), (Twice, lambda x: 2 * x)],
    ids=["right", "rectifier", "linear"],
)
def test_taken(custom: type[SavedTanh], plain: Activation, options: str, dtype: torch.dtype) -> None:
    """A function with a second derivative, or with none to miss: the gradients are those of the plain one."""
    found = []
    for activation in (custom.apply, plain):
        model = seeded(lambda: Model(activation), dtype=dtype)  # noqa: B023
        adv = fastadv.LLR(model, **OPTIONS[options])
        torch.manual_seed(3)
        found.append(step(adv, model))
    if dtype != torch.bfloat16:  # in which the gap is rounding
        assert_gradients(found[0], found[1], 1e-9 if dtype == torch.float64 else 1e-3)


def test_what_would_be_wrong() -> None:
    """Without a look the gradient of a fused loss would be another."""
    found = []
    for fused in (True, False):
        model = seeded(lambda: Model(fused=fused))  # noqa: B023
        adv = fastadv.LLR(model)
        adv._untried = lambda *_: None
        torch.manual_seed(3)
        found.append(step(adv, model))
    with pytest.raises(AssertionError, match="relative error"):
        assert_gradients(found[0], found[1], 1e-3)


def test_looked_at_again() -> None:
    """Where the model or the closure is another; no step in between is looked into."""
    model, data = seeded(Model), batch()
    adv = fastadv.LLR(model)
    looks: list[object] = []
    untried = adv._untried
    adv._untried = lambda *args: looks.append(found := untried(*args)) or found
    for _ in range(3):
        step(adv, model)
    assert [look is not None for look in looks] == [True, False, False]

    def other() -> Tensor:
        pooled = model.block(model.embed(data["input_ids"])).mean(1)
        return FusedLoss.apply(pooled, model.head.weight, data["labels"])

    refused(model, lambda: adv.backward(other), RuntimeError, "FusedLoss")
    step(adv, model)
    model.mix = seeded(lambda: nn.Sequential(nn.Linear(D, D), Layer()))
    with pytest.raises(RuntimeError, match="SavedTanh"):
        step(adv, model)


class Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return SavedTanh.apply(x)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def in_parallel(model: Model) -> None:
    parallelize_module(model, init_device_mesh("cpu", (1,)), {"mix": ColwiseParallel()})


@pytest.mark.parametrize("shard", [fully_shard, in_parallel])
@pytest.mark.usefixtures("one_process")
def test_sharded_weights(shard: Callable[[Any], Any]) -> None:
    """At construction, and where the model is sharded later."""
    says = "DistributedDataParallel"
    model, late = seeded(Model), seeded(Model)
    adv = fastadv.LLR(late)
    step(adv, late)
    shard(model)
    shard(late)
    with pytest.raises(ValueError, match=says):
        fastadv.LLR(model)
    with pytest.raises(ValueError, match=says):
        step(adv, late)
    assert not model.embed._forward_hooks and "forward" not in vars(model.embed)
