"""SMART, VAT, LLR, AWP and NEFTune in use: what they refuse and how they say it, faults, attention, other closures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadv
from fastadv.methods.smart import UPDATES
from tests.models import CLASSES, D, Stateful, TinyModel, V
from tests.support import (
    assert_close,
    assert_gradients,
    assert_unchanged,
    batch,
    clear,
    gradients,
    refused,
    same_bits,
    seeded,
    snapshot,
)

COMPARING = {"smart": fastadv.SMART, "vat": fastadv.VAT}
HOLDING = {**COMPARING, "llr": fastadv.LLR}


def tiny(**options: Any) -> tuple[TinyModel, dict[str, Tensor]]:
    """A model with gradients from before, so that a change to them shows."""
    model, data = seeded(lambda: TinyModel("tfm", **options)), batch()
    if not options:
        model(**data).loss.backward()
    return model, data


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
    """Attention by torch's fused op; `fast`: an activation without a second derivative."""

    def __init__(self, fast: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, CLASSES)
        self.tap, self.qkv, self.fast = nn.Identity(), nn.Linear(D, 3 * D), fast

    def forward(self, ids: Tensor, labels: Tensor, plain: bool = False) -> Tensor:
        q, k, v = self.qkv(self.tap(self.embed(ids))).unsqueeze(1).chunk(3, -1)
        attended = (q @ k.mT / D**0.5).softmax(-1) @ v if plain else F.scaled_dot_product_attention(q, k, v)
        hidden = Once.apply(attended) if self.fast else attended.tanh()
        return F.cross_entropy(self.head(hidden[:, 0].mean(1)), labels, reduction="none")


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


def test_llr_says_where_there_is_no_second_derivative() -> None:
    model, data = seeded(lambda: Attends(fast=True)), batch()
    adv = fastadv.LLR(model)
    closure = lambda: model(data["input_ids"], data["labels"])  # noqa: E731
    refused(model, lambda: adv.backward(closure), RuntimeError, "LLR differentiates the model twice", "once_diff")


def test_llr_refuses_a_compiled_model() -> None:
    model = seeded(TinyModel)
    compiled = torch.compile(model, backend="eager")
    refused(model, lambda: fastadv.LLR(compiled, embedding="word_embeddings"), ValueError, "torch.compile", "twice")


@pytest.mark.parametrize(
    ("method", "options", "error", "phrases"),
    [
        (fastadv.SMART, {"update": "code"}, ValueError, ["update", *map(repr, UPDATES)]),
        (fastadv.SMART, {"divergence": "l2"}, ValueError, ["divergence", "'symmetric_kl'"]),
        (fastadv.SMART, {"search": "l2"}, ValueError, ["search", "'symmetric_kl'"]),
        (fastadv.SMART, {"weight": -1}, ValueError, ["weight", "at least 0"]),
        (fastadv.SMART, {"epsilon": None}, TypeError, ["epsilon", "number"]),
        (fastadv.VAT, {"xi": 0.0}, ValueError, ["xi", "above 0"]),
        (fastadv.VAT, {"random_start": False}, ValueError, ["random start", "no gradient"]),
        (fastadv.VAT, {"divergence": 3}, ValueError, ["divergence"]),
        (fastadv.LLR, {"optimizer": "sgd"}, ValueError, ["optimizer", "'sign'", "'adam'"]),
        (fastadv.LLR, {"gap_weight": -1.0}, ValueError, ["gap_weight"]),
        (fastadv.LLR, {"slope_weight": "3"}, TypeError, ["slope_weight"]),
        (fastadv.NEFTune, {"alpha": -5.0}, ValueError, ["alpha", "at least 0"]),
    ],
    ids=str,
)
def test_arguments(method: Any, options: dict[str, Any], error: type[Exception], phrases: list[str]) -> None:
    model, _ = tiny()
    refused(model, lambda: method(model, embedding=model.word_embeddings, **options), error, *phrases)


@pytest.mark.parametrize(
    ("options", "error", "phrases"),
    [
        ({"gamma": -1.0}, ValueError, ["gamma"]),
        ({"epsilon": "0.01"}, TypeError, ["epsilon"]),
        ({"steps": 0}, ValueError, ["steps"]),
        ({"parameters": lambda name, p: False}, ValueError, ["no weight moves", "parameters="]),
        ({"embedding": "word_embeddings"}, TypeError, ["embedding"]),
        ({"scope": "sample"}, TypeError, ["scope"]),
    ],
)
def test_arguments_of_awp(options: dict[str, Any], error: type[Exception], phrases: list[str]) -> None:
    model, _ = tiny()
    refused(model, lambda: fastadv.AWP(model, **options), error, *phrases)


