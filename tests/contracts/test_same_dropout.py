"""dropout="same": every kind of dropout of a real BERT, in eager mode and compiled, in float32 and under autocast.

Hidden states are dropped by `nn.Dropout`; attention by `nn.functional.dropout` ("eager") or inside of
`scaled_dot_product_attention` ("sdpa").
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from tests.bert import text, tiny_bert
from tests.support import assert_gradients, clear, gradients, same_bits

SPLIT = {"split": "encoder.layer.0"}


def still(shape: tuple[int, ...], mask: Tensor) -> Tensor:
    """A start that is the same each time."""
    return torch.full(shape, 0.1)


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def losses_of(model: nn.Module, run: Callable[..., Any], method: Any, bf16: bool, **options: Any) -> list[Tensor]:
    """Of the full passes of two steps, at one perturbation that never moves."""
    data, losses = text(), []
    adv = method(model, step_size=0.0, random_start=still, **options)

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = run(**data).loss
        losses.append(loss.detach().clone())
        return loss

    torch.manual_seed(3)
    for _ in range(2):
        adv.backward(closure, mask=data["attention_mask"])
    adv.close()
    clear(model)
    return losses


def check(losses: list[Tensor], passes: int = 3) -> None:
    assert len(losses) == 2 * passes
    first, second = losses[:passes], losses[passes:]
    assert all(same_bits(loss, first[0]) for loss in first)
    assert all(same_bits(loss, second[0]) for loss in second)
    assert not torch.equal(first[0], second[0]), "the next step draws other masks"


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16-autocast"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("method", "options"), [(fastadv.FreeLB, {}), (fastadv.YOPO, SPLIT)], ids=["freelb", "yopo"])
def test_eager(method: Any, options: dict[str, Any], attention: str, bf16: bool) -> None:
    model = tiny_bert(0.3, torch.float32, attention=attention)
    check(losses_of(model, model, method, bf16, **options))


@pytest.mark.parametrize("kind", ["hidden", "attention"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_each_kind_is_there(attention: str, kind: str) -> None:
    """With `fresh` masks the passes differ whichever of the two is on: the tests above could fail."""
    model = tiny_bert(0.0, torch.float32, attention=attention)
    for module in model.modules():
        in_attention = type(module).__name__.endswith("SelfAttention")
        for child in module.children():
            if isinstance(child, nn.Dropout) and in_attention == (kind == "attention"):
                child.p = 0.3
    fresh = losses_of(model, model, fastadv.FreeLB, False, dropout="fresh")
    assert len({float(loss) for loss in fresh}) == 6
    check(losses_of(model, model, fastadv.FreeLB, False, dropout="same"))


@pytest.mark.parametrize(
    ("backend", "attention", "bf16"),
    [
        ("aot_eager", "sdpa", False),
        pytest.param("inductor", "sdpa", False, marks=pytest.mark.slow),
        pytest.param("inductor", "sdpa", True, marks=pytest.mark.slow),
        pytest.param("inductor", "eager", False, marks=pytest.mark.slow),
        pytest.param("inductor", "eager", True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param(fastadv.FreeLB, {}, id="freelb"),
        pytest.param(fastadv.YOPO, SPLIT, id="yopo", marks=pytest.mark.slow),
    ],
)
def test_compiled(method: Any, options: dict[str, Any], backend: str, attention: str, bf16: bool) -> None:
    model = tiny_bert(0.3, torch.float32, attention=attention)
    check(losses_of(model, torch.compile(model, backend=backend), method, bf16, **options))


class Masked(nn.Module):
    """Dropout by masks that are given: its n-th call in a forward multiplies by the n-th."""

    def __init__(self, shelf: Shelf) -> None:
        super().__init__()
        self.shelf = shelf

    def forward(self, x: Tensor) -> Tensor:
        return x * self.shelf.next(x)


class Shelf:
    """Masks drawn once, in the order in which a forward asks for them."""

    def __init__(self, rate: float) -> None:
        self.rate, self.masks, self.place = rate, [], 0

    def next(self, x: Tensor) -> Tensor:
        if self.place == len(self.masks):
            kept = torch.rand(x.shape, dtype=x.dtype) >= self.rate
            self.masks.append(kept / (1 - self.rate))
        self.place += 1
        return self.masks[self.place - 1]


class Drawn(nn.Module):
    """Dropout as `nn.Dropout` has it, drawn from torch's generator as a `Shelf` draws."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(x.shape, dtype=x.dtype) >= self.rate
        return x * (kept / (1 - self.rate)) if self.training else x


def replaced(build: Callable[[], nn.Module]) -> nn.Module:
    """A BERT whose hidden dropout is `build()`, and whose attention has none."""
    model = tiny_bert(0.0)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout) and not type(module).__name__.endswith("SelfAttention"):
                setattr(module, name, build())
    return model


@pytest.mark.parametrize(("method", "options"), [(fastadv.FreeLB, {}), (fastadv.YOPO, SPLIT)], ids=["freelb", "yopo"])
@pytest.mark.parametrize("dropout", ["same", "fresh"])
def test_equals_an_explicitly_masked_model(dropout: str, method: Any, options: dict[str, Any]) -> None:
    """Masks drawn once and multiplied in every pass by the model itself; with fresh masks the gradients differ."""
    data, shelf = text(), Shelf(0.3)
    drawn, masked = replaced(lambda: Drawn(0.3)), replaced(lambda: Masked(shelf))
    adv = method(drawn, dropout=dropout, random_start=still, **options)
    torch.manual_seed(11)
    adv.backward(lambda: drawn(**data), mask=data["attention_mask"])

    def explicit() -> Any:
        shelf.place = 0
        return masked(**data)

    twin = method(masked, dropout="fresh", random_start=still, **options)
    torch.manual_seed(11)
    torch.randint(2**63 - 1, ())  # the seed that a start takes before the first pass
    shelf_first(masked, data, shelf)
    torch.manual_seed(0)
    twin.backward(explicit, mask=data["attention_mask"])
    assert len(shelf.masks) > 4
    if dropout == "same":
        assert_gradients(gradients(drawn), gradients(masked), 1e-12)
    else:
        with pytest.raises(AssertionError, match="relative error"):
            assert_gradients(gradients(drawn), gradients(masked), 1e-3)


def shelf_first(model: nn.Module, data: dict[str, Tensor], shelf: Shelf) -> None:
    """Draw the masks, in a forward of the model's own."""
    with torch.no_grad():
        model(**data)
    shelf.place = 0
