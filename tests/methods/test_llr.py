"""LLR: a linear loss has no gap, steps by Adam, and models that it must differentiate twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadv
from tests.models import CLASSES, D, TinyModel, V
from tests.oracles.setting import Setting
from tests.support import (
    assert_gradients,
    batch,
    clear,
    gradients,
    record,
    refused,
    seeded,
    with_gradients,
)


def test_llr_of_a_linear_loss_has_no_gap() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Flatten(), torch.nn.Linear(12, 1)).double()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    adv = fastadv.LLR(model, epsilon=0.3, slope_weight=0.0)
    result = adv.backward(lambda: model(ids)[:, 0])
    assert float(result.adv_loss) < 1e-14


def test_llr_by_adam() -> None:
    """Adam's first step is its rate along the sign; a rate above epsilon ends on the ball at once."""
    here = Setting()
    adv = here.make(fastadv.LLR, here.noise * 0.01, epsilon=0.05, optimizer="adam", steps=1)
    with record(here.model) as seen:
        adv.backward(here.losses)
    moved = seen[-1] - here.words.detach()
    assert float(moved.abs().isclose(torch.tensor(0.05).double()).double().mean()) > 0.9


class Once(torch.autograd.Function):
    """A custom op as most are written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (1 - x.tanh() ** 2)


class Attends(nn.Module):
    """Attention by torch's fused op; `fast`: an activation."""

    def __init__(self, fast: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, CLASSES)
        self.tap, self.qkv, self.fast = nn.Identity(), nn.Linear(D, 3 * D), fast

    def forward(self, ids: Tensor, labels: Tensor, plain: bool = False) -> Tensor:
        q, k, v = self.qkv(self.tap(self.embed(ids))).unsqueeze(1).chunk(3, -1)
        attended = (q @ k.mT / D**0.5).softmax(-1) @ v if plain else F.scaled_dot_product_attention(q, k, v)
        return F.cross_entropy(self.head(self.fast(attended)[:, 0].mean(1)), labels, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_llr_differentiates_fused_attention_twice(dtype: torch.dtype) -> None:
    """By the plain kernel: torch's own choice has no second derivative."""
    model, data = seeded(Attends, dtype=dtype), batch()
    found = []
    for plain in (False, True):
        clear(model)
        adv = fastadv.LLR(model, epsilon=0.1, random_start=0.05)
        torch.manual_seed(2)
        adv.backward(lambda: model(data["input_ids"], data["labels"], plain))  # noqa: B023
        found.append(gradients(model))
        adv.close()
    assert_gradients(found[0], found[1], 1e-4 if dtype == torch.float32 else 1e-9)
    losses = model(data["input_ids"], data["labels"])
    [slope] = torch.autograd.grad(losses.sum(), model.embed.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for"):
        slope.sum().backward()


@pytest.mark.parametrize(
    ("fast", "says"),
    [
        (Once.apply, "Once has no second derivative"),
        (lambda x: torch.cdist(x, x.detach() + 1, p=3.0) @ x, "_cdist_backward"),
    ],
    ids=["once-differentiable", "torch's own"],
)
def test_llr_says_where_there_is_no_second_derivative(fast: Callable[[Tensor], Tensor], says: str) -> None:
    model, data = seeded(lambda: Attends(fast)), batch()
    adv = fastadv.LLR(model)
    closure = lambda: model(data["input_ids"], data["labels"])  # noqa: E731
    for _ in range(2):
        refused(model, lambda: adv.backward(closure), RuntimeError, "LLR differentiates the model twice", says)


def test_llr_refuses_a_compiled_model() -> None:
    model = seeded(TinyModel)
    compiled = torch.compile(model, backend="eager")
    refused(model, lambda: fastadv.LLR(compiled, embedding="word_embeddings"), ValueError, "torch.compile", "twice")


@pytest.mark.parametrize(
    ("options", "error", "phrases"),
    [
        ({"optimizer": "sgd"}, ValueError, ["optimizer", "'sign'", "'adam'"]),
        ({"gap_weight": -1.0}, ValueError, ["gap_weight"]),
        ({"slope_weight": "3"}, TypeError, ["slope_weight"]),
    ],
    ids=str,
)
def test_arguments(options: dict[str, Any], error: type[Exception], phrases: list[str]) -> None:
    model = with_gradients("tfm")
    refused(model, lambda: fastadv.LLR(model, embedding=model.word_embeddings, **options), error, *phrases)
