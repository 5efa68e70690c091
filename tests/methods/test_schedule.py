"""When a step is attacked, who takes its backward, and what is in `.grad` when it is not the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadv
from fastadv import reference
from tests.every import EVERY, every_but, in_scopes
from tests.models import TinyModel
from tests.oracles import oracles
from tests.support import assert_close, assert_gradients, batch, clear, gradients, record, relative, same_bits, seeded


def ready(dtype: torch.dtype = torch.float64) -> tuple[TinyModel, dict[str, Tensor], Callable[[], Any]]:
    model, data = seeded(lambda: TinyModel("tfm"), dtype=dtype), batch()
    return model, data, lambda: model(**data)


@pytest.mark.parametrize("method", every_but("freeat").values(), ids=every_but("freeat"))
@pytest.mark.parametrize(
    ("options", "attacked"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"start_step": 3}, [3, 4, 5, 6, 7]),
        ({"every": 3}, [0, 3, 6]),
        ({"start_step": 1, "every": 4}, [1, 5]),
        ({"start_step": 100}, []),
    ],
    ids=str,
)
def test_start_step_and_every(method: Any, options: dict[str, int], attacked: list[int]) -> None:
    """Other steps are plain training, to the bit."""
    model, _, closure = ready()
    adv = method(model, embedding=model.word_embeddings, **options)
    closure().loss.backward()
    plain = gradients(model)
    done = []
    for step in range(8):
        clear(model)
        result = adv.backward(closure)
        if result.adv_loss is not None:
            done.append(step)
            assert relative(*(g["classifier.weight"] for g in (gradients(model), plain))) > 0.01
        else:
            assert all(same_bits(grad, plain[name]) for name, grad in gradients(model).items())
        if method is not EVERY["neftune"]:  # no pass of it is clean
            assert same_bits(result.loss, closure().loss.detach())
        assert result.output.logits.requires_grad is False
    assert done == attacked
    assert adv.attacked == len(attacked)
    assert isinstance(adv.attacked, int)


def test_the_callers_step_counts_where_it_is_given() -> None:
    """Under gradient accumulation every micro-batch of a step has that step's number."""
    model, _, closure = ready()
    adv = fastadv.FGM(model, embedding=model.word_embeddings, start_step=2, every=2)
    seen = [adv.backward(closure, step=step).adv_loss is not None for step in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)]
    assert seen == [False] * 4 + [True] * 2 + [False] * 2 + [True] * 2


@pytest.mark.parametrize(("method", "passes"), [(fastadv.FGM, 2), (fastadv.PGD, 4)])
@pytest.mark.parametrize(("clean_weight", "full"), [(1.0, 2), (0.0, 1), (0.5, 2)])
def test_backward_takes_every_full_pass_and_no_probe(method: Any, passes: int, clean_weight: float, full: int) -> None:
    model, _, closure = ready()
    losses: list[Tensor] = []
    forwards = []

    def backward(loss: Tensor) -> None:
        losses.append(loss.detach())
        loss.backward()

    def counted() -> Any:
        forwards.append(1)
        return closure()

    adv = method(model, embedding=model.word_embeddings, clean_weight=clean_weight, adv_weight=0.5, backward=backward)
    result = adv.backward(counted)
    assert len(forwards) == passes
    assert len(losses) == full
    assert_close(losses[-1], 0.5 * result.adv_loss, 1e-12, "the loss that backward was given")
    if full == 2:
        assert_close(losses[0], clean_weight * result.loss, 1e-12, "the clean loss that backward was given")
    mine = gradients(model)
    clear(model)
    other = method(
        seeded(lambda: TinyModel("tfm")), embedding="word_embeddings", clean_weight=clean_weight, adv_weight=0.5
    )
    twin = other.engine.model
    other.backward(lambda: twin(**batch()).loss)
    assert_gradients(mine, gradients(twin), 1e-12)


@pytest.mark.parametrize(("name", "scope"), in_scopes("table", "sample", without="freeat"))
def test_scaler(name: str, scope: str) -> None:
    """Gradients come out scaled, as after `scaler.scale(loss).backward()`; the perturbation is the same."""
    method = EVERY[name]
    model, _, closure = ready(torch.float32)
    plain = method(model, embedding=model.word_embeddings, scope=scope)
    with record(model) as seen:
        plain.backward(closure)
    want = gradients(model)
    plain.close()
    clear(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    adv = method(model, embedding=model.word_embeddings, scope=scope, scaler=scaler)
    with record(model) as seen_scaled:
        adv.backward(closure)
    assert_gradients({name: grad / 2**10 for name, grad in gradients(model).items()}, want, 1e-5)
    for mine, its in zip(seen_scaled, seen, strict=True):
        assert_close(mine, its, 1e-6, "embedding")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.classifier.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert_close(model.classifier.weight, before - 0.1 * want["classifier.weight"], 1e-6, "weight")


def test_a_scaler_reaches_the_probes() -> None:
    """The loss's gradient is below what float32 holds: only a scaled probe sees a direction."""
    model, _, closure = ready(torch.float32)
    adv = fastadv.PGD(
        model,
        embedding=model.word_embeddings,
        scope="sample",
        clean_weight=0,
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**100),
    )
    adv.backward(lambda: closure().loss * 2.0**-149)
    assert float(adv.perturbation_norm) > 0.5


