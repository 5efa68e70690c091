"""Every method on a GPU: what it computes on the CPU, without once waiting for the device, and as a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from tests.bert import text, tiny_bert
from tests.every import EVERY, every_but, in_scopes
from tests.models import TinyModel
from tests.oracles import oracles
from tests.support import assert_gradients, batch, gradients, same_bits, seeded

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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout": "same"},
        {"random_start": True, "epsilon": 0.5},
        {"random_start": True, "epsilon": 0.5, "dropout": "same"},
        {"start_step": 2, "every": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize(("name", "scope"), [case for case in WHERE if case[1] in ("sample", "table")])
def test_replays_are_the_steps_bit_for_bit(name: str, scope: str, options: dict[str, Any]) -> None:
    """Losses, gradients and weights of six batches, with dropout; the second half without clearing gradients."""
    if name in ("freeat", "neftune") and "random_start" in options:
        pytest.skip("its start is its own")
    found = []
    for captured in (False, True):
        model = seeded(lambda: TinyModel("tfm", dropout=0.2), dtype=torch.float32).cuda()
        adv = EVERY[name](model, embedding=model.word_embeddings, scope=scope, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step: Any = stepping(model, adv)
        model(**moved(batch(seed=9))).loss.backward()  # a gradient that is there before the first step
        if captured:
            step = adv.capture(step, moved(batch(seed=8)))
        torch.manual_seed(7)
        seen = []
        for index in range(6):
            result = step(moved(batch(seed=index)))
            seen += [result.loss.clone(), *gradients(model).values()]
            optimizer.step()
            if index < 3:
                optimizer.zero_grad()
        assert (adv._schedule.now, adv.attacked) == (5, 6 if "every" not in options else 2)
        found.append([*seen, *(p.detach().clone() for p in model.parameters()), torch.cuda.get_rng_state()])
        adv.close()
    assert all(same_bits(one, other) for one, other in zip(*found, strict=True))


def test_what_is_accumulated_stays_where_it_was_kept() -> None:
    """`.grad` that is not the graph's own is added to, and replays do not write over what they returned."""
    model = seeded(TinyModel, dtype=torch.float32).cuda()
    adv = fastadv.PGD(model, embedding=model.word_embeddings)
    data = moved(batch())
    step = adv.capture(stepping(model, adv), data)
    first = step(data)
    once, loss = gradients(model), first.loss.clone()
    step(moved(batch(seed=5)))
    assert same_bits(first.loss, loss)
    model.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    step(data)
    assert_gradients(gradients(model), {name: 1 + grad for name, grad in once.items()}, 1e-6)


def test_a_batch_of_another_shape_is_refused() -> None:
    model = seeded(TinyModel, dtype=torch.float32).cuda()
    adv = fastadv.PGD(model, embedding=model.word_embeddings)
    step = adv.capture(stepping(model, adv), batch())
    step(batch(seed=2))  # from the CPU
    with pytest.raises(ValueError, match="pad the batch to that shape"):
        step(batch(length=5))


def test_a_step_that_waits_cannot_be_captured_and_says_so() -> None:
    model, data = seeded(TinyModel, dtype=torch.float32).cuda(), moved(batch())
    adv = fastadv.PGD(model, embedding=model.word_embeddings)
    step = stepping(model, adv)
    with pytest.raises(RuntimeError, match="cannot record"):
        adv.capture(lambda data: float(step(data).loss), data)
    assert adv.attacked == 0
    step(data)  # the method still works


@pytest.mark.parametrize(("name", "make"), every_but("yopo").items(), ids=every_but("yopo"))
def test_bert_under_autocast(name: str, make: Callable[..., fastadv.Method]) -> None:
    """In bfloat16, on a real model: eager and captured steps agree, and no id is out of range."""
    found = []
    for captured in (False, True):
        model, data = tiny_bert(0.0, torch.float32).cuda(), moved(text())
        adv = make(model, scope="sample")

        def run(data: dict[str, Tensor], model: nn.Module = model, adv: fastadv.Method = adv) -> fastadv.StepResult:
            def loss() -> Tensor:
                with torch.autocast("cuda", torch.bfloat16):
                    return model(**data).loss  # type: ignore[no-any-return]

            return adv.backward(loss, mask=data["attention_mask"])

        step = adv.capture(run, data) if captured else run
        assert step(data).loss.isfinite()
        adv.check()
        found.append(gradients(model))
        adv.close()
    assert_gradients(found[1], found[0], 1e-2)


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