@pytest.mark.parametrize("fails_in", ["closure", "backward", "perturbed"])
@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("index", range(3))
def test_awp_leaves_no_trace_of_a_fault(index: int, earlier: bool, fails_in: str) -> None:
    """Ctrl-C in any pass: weights, gradients, statistics, generators. The memory of the weights stays what it was."""
    model, data = seeded(Stateful), batch()
    if earlier:
        model(data["input_ids"], data["labels"]).loss.backward()
    passes: list[int] = []

    def closure() -> Any:
        passes.append(1)
        if fails_in != "backward" and len(passes) == index + 1:
            raise KeyboardInterrupt
        return model(data["input_ids"], data["labels"])

    def backward(loss: Tensor) -> None:
        if fails_in == "backward" and len(passes) >= index + 1:
            raise KeyboardInterrupt
        loss.backward()

    adv = fastadv.AWP(model, steps=2, gamma=0.1, backward=backward)
    before = snapshot(model)
    try:
        if fails_in == "perturbed":
            with adv.perturbed(closure):
                raise KeyboardInterrupt
        adv.backward(closure)
    except KeyboardInterrupt:
        assert_unchanged(model, before)
    else:
        pytest.fail("it should have failed")


def test_awp_perturbs_for_evaluation() -> None:
    model, data = tiny()
    adv, before = fastadv.AWP(model, gamma=0.05), snapshot(model)
    with adv.perturbed(lambda: model(**data)):
        worse = model(**data).loss.detach()
    assert_unchanged(model, before)
    assert worse > model(**data).loss


def test_awp_stays_where_a_gradient_is_not_finite() -> None:
    """That weight is counted and does not move; the others do."""
    model, data = tiny()
    clear(model)
    adv = fastadv.AWP(model, gamma=0.05)
    before, moved = {n: p.detach().clone() for n, p in model.named_parameters()}, []
    handle = model.classifier.weight.register_hook(lambda grad: grad * float("inf"))

    def closure() -> Any:
        moved.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})
        return model(**data)

    adv.backward(closure)
    handle.remove()
    assert "classifier.weight" not in moved[-1]
    assert "bert.ff1.weight" in moved[-1]
    assert int(adv.skipped) == 1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_awp_does_not_mind_the_size_of_the_gradient(scale: float) -> None:
    model, data = seeded(lambda: TinyModel("tfm"), dtype=torch.float32), batch()
    found = []
    for factor in (1.0, scale):
        seen: list[Tensor] = []

        def closure() -> Tensor:
            seen.append(model.bert.ff1.weight.detach().clone())  # noqa: B023
            return model(**data).loss * factor  # noqa: B023

        fastadv.AWP(model, gamma=0.05).backward(closure)
        clear(model)
        found.append(seen[-1] - seen[0])
    assert_close(found[1], found[0], 1e-4, "movement")


def test_vat_looks_at_a_plain_step_without_labels() -> None:
    """Before `start_step`: nothing to train, and no complaint."""
    model, data = tiny()
    clear(model)
    adv = fastadv.VAT(model, embedding=model.word_embeddings, start_step=1)
    result = adv.backward(lambda: {"logits": model(data["input_ids"]).logits})
    assert (result.loss.item(), result.adv_loss) == (0.0, None)
    assert all(p.grad is None for p in model.parameters())
    assert adv.backward(lambda: {"logits": model(data["input_ids"]).logits}).adv_loss > 0


def test_awp_goes_where_the_model_goes() -> None:
    """To another precision, after it was made and after a step."""
    model, data = seeded(lambda: TinyModel("tfm"), dtype=torch.float32), batch()
    adv = fastadv.AWP(model)
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        clear(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert adv.backward(lambda: model(**data)).adv_loss > 0
        assert all(same_bits(p.detach(), before[name]) for name, p in model.named_parameters())


def test_a_step_by_the_gradients_size_and_a_scaler_do_not_go_together() -> None:
    model, data = tiny()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    adv = fastadv.SMART(model, embedding=model.word_embeddings, update="mt-dnn", scaler=scaler)
    refused(model, lambda: adv.backward(lambda: model(**data)), ValueError, "GradScaler", "'paper'")
