"""A loss that runs a backward of its own: refused in every pass where it writes gradients, right where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import fastadv
from tests.every import EVERY, every_but
from tests.models import Output, TinyModel
from tests.support import assert_gradients, batch, clear, gradients, refused, seeded, with_gradients

METHODS: dict[str, Callable[..., fastadv.Method]] = {
    **EVERY,
    "awp": lambda model, embedding: fastadv.AWP(model),
    "bregman": lambda model, embedding: fastadv.BregmanProximal(model),
    "plain": partial(fastadv.PGD, start_step=99),
}


class Chunked(torch.autograd.Function):
    """The loss of each half of the batch, whose gradients its forward computes; `writes`: to the head's `.grad`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, head: torch.nn.Linear, writes: bool
    ) -> Tensor:
        total, found = hidden.new_zeros(()), []
        for part, answers in zip(hidden.detach().chunk(2), labels.chunk(2), strict=True):
            with torch.enable_grad():
                part.requires_grad_()
                loss = F.cross_entropy(head(part), answers, reduction="sum") / len(labels)
            if writes:
                loss.backward()
                found.append((part.grad, None, None))
            elif loss.requires_grad:
                found.append(torch.autograd.grad(loss, (part, weight, bias)))
            total += loss.detach()
        of_hidden, of_weight, of_bias = zip(*found, strict=True)
        ctx.writes = writes
        ctx.save_for_backward(torch.cat(of_hidden), *([] if writes else [sum(of_weight), sum(of_bias)]))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [grad] = grads
        found = [grad * saved for saved in ctx.saved_tensors]
        return (*found, *([None] * (6 - len(found))))


def chunked(model: TinyModel, data: dict[str, Tensor], writes: bool) -> Output:
    hidden = model.bert(data["input_ids"], data["attention_mask"])
    head = model.classifier
    loss = Chunked.apply(hidden, head.weight, head.bias, data["labels"], head, writes)
    return Output(loss, F.linear(hidden, head.weight, head.bias))


@pytest.mark.parametrize("there", [False, True], ids=["no-gradients", "gradients-there"])
@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_writes_gradients(method: str, there: bool) -> None:
    model, data = with_gradients("tfm"), batch()
    if not there:
        clear(model)
    adv = METHODS[method](model, embedding=model.word_embeddings)
    says = ("or its loss did", "classifier.weight", "take the plain one", "torch.autograd.Function")
    refused(model, lambda: adv.backward(lambda: chunked(model, data, writes=True)), RuntimeError, *says)


@pytest.mark.parametrize("method", every_but("llr"))  # it needs a second derivative
def test_a_loss_that_computes_gradients(method: str) -> None:
    found = []
    for closure in (lambda m, d: chunked(m, d, writes=False), lambda m, d: m(**d)):
        model, data = seeded(lambda: TinyModel("tfm")), batch()
        adv = EVERY[method](model, embedding=model.word_embeddings)
        torch.manual_seed(1)
        adv.backward(lambda: closure(model, data))  # noqa: B023
        found.append(gradients(model))
    assert_gradients(found[0], found[1], 1e-9)


class Sometimes:
    """A closure that touches a gradient in its n-th call alone."""

    def __init__(self, model: TinyModel, turn: int = -1) -> None:
        self.model, self.weight, self.turn, self.calls = model, model.classifier.weight, turn, 0
        self.data = batch()

    def __call__(self) -> Output:
        if self.calls == self.turn:
            with torch.enable_grad():
                self.weight.sum().backward()
        self.calls += 1
        return self.model(**self.data)


@pytest.mark.filterwarnings("ignore:FreeAT")  # no optimizer steps here
@pytest.mark.parametrize("call", ["backward", "find"])
@pytest.mark.parametrize("method", METHODS)
def test_in_every_pass(method: str, call: str) -> None:
    """Full, plain, probe, partial, look, and a teacher's."""
    if call == "find" and not hasattr(METHODS[method](with_gradients("tfm"), embedding="word_embeddings"), "find"):
        pytest.skip("has no find")
    model = with_gradients("tfm")
    adv = METHODS[method](model, embedding=model.word_embeddings)
    whole = Sometimes(model)
    getattr(adv, call)(whole)
    assert whole.calls
    for turn in range(whole.calls):
        once = Sometimes(model, turn)
        refused(model, lambda: getattr(adv, call)(once), RuntimeError, "changed while the closure ran")  # noqa: B023


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("reduces", [True, False])
@pytest.mark.usefixtures("one_process")
def test_under_fsdp2(reduces: bool) -> None:
    """A gradient that is not reduced yet is in no parameter's `.grad`."""
    model, data = seeded(lambda: TinyModel("tfm")), batch()
    fully_shard(model.classifier)
    fully_shard(model)
    adv = fastadv.PGD(model, embedding=model.word_embeddings, scope="sample")

    def closure() -> Tensor:
        output = model(**data)
        hidden = model.bert(data["input_ids"], data["attention_mask"]).detach()
        model.classifier.set_requires_gradient_sync(reduces)
        model.classifier(hidden).sum().backward()
        model.classifier.set_requires_gradient_sync(True)
        return output.loss

    for _ in range(2):
        with pytest.raises(RuntimeError, match="or its loss did"):
            adv.backward(closure)
