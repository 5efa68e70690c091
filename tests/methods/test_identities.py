"""Where two methods must agree, where a method must be plain training, and what a zero gradient or a start may do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastadv
from tests.models import TinyModel
from tests.oracles import oracles
from tests.support import assert_gradients, batch, clear, gradients, record, same_bits, seeded

SPLIT = "bert.embeddings"


def tiny(dropout: float = 0.0) -> TinyModel:
    return seeded(lambda: TinyModel("tfm", dropout=dropout))


def step(model: TinyModel, method: Any, data: dict[str, Tensor], **options: Any) -> tuple[Any, dict[str, Tensor], Any]:
    """One step from one state of torch's generator: its result, gradients, and what the model saw."""
    clear(model)
    torch.manual_seed(7)
    adv = method(model, embedding=model.word_embeddings, **options)
    with record(model) as seen:
        result = adv.backward(lambda: model(**data).loss, mask=data["attention_mask"])
    adv.close()
    return result, gradients(model), seen


@pytest.mark.parametrize("dropout", ["same", "fresh", "off"])
@pytest.mark.parametrize("epsilon", [None, 0.2])
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_yopo_with_one_inner_step_is_freelb(scope: str, epsilon: float | None, dropout: str) -> None:
    """Bit for bit, random start and dropout included."""
    model, data = tiny(dropout=0.2), batch()
    options = {"scope": scope, "epsilon": epsilon, "dropout": dropout, "steps": 3, "step_size": 0.1}
    lb, want, saw = step(model, fastadv.FreeLB, data, **options)
    yo, found, seen = step(model, fastadv.YOPO, data, split=SPLIT, inner_steps=1, **options)
    assert len(seen) == len(saw) == 3
    assert all(same_bits(mine, its) for mine, its in zip(seen, saw, strict=True))
    assert all(same_bits(found[name], want[name]) for name in want)
    assert same_bits(yo.loss, lb.loss) and same_bits(yo.adv_loss, lb.adv_loss)


@pytest.mark.parametrize("clean_weight", [1.0, 0.0])
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_fgsm_is_one_step_of_pgd_along_the_sign(scope: str, clean_weight: float) -> None:
    model, data = tiny(), batch()
    common = {"scope": scope, "clean_weight": clean_weight, "epsilon": 0.05}
    _, want, saw = step(model, fastadv.PGD, data, norm="linf", steps=1, step_size=0.05, **common)
    _, found, seen = step(model, fastadv.FGSM, data, **common)
    assert all(same_bits(mine, its) for mine, its in zip(seen, saw, strict=True))
    assert all(same_bits(found[name], want[name]) for name in want)


@pytest.mark.parametrize("method", [fastadv.FreeLB, fastadv.YOPO])
def test_one_pass_from_zero_is_plain_training(method: Any) -> None:
    model, data = tiny(dropout=0.2), batch()
    torch.manual_seed(7)
    loss = model(**data).loss
    loss.backward()
    want, state = gradients(model), torch.get_rng_state()
    more = {"split": SPLIT} if method is fastadv.YOPO else {}
    result, found, _ = step(model, method, data, steps=1, random_start=0, **more)
    assert_gradients(found, want, 1e-12)
    assert same_bits(result.loss, loss.detach()) and same_bits(result.adv_loss, loss.detach())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("replays", [1, 3])
def test_freeat_without_a_radius_is_plain_training_on_each_batch_so_often(replays: int) -> None:
    """replays=1: plain training."""
    loader, found = [batch(seed=seed) for seed in range(4)], []
    for adversarial in (True, False):
        model = tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        adv = fastadv.FreeAT(model, embedding=model.word_embeddings, epsilon=0.0, replays=replays)
        for data in fastadv.repeat(loader, replays):
            optimizer.zero_grad()
            if adversarial:
                adv.backward(lambda: model(**data).loss)  # noqa: B023
            else:
                model(**data).loss.backward()
            optimizer.step()
        found.append({name: p.detach() for name, p in model.named_parameters()})
    assert_gradients(*found, 1e-12)


@pytest.mark.parametrize("fused", [False, None])
@pytest.mark.parametrize("name", ["FreeLB", "YOPO"])
def test_the_start_is_the_public_codes(name: str, fused: bool | None) -> None:
    """l2: U(-1, 1) * magnitude / sqrt(true length * D), masked, outside the ball where that is smaller."""
    model, data = tiny(), batch()
    more = {"split": SPLIT} if name == "YOPO" else {}
    keep, ids = data["attention_mask"].bool(), data["input_ids"]
    starts = []
    for _ in range(2):
        _, _, seen = step(
            model, getattr(fastadv, name), data, random_start=0.8, epsilon=0.1, step_size=0.01, fused=fused, **more
        )
        starts.append((seen[0] - model.word_embeddings.weight[ids]).detach())
    assert same_bits(*starts), "one seed, one start"
    start, last = starts[0], (seen[-1] - model.word_embeddings.weight[ids]).detach()
    bound = 0.8 / (data["attention_mask"].sum(1) * 16).double().sqrt()
    largest = start.abs().flatten(1).amax(1)
    assert (largest <= bound).all() and (largest > 0.9 * bound).all()
    assert not start[~keep].any()
    assert (start.flatten(1).norm(dim=1) > 0.4).all(), "not projected onto the ball of 0.1"
    lengths = last.flatten(1).norm(dim=1)
    assert (lengths < 0.1 + 1e-9).all() and (lengths > 0.09).all(), "an ascent ends inside it"


def test_the_start_of_fgsm_is_uniform_in_its_ball() -> None:
    model, data = tiny(), batch(rows=4, length=7)
    _, _, seen = step(model, fastadv.FGSM, data, epsilon=0.05, random_start=True, clean_weight=0)
    start = (seen[0] - model.word_embeddings.weight[data["input_ids"]]).detach()[data["attention_mask"].bool()]
    assert 0.049 < start.abs().max() <= 0.05
    assert abs(float(start.mean())) < 0.01
    end = (seen[1] - model.word_embeddings.weight[data["input_ids"]]).detach()[data["attention_mask"].bool()]
    at_rim = (end.abs() > 0.05 * (1 - 1e-9)).double().mean()
    assert abs(float(at_rim) - 0.625) < 0.05, "a step of 1.25 epsilon reaches the rim from 5/8 of the starts"
