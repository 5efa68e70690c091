"""Every method on a GPU: what it computes on the CPU, without once waiting for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from tests.every import EVERY, in_scopes
from tests.models import TinyModel
from tests.oracles import oracles
from tests.support import assert_gradients, batch, gradients, seeded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
WHERE = in_scopes(*oracles.SCOPES)


def moved(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in data.items()}


def stepping(model: nn.Module, adv: fastadv.Method) -> Callable[[dict[str, Tensor]], fastadv.StepResult]:
    return lambda data: adv.backward(lambda: model(**data), mask=data["attention_mask"])


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    """Inside, it is an error to wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("name", "scope"), WHERE)
def test_gradients_are_those_of_the_cpu(name: str, scope: str, dtype: torch.dtype) -> None:
    """Of two batches, the second trained on what the first has left."""
    for padding_idx, accumulated in ((None, False), (0, True)):
        found = []
        for device in ("cpu", "cuda"):
            model = seeded(lambda: TinyModel("tfm", padding_idx=padding_idx), dtype=dtype).to(device)  # noqa: B023
            adv = EVERY[name](model, embedding=model.word_embeddings, scope=scope)
            step = stepping(model, adv)
            for seed in (1, 2):
                data = batch(seed=seed)
                if not accumulated:
                    model.zero_grad()
                step(data if device == "cpu" else moved(data))
                with torch.no_grad():
                    model.classifier.weight.mul_(0.9)
            assert int(adv.skipped) == 0
            found.append({name: grad.cpu() for name, grad in gradients(model).items()})
            found[-1]["perturbation_norm"] = adv.perturbation_norm.cpu()
            adv.check()
            adv.close()
        assert_gradients(found[1], found[0], TOLERANCE[dtype])


@pytest.mark.parametrize("dropout", ["fresh", "same"])
@pytest.mark.parametrize(("name", "scope"), WHERE)
def test_nothing_waits_for_the_device(name: str, scope: str, dropout: str) -> None:
    """A model that does not wait either; the first step may, for memory and compilation."""
    model, data = seeded(lambda: TinyModel("tfm", dropout=0.1), dtype=torch.float32).cuda(), moved(batch())
    adv = EVERY[name](model, embedding=model.word_embeddings, scope=scope, dropout=dropout)
    step = stepping(model, adv)
    step(data)
    with never_waiting():
        for _ in range(2):
            with torch.no_grad():
                model.classifier.weight.mul_(0.9)
            step(data)


def test_waiting_would_be_noticed() -> None:
    with pytest.raises(RuntimeError, match="synchronizing"), never_waiting():
        torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_an_id_out_of_range_is_left_out_and_told_when_asked(scope: str, watched: bool) -> None:
    """`watched`: autograd brings the table's gradient, with torch's own kernel, which looks at no bounds."""
    model, data = seeded(TinyModel, dtype=torch.float32).cuda(), moved(batch())
    options: dict[str, Any] = {"backward": lambda loss: loss.backward()} if watched else {}
    adv = fastadv.PGD(model, embedding=model.word_embeddings, scope=scope, **options)
    step = stepping(model, adv)
    data["input_ids"][0, 0] = 10**6
    step(data)
    with pytest.raises(IndexError, match="out of range"):
        adv.check()
    adv.check()
    assert all(grad.isfinite().all() for grad in gradients(model).values())
