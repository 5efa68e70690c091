"""AWP puts weights back: after a step, a fault and an evaluation; where no weight moves; and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastadv
from fastadv.methods.awp_weights import MovedWeights
from tests.models import Stateful, TinyModel
from tests.support import (
    assert_close,
    assert_unchanged,
    batch,
    clear,
    ready,
    refused,
    same_bits,
    seeded,
    snapshot,
    with_gradients,
)


@pytest.mark.parametrize("fails_in", ["closure", "backward"])
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
        adv.backward(closure)
    except KeyboardInterrupt:
        assert_unchanged(model, before)
    else:
        pytest.fail("it should have failed")


def test_an_error_inside_perturbed_leaves_the_weights() -> None:
    model, data = with_gradients("tfm"), batch()
    adv, before = fastadv.AWP(model, gamma=0.05), snapshot(model)
    with pytest.raises(KeyboardInterrupt), adv.perturbed(lambda: model(**data)):
        raise KeyboardInterrupt
    assert_unchanged(model, before)
    adv.backward(lambda: model(**data))


def test_no_step_runs_inside_perturbed() -> None:
    """It would take the moved weights for the model's own."""
    model, data = with_gradients("tfm"), batch()
    adv, before = fastadv.AWP(model, gamma=0.05), snapshot(model)
    with adv.perturbed(lambda: model(**data)), pytest.raises(RuntimeError, match="already running"):
        adv.backward(lambda: model(**data))
    assert_unchanged(model, before)


def test_awp_perturbs_for_evaluation() -> None:
    model, data = with_gradients("tfm"), batch()
    adv, before = fastadv.AWP(model, gamma=0.05), snapshot(model)
    with adv.perturbed(lambda: model(**data)):
        worse = model(**data).loss.detach()
    assert_unchanged(model, before)
    assert worse > model(**data).loss


def test_awp_stays_where_a_gradient_is_not_finite() -> None:
    """That weight is counted and does not move; the others do."""
    model, data, _ = ready()
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
def test_arguments(options: dict[str, Any], error: type[Exception], phrases: list[str]) -> None:
    model = with_gradients("tfm")
    refused(model, lambda: fastadv.AWP(model, **options), error, *phrases)


@pytest.mark.parametrize("options", [{"gamma": 0.1}, {"gamma": 1.0, "epsilon": 0.01}], ids=["plain", "within a reach"])
@pytest.mark.parametrize("scale", [1e-37, 1e-41, 3e-44])
def test_a_gradient_of_next_to_nothing_moves_as_far_as_any(scale: float, options: dict[str, Any]) -> None:
    """|w| / |g| is beyond float32 then."""
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    moved = MovedWeights([weight], None)
    moved.set_out([])
    moved.step([torch.tensor([scale, 0.0])], options["gamma"], options.get("epsilon"))
    assert weight.isfinite().all()
    if "epsilon" not in options:
        assert weight.tolist() == pytest.approx([3.5, 4.0], rel=1e-5)
    moved.put_back()
    assert weight.tolist() == [3.0, 4.0]
    assert int(moved.skipped) == 0
    assert float(moved.norm) == pytest.approx(0.5, rel=1e-5) or "epsilon" in options


def test_a_deepspeed_engine_is_refused() -> None:
    engine = type("DeepSpeedEngine", (TinyModel,), {"__module__": "deepspeed.runtime.engine"})
    with pytest.raises(ValueError, match="DeepSpeed keeps them elsewhere"):
        fastadv.AWP(engine("mlp"))
