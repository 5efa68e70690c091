"""suggest_radius: the loss rises by what was asked for, and nothing else has changed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import fastadv
from fastadv.methods.radius import RISE, WITHIN, _search
from fastadv.methods.radius_losses import Task

CLASSES, WORDS, DIM = 3, 30, 8


class Bag(nn.Module):
    """Classifies by the mean of its words, with dropout that would disturb a measurement."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, DIM)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, input_ids: Any, labels: Any, attention_mask: Any = None) -> Any:
        logits = self.head(self.dropout(self.embedding(input_ids).mean(1)))
        if labels.is_floating_point():
            return {"loss": nn.functional.mse_loss(logits[:, 0], labels)}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def batches(count: int = 8, size: int = 16) -> list[dict[str, torch.Tensor]]:
    """The class is that of a text's words: ten words belong to each."""
    made = []
    for _ in range(count):
        labels = torch.randint(CLASSES, (size,))
        ids = labels[:, None] * (WORDS // CLASSES) + torch.randint(WORDS // CLASSES, (size, 5))
        made.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return made


def trained(data: list[dict[str, torch.Tensor]], steps: int = 60) -> Bag:
    torch.manual_seed(0)
    model = Bag()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for index in range(steps):
        optimizer.zero_grad()
        model(**data[index % len(data)])["loss"].backward()
        optimizer.step()
    model.zero_grad()
    return model


def flat(tensors: Any) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in tensors])


def loss_at(model: Bag, batch: Any, **options: Any) -> float:
    """By hand: the loss at FGM's perturbation, dropout off."""
    model = copy.deepcopy(model).eval()
    with fastadv.FGM(model, **options) as adv, adv.perturbed(lambda: model(**batch)), torch.no_grad():
        return float(model(**batch)["loss"])


@pytest.mark.parametrize(("scope", "norm"), [("sample", "l2"), ("token", "l2"), ("table", "l2"), ("sample", "linf")])
def test_the_loss_rises_by_what_was_asked_for(scope: Any, norm: Any) -> None:
    data = batches()
    model = trained(data)
    radius = fastadv.suggest_radius(model, data, scope=scope, norm=norm, rise=0.3)
    at = [loss_at(model, batch, epsilon=float(radius), scope=scope, norm=norm) for batch in data[-2:]]
    clean = [loss_at(model, batch, epsilon=0.0, scope=scope, norm=norm) for batch in data[-2:]]
    assert sum(at) / 2 - sum(clean) / 2 == pytest.approx(0.3, rel=0.06)
    assert radius.adv_loss == pytest.approx(sum(at) / 2) and radius.loss == pytest.approx(sum(clean) / 2)
    unit = model.embedding.weight.detach().norm(dim=1).mean()
    assert radius.relative == pytest.approx(float(radius) / float(unit)) and not radius.fitted
    assert radius.curve[-1] == (radius, radius.adv_loss)


def test_relative_is_in_units_of_the_rows() -> None:
    data = batches()
    model = trained(data)
    radius = fastadv.suggest_radius(model, data)
    relative = fastadv.suggest_radius(model, data, relative=True)
    assert float(relative) == pytest.approx(radius.relative, rel=0.1) and relative.relative == relative


def test_radii_among_the_options_are_fractions_of_it() -> None:
    data = batches()
    model = trained(data)
    radius = fastadv.suggest_radius(model, data, fastadv.PGD, step_size=0.5, steps=2, random_start=0.1)
    model.eval()
    adv = fastadv.PGD(model, epsilon=radius, step_size=radius / 2, steps=2, random_start=radius / 10, scope="sample")
    found = []
    for batch in data[-2:]:
        with adv.perturbed(lambda batch=batch: model(**batch), mask=batch["attention_mask"]), torch.no_grad():
            found.append(float(model(**batch)["loss"]))
    assert sum(found) / 2 == pytest.approx(radius.adv_loss, rel=0.1)


@pytest.mark.parametrize(
    "method", [fastadv.FGSM, fastadv.FreeAT, fastadv.FreeLB, fastadv.YOPO, fastadv.SMART, fastadv.VAT, fastadv.LLR]
)
def test_every_method_with_a_radius_has_one(method: Any) -> None:
    data = batches()
    options = {"step_size": 0.3, "random_start": 0.1} if method in (fastadv.FreeLB, fastadv.YOPO) else {}
    split = {"split": "dropout"} if method is fastadv.YOPO else {}
    radius = fastadv.suggest_radius(trained(data), data, method, **options, **split)
    assert radius.adv_loss - radius.loss == pytest.approx(RISE, rel=0.06)


