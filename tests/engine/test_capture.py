"""What a captured step is on the CPU: what it takes in, what it refuses, and that warming up for it leaves no trace."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadv
from fastadv.engine.capture.graph import Inputs, _undone
from tests.every import EVERY, every_but
from tests.models import Stateful, TinyModel
from tests.support import assert_unchanged, batch, gradients, refused, same_bits, seeded, snapshot

CPU = torch.device("cpu")


def stepping(model: Any, adv: fastadv.Method) -> Callable[[dict[str, Tensor]], fastadv.StepResult]:
    return lambda data: adv.backward(lambda: model(**data), mask=data["attention_mask"])


@pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)
def test_only_a_cuda_device_captures(method: Callable[..., fastadv.Method]) -> None:
    model = seeded(TinyModel)
    adv = method(model, embedding=model.word_embeddings, scope="sample")
    message = "capture() records a CUDA graph, and the model is on the cpu: call backward()"
    refused(model, lambda: adv.capture(stepping(model, adv), batch()), RuntimeError, message)


def test_freeat_is_captured_only_where_every_replay_is_the_same_step() -> None:
    model = seeded(TinyModel)
    adv = fastadv.FreeAT(model, embedding=model.word_embeddings, carry=False)
    refused(model, lambda: adv.capture(stepping(model, adv), batch()), ValueError, "carry=True")


class TestInputs:
    def test_another_batch_lands_in_the_same_memory(self) -> None:
        inputs, other = Inputs(batch(), CPU), batch(seed=2)
        places = {name: tensor.data_ptr() for name, tensor in inputs.batch.items()}
        inputs.copy(other)
        assert {name: tensor.data_ptr() for name, tensor in inputs.batch.items()} == places
        assert all(torch.equal(inputs.batch[name], other[name]) for name in other)

    def test_the_example_stays_the_users(self) -> None:
        example = torch.ones(2)
        inputs = Inputs((example, [torch.zeros(1), "label"]), CPU)
        inputs.copy((torch.zeros(2), [torch.ones(1), "label"]))
        assert example.tolist() == [1, 1]
        assert [inputs.batch[0].tolist(), inputs.batch[1][0].tolist()] == [[0, 0], [1]]

    @pytest.mark.parametrize(
        ("other", "phrase"),
        [
            ({"ids": torch.zeros(2, 3), "k": 1}, "float32 [2, 3], but the step was captured with torch.int64 [2, 3]"),
            ({"ids": torch.zeros(2, 4, dtype=torch.int64), "k": 1}, "pad the batch to that shape"),
            ({"ids": 5, "k": 1}, "tensor 0 of the batch is 5"),
            ({"ids": torch.zeros(2, 3, dtype=torch.int64), "k": 2}, "the captured batch had 1 where this one has 2"),
            ({"ids": torch.zeros(2, 3, dtype=torch.int64)}, "another structure"),
            ([torch.zeros(2, 3, dtype=torch.int64), 1], "another structure"),
        ],
    )
    def test_what_differs_is_refused_before_anything_is_copied(self, other: Any, phrase: str) -> None:
        inputs = Inputs({"ids": torch.full((2, 3), 7), "k": 1}, CPU)
        with pytest.raises(ValueError, match=re.escape(phrase)):
            inputs.copy(other)
        assert inputs.batch["ids"].unique().tolist() == [7]

    @pytest.mark.parametrize("example", [{}, [], None, ("label", 3)])
    def test_there_must_be_a_tensor(self, example: Any) -> None:
        with pytest.raises(TypeError, match=r"capture\(\) needs a batch with tensors"):
            Inputs(example, CPU)


@pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)
def test_rewound_a_method_goes_on_as_if_nothing_had_been(method: Callable[..., fastadv.Method]) -> None:
    """What capture() does around its warm-up; in the same memory, since a graph knows the addresses."""
    found = []
    for warmed in (False, True):
        model = seeded(lambda: TinyModel(dropout=0.2))
        adv = method(model, embedding=model.word_embeddings, scope="sample", start_step=1)
        step = stepping(model, adv)
        torch.manual_seed(3)
        step(batch(seed=3))
        if warmed:
            with _undone(adv, CPU):
                for _ in range(3):
                    adv._enter()
                    step(batch(seed=4))
            memory = {tensor.data_ptr() for tensor in adv._memory()}
        model.zero_grad()
        step(batch())
        if warmed:
            assert memory <= {tensor.data_ptr() for tensor in adv._memory()}
        assert (adv._schedule.now, adv.attacked, int(adv.skipped)) == (1, 1, 0)
        found.append(gradients(model))
        adv.close()
    assert all(same_bits(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("method", every_but("yopo").values(), ids=every_but("yopo"))
@pytest.mark.parametrize("fails", [False, True])
def test_warming_up_leaves_no_trace(method: Callable[..., fastadv.Method], fails: bool) -> None:
    """Not in running statistics, gradients (which stay the same tensors), the counters or the generator."""
    model, data = seeded(Stateful), batch()
    adv = method(model, embedding=model.embed, scope="sample")
    model(data["input_ids"], data["labels"]).loss.backward()
    before = snapshot(model)
    with contextlib.suppress(ArithmeticError), _undone(adv, CPU):
        assert all(parameter.grad is None for parameter in model.parameters())
        adv._enter()
        adv.backward(lambda: model(data["input_ids"], data["labels"]))
        assert adv.attacked == 1
        if fails:
            raise ArithmeticError
    assert_unchanged(model, before)
    assert adv.attacked == 0
    assert int(adv.state_dict()["calls"]) == 0
