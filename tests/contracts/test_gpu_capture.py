"""Every method as a CUDA graph: what a replay computes and draws, and what a capture that fails leaves behind.

Nothing here can be shown without a device; tests/engine/test_capture.py has the parts that can.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from tests.bert import text, tiny_bert
from tests.every import EVERY, every_but, in_scopes
from tests.models import TinyModel
from tests.support import assert_gradients, batch, gradients, same_bits, seeded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Data = dict[str, Tensor]


def moved(data: Data) -> Data:
    return {name: tensor.cuda() for name, tensor in data.items()}


def stepping(model: nn.Module, adv: fastadv.Method) -> Callable[[Data], fastadv.StepResult]:
    return lambda data: adv.backward(lambda: model(**data), mask=data["attention_mask"])


def tiny(dropout: float = 0.0) -> Any:
    return seeded(lambda: TinyModel("tfm", dropout=dropout), dtype=torch.float32).cuda()


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
@pytest.mark.parametrize(("name", "scope"), in_scopes("sample", "table"))
def test_replays_are_the_steps(name: str, scope: str, options: dict[str, Any]) -> None:
    """Losses, gradients and generators of five batches, with dropout and an optimizer: bit for bit.

    But for the last one's gradients: there are some already, to which a replay adds its passes' sum, and a step pass by
    pass.
    """
    if name in ("freeat", "neftune") and "random_start" in options:
        pytest.skip("its start is its own")
    found: list[list[list[Tensor]]] = []
    for captured in (False, True):
        model = tiny(dropout=0.2)
        adv = EVERY[name](model, embedding=model.word_embeddings, scope=scope, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step: Any = stepping(model, adv)
        if captured:
            model(**moved(batch(seed=9))).loss.backward()  # a gradient that capturing has to leave alone
            step = adv.capture(step, moved(batch(seed=8)))
            model.zero_grad()
        torch.manual_seed(7)
        seen = []
        for index in range(5):
            result = step(moved(batch(seed=index)))
            seen.append([result.loss.clone(), *gradients(model).values(), torch.cuda.get_rng_state()])
            optimizer.step()
            if index < 3:
                optimizer.zero_grad()
        assert (adv._schedule.now, adv.attacked) == (4, 5 if "every" not in options else 2)
        found.append(seen)
        adv.close()
    for index, (eager, replayed) in enumerate(zip(*found, strict=True)):
        assert same_bits(eager[0], replayed[0]), f"loss, batch {index}"
        assert same_bits(eager[-1], replayed[-1]), f"generator, batch {index}"
        for one, other in zip(eager[1:-1], replayed[1:-1], strict=True):
            if index < 4:
                assert same_bits(one, other), f"batch {index}"
            else:
                assert_gradients({"": other}, {"": one}, 1e-5, absolute=1e-6)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("options", [{}, {"random_start": 0.5}], ids=str)
def test_a_function_may_draw_first_and_step_twice(options: dict[str, Any], steps: int) -> None:
    """dropout="same" goes back to where its own step's first pass began, and each step has starts of its own."""
    found = []
    for captured in (False, True):
        model = tiny(dropout=0.2)
        adv = fastadv.PGD(model, embedding=model.word_embeddings, dropout="same", scope="sample", **options)

        def run(data: Data, model: nn.Module = model, adv: fastadv.Method = adv) -> list[Tensor]:
            noise = torch.rand(3, 5, device="cuda")
            one = stepping(model, adv)
            return [noise, *(one(data).loss for _ in range(steps))]

        step = adv.capture(run, moved(batch(seed=8))) if captured else run
        torch.manual_seed(7)
        seen = []
        for index in range(3):
            model.zero_grad()
            seen += [value.clone() for value in step(moved(batch(seed=index)))]
            seen += gradients(model).values()
        found.append([*seen, torch.cuda.get_rng_state(), torch.get_rng_state()])
    assert all(same_bits(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(("name", "make"), every_but("yopo").items(), ids=every_but("yopo"))
@pytest.mark.parametrize("around", [False, True])
def test_bert_under_autocast(name: str, make: Callable[..., fastadv.Method], around: bool) -> None:
    """In bfloat16, on a real model: steps and replays agree after an optimizer step too, and no id is out of range.

    `around`: the autocast is on when the step is captured, and its casts of weights would be what the graph reads.
    """
    found = []
    for captured in (False, True):
        model, data = tiny_bert(0.0, torch.float32).cuda(), moved(text())
        adv = make(model, scope="sample")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def run(data: Data, model: nn.Module = model, adv: fastadv.Method = adv) -> fastadv.StepResult:
            def loss() -> Tensor:
                with torch.autocast("cuda", torch.bfloat16, enabled=not around):
                    return model(**data).loss  # type: ignore[no-any-return]

            def inherited() -> Tensor:
                return model(**data).loss  # type: ignore[no-any-return]

            return adv.backward(inherited if around else loss, mask=data["attention_mask"])

        with torch.autocast("cuda", torch.bfloat16, enabled=around):
            step = adv.capture(run, data) if captured else run
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=around):
                assert step(data).loss.isfinite()
            adv.check()
            kept = gradients(model)
            optimizer.step()
        found.append(kept)
        adv.close()
    # The floor: gradients of key.bias are rounding alone, and an attention's backward may add up in any order.
    assert_gradients(found[1], found[0], 1e-2, floor=1e-5)


def test_what_is_accumulated_stays_where_it_was_kept() -> None:
    """`.grad` that is not the graph's own is added to, and replays do not write over what they returned."""
    model = tiny()
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
    model = tiny()
    adv = fastadv.PGD(model, embedding=model.word_embeddings)
    step = adv.capture(stepping(model, adv), batch())
    step(batch(seed=2))  # from the CPU
    with pytest.raises(ValueError, match="pad the batch to that shape"):
        step(batch(length=5))


FAILS = """
import torch, fastadv
from tests.contracts.test_gpu_capture import batch, moved, stepping, tiny

model, data = tiny(dropout=0.2), moved(batch())
adv = fastadv.PGD(model, embedding=model.word_embeddings)
step, stream = stepping(model, adv), torch.cuda.current_stream()
capturing = torch.cuda.is_current_stream_capturing
for fault in (lambda data: float(step(data).loss), lambda data: [step(data), 1 // (1 - capturing())]):
    attacked = adv.attacked
    try:
        adv.capture(fault, data)
    except RuntimeError as error:
        assert "cannot record" in str(error), error
    except ZeroDivisionError:
        pass
    else:
        raise AssertionError("it was captured")
    assert torch.cuda.current_stream() == stream
    assert adv.attacked == attacked
    step(data)  # draws dropout masks
torch.manual_seed(3)
want = step(data).loss.clone()
replay = adv.capture(step, data)
torch.manual_seed(3)
assert torch.equal(replay(data).loss, want)
torch.cuda.synchronize()
torch.cuda.empty_cache()
print("went on")
"""


def test_a_capture_that_fails_leaves_the_process_as_it_was() -> None:
    """In a process of its own: the stream, the generator and the allocator are the whole process's."""
    done = subprocess.run([sys.executable, "-c", FAILS], capture_output=True, text=True, timeout=120, check=False)
    assert "went on" in done.stdout, done.stderr[-4000:]


def test_garbage_is_not_collected_while_a_step_is_captured() -> None:
    """A graph in a reference cycle: destroying it would end the capture."""
    model, data = tiny(), moved(batch())
    adv = fastadv.PGD(model, embedding=model.word_embeddings)

    def run(data: Data) -> fastadv.StepResult:
        cycle: list[Any] = [torch.cuda.CUDAGraph()]
        cycle.append(cycle)
        del cycle
        for _ in range(2_000):
            _ = [[] for _ in range(10)]  # would set the collector off
        return stepping(model, adv)(data)

    adv.capture(run, data)(data)
    assert gc.isenabled()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_another_device_than_the_current_one() -> None:
    model, data = tiny(dropout=0.2).to("cuda:1"), {name: one.to("cuda:1") for name, one in batch().items()}
    adv = fastadv.PGD(model, embedding=model.word_embeddings, dropout="same")
    step = stepping(model, adv)
    torch.manual_seed(3)
    want = step(data).loss.clone()
    replay = adv.capture(step, data)
    torch.manual_seed(3)
    assert torch.equal(replay(data).loss, want)
    assert torch.cuda.current_device() == 0
