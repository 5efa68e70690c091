"""What a captured step is on the CPU: what it takes in, what it refuses, and that warming up for it leaves no trace."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastadv
from fastadv.engine.capture.graph import Inputs, _undone, add, set_aside
from fastadv.engine.capture.recording import casts_apart, no_garbage
from tests.every import EVERY, every_but
from tests.models import Stateful, TinyModel
from tests.support import assert_gradients, assert_unchanged, batch, gradients, refused, same_bits, seeded, snapshot

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


def test_a_buffer_that_is_expanded_is_put_back() -> None:
    """Of position ids that are one row for all samples, no element can be copied to by itself."""
    model, data = seeded(Stateful), batch()
    expanded = torch.arange(5).expand(3, 5)
    model.register_buffer("positions", expanded)
    adv = fastadv.PGD(model, embedding=model.embed, scope="sample")
    with _undone(adv, CPU):
        adv.backward(lambda: model(data["input_ids"], data["labels"]))
        expanded[:1] += 1
    assert model.positions is expanded
    assert expanded[2].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", every_but("yopo").values(), ids=every_but("yopo"))
def test_what_a_replay_adds_to_is_what_a_step_adds_to(method: Callable[..., fastadv.Method]) -> None:
    """The same bits where no gradient is there; else the sum over the passes comes first, and only rounding differs."""
    found = []
    for replayed in (False, True):
        model = seeded(lambda: TinyModel("tfm"), dtype=torch.float32)
        adv = method(model, embedding=model.word_embeddings, scope="sample")
        step, places = stepping(model, adv), {p: torch.zeros_like(p) for p in model.parameters()}
        seen = []
        for seed in range(3):
            if replayed:
                graphs = list(places.items())
                earlier = set_aside(graphs)
                model.zero_grad()
                step(batch(seed=seed))
                for parameter, mine in graphs:
                    mine.copy_(torch.zeros_like(mine) if parameter.grad is None else parameter.grad)
                add(graphs, earlier)
                assert all(parameter.grad is mine for parameter, mine in graphs)
            else:
                step(batch(seed=seed))
            seen.append({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in all_of(model)})
        found.append(seen)
    assert all(same_bits(found[0][0][name] + 0, found[1][0][name] + 0) for name in found[0][0])
    for one, other in zip(*found, strict=True):
        assert_gradients(other, one, 1e-5)


def all_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


class Casts(TorchDispatchMode):
    """Counts the casts of a matrix to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        casts = func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16
        self.count += casts and args[0].dim() == 2
        return func(*args, **(kwargs or {}))


def casts_of(run: Callable[[], Any]) -> int:
    with Casts() as casts:
        run()
    return casts.count


def test_a_run_that_is_recorded_casts_weights_itself() -> None:
    """Under an autocast that is on around it: not the casts of the run before, and none for the run after."""
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        plain = [casts_of(lambda: layer(x)) for _ in range(2)]
        assert plain == [2, 1]  # the weight's cast is kept, the input's is not
        with casts_apart():
            assert [casts_of(lambda: layer(x)) for _ in range(2)] == [2, 1]
        assert casts_of(lambda: layer(x)) == 2


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_waits(enabled: bool) -> None:
    try:
        gc.enable() if enabled else gc.disable()
        with contextlib.suppress(ArithmeticError), no_garbage():
            assert not gc.isenabled()
            raise ArithmeticError
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