def test_nothing_else_changes() -> None:
    data = batches()
    model = trained(data)
    model(**data[0])["loss"].backward()
    model.head.eval()  # a mode of its own
    untrained = Bag()
    untouched = flat(untrained.parameters())
    before, gradients = flat(model.parameters()), flat(one.grad for one in model.parameters())
    state, modes = torch.get_rng_state(), [one.training for one in model.modules()]
    fastadv.suggest_radius(model, data, fastadv.PGD, step_size=0.5, random_start=0.1)
    fastadv.suggest_radius(untrained, data, fastadv.PGD, step_size=0.5, random_start=0.1, fit=40, learning_rate=0.02)
    assert torch.equal(untouched, flat(untrained.parameters()))
    assert torch.equal(before, flat(model.parameters()))
    assert torch.equal(gradients, flat(one.grad for one in model.parameters()))
    assert torch.equal(state, torch.get_rng_state()) and modes == [one.training for one in model.modules()]
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


def test_a_model_that_has_not_learnt_learns_on_a_copy() -> None:
    data = batches(16)
    torch.manual_seed(1)
    model = Bag()
    before = flat(model.parameters())
    radius = fastadv.suggest_radius(model, iter(data), fit=40, learning_rate=0.02)
    assert radius.fitted == 40 and radius.foreign is not None and radius.foreign - radius.loss > RISE / 3
    assert torch.equal(before, flat(model.parameters()))
    learnt = fastadv.suggest_radius(trained(data), data)
    assert not learnt.fitted and 0.3 < radius / learnt < 3


def test_one_that_cannot_learn_is_an_error() -> None:
    data = batches(4)
    for batch in data:
        batch["labels"] = batch["labels"].roll(1)
    with pytest.raises(RuntimeError, match="has not learnt its task after 24 plain steps"):
        fastadv.suggest_radius(Bag(), data)
    with pytest.raises(RuntimeError, match="after 0 plain steps"):
        fastadv.suggest_radius(Bag(), data, fit=0)


def test_the_rise_fits_the_loss() -> None:
    """The same likelihood is a squared error of 1.7 times itself, and no rise is above what the model has learnt."""
    data = [{**batch, "labels": batch["labels"].float()} for batch in batches()]
    model = trained(data, 200)
    radius = fastadv.suggest_radius(model, data)
    assert radius.adv_loss == pytest.approx(1.7 * radius.loss, rel=0.06)
    assert radius.foreign is not None
    learnt = (radius.foreign - radius.loss) / (2 * radius.loss)  # as a log likelihood
    much = fastadv.suggest_radius(model, data, rise=2 * learnt, fit=0)
    assert much.foreign is not None and much.adv_loss == pytest.approx(much.foreign, rel=0.06)
    several = {"input_ids": torch.zeros(2, 3), "labels": torch.zeros(2, 5)}
    model.config = type("Config", (), {"problem_type": "multi_label_classification"})()  # type: ignore[assignment]
    task = Task(fastadv.FGM, {}, lambda *_: torch.zeros(()), lambda _: None)
    assert task.losses(model, [several]).wanted(0.5) == pytest.approx(0.1)


def test_a_closure_of_ones_own() -> None:
    data = [(batch["input_ids"], batch["labels"]) for batch in batches()]
    model = trained([{"input_ids": ids, "labels": labels} for ids, labels in data])
    radius = fastadv.suggest_radius(
        model, data, closure=lambda model, batch: model(*batch)["loss"], mask=lambda batch: torch.ones_like(batch[0])
    )
    assert radius.adv_loss - radius.loss == pytest.approx(RISE, rel=0.06) and radius.foreign is None


@pytest.mark.parametrize("start", [1e-3, 0.05, 10.0])
def test_the_search_meets_curves_of_any_form(start: float) -> None:
    forms = {
        "linear": lambda r: r,
        "square": lambda r: r * r,
        "saturated": lambda r: 1e-9 + math.exp(min(r, 50.0) / 0.2) * 1e-4,
        "overflowing": lambda r: r if r < 0.5 else math.inf if r < 3 else math.nan,
    }
    for name, form in forms.items():
        curve, result = _search(form, 0.35, start)
        assert result is not None and result[1] == pytest.approx(0.35, rel=WITHIN), name
        assert curve[-1] == result and len(curve) <= 14
    curve, result = _search(lambda r: 0.0 if r < 0.7 else 2.0, 0.35, start)  # it jumps: the radius before the jump
    assert result is not None and 0.68 < result[0] < 0.7 and result[1] == 0
    assert _search(lambda r: 0.2, 0.35, start)[1] is None


def test_refusals() -> None:
    data = batches()
    with pytest.raises(ValueError, match="AWP perturbs no embeddings"):
        fastadv.suggest_radius(Bag(), data, fastadv.AWP)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batches of training data"):
        fastadv.suggest_radius(Bag(), [])
    model = trained(data)
    with pytest.raises(RuntimeError, match="does not rise"):
        fastadv.suggest_radius(model, [()], closure=lambda model, _: 0 * model(**data[0])["loss"] + 1)
    assert math.isnan(fastadv.Radius(0.1).loss)