@pytest.mark.parametrize(("name", "scope"), in_scopes("table", "sample", without="freeat"))
def test_accumulation_follows_the_direction_of_the_micro_batch_alone(name: str, scope: str) -> None:
    model, _, first = ready()
    second_batch = batch(seed=9)
    runs = []
    for closures in ([first], [lambda: model(**second_batch)], [first, lambda: model(**second_batch)]):
        clear(model)
        adv = EVERY[name](model, embedding=model.word_embeddings, scope=scope)
        with record(model) as seen:
            for closure in closures:
                adv.backward(closure)
        adv.close()
        runs.append((gradients(model), seen))
    (one, seen_one), (two, seen_two), (both, seen_both) = runs
    assert_gradients(both, {name: one[name] + two[name] for name in one}, 1e-12)
    for mine, alone in zip(seen_both, seen_one + seen_two, strict=True):
        assert_close(mine, alone, 1e-12, "embedding")


def test_the_reference_follows_the_accumulated_gradient_as_the_script_does() -> None:
    """A defect of the classic script, kept in the reference and not in the engine."""
    model, _, first = ready()
    second_batch = batch(seed=9)
    weight = model.word_embeddings.weight
    first().loss.backward()
    with record(model) as seen:
        reference.fgm(model, lambda: model(**second_batch).loss, model.word_embeddings, epsilon=0.5)
    ids = second_batch["input_ids"]
    moved = (seen[1] - seen[0]).detach()
    clear(model)
    first().loss.backward()
    model(**second_batch).loss.backward()
    assert_close(moved, (0.5 * weight.grad / weight.grad.norm())[ids], 1e-9, "the script's direction")
    clear(model)
    model(**second_batch).loss.backward()
    own = (0.5 * weight.grad / weight.grad.norm())[ids]
    assert relative(moved, own) > 0.1


@pytest.mark.parametrize("clean_weight", [1.0, 0.0])
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_attack_follows_another_loss(scope: str, clean_weight: float) -> None:
    """The ascent maximises what `attack` returns (here: closeness to a target); the gradients are of the loss."""
    model, data, closure = ready()
    ids, weight = data["input_ids"], model.word_embeddings.weight
    target = (data["labels"] + 1) % 3

    def loss_at(embeds: Tensor, labels: Tensor) -> Tensor:
        return model(None, data["attention_mask"], labels, embeds).loss

    adv = fastadv.PGD(model, epsilon=0.5, embedding=model.word_embeddings, scope=scope, clean_weight=clean_weight)
    with record(model) as seen:
        result = adv.backward(closure, attack=lambda: -model(ids, data["attention_mask"], target).loss)
    path = oracles.attack(
        model,
        lambda e: -loss_at(e, target),
        weight,
        ids,
        scope=scope,
        epsilon=0.5,
        step_size=0.3,
        steps=3,
        clean_weight=0,
    )
    assert_close(seen[-1] - weight[ids], path.perturbations[-1], 1e-9, "perturbation")
    adversarial = loss_at(weight[ids] + path.perturbations[-1], data["labels"])
    total = adversarial + clean_weight * loss_at(weight[ids], data["labels"])
    assert_gradients(gradients(model), oracles.gradients_of(model, total), 1e-9)
    assert_close(result.adv_loss, adversarial, 1e-9, "adv_loss")
    if clean_weight:
        assert_close(result.loss, closure().loss, 1e-9, "loss")


def returns(model: TinyModel, data: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """All that a closure may return."""
    return {
        "tensor": lambda: model(**data).loss,
        "output": lambda: model(**data),
        "dict": lambda: model(**data)._asdict(),
        "tuple": lambda: tuple(model(**data)),
        "list": lambda: list(model(**data)),
        "one-element": lambda: model(**data).loss.reshape(1),
    }


@pytest.mark.parametrize("form", ["output", "dict", "tuple", "list", "one-element"])
def test_what_a_closure_may_return(form: str) -> None:
    model, data, _ = ready()
    adv = fastadv.PGD(model, embedding=model.word_embeddings)
    adv.backward(returns(model, data)["tensor"])
    want = gradients(model)
    clear(model)
    result = adv.backward(returns(model, data)[form])
    assert_gradients(gradients(model), want, 1e-12)
    assert type(result.output) is type(returns(model, data)[form]())
    assert result.loss.shape == result.adv_loss.shape == ()
    assert not result.loss.requires_grad
    assert not result.adv_loss.requires_grad
    assert set(vars(fastadv.StepResult)) >= {"loss", "adv_loss", "output"}
