"""Random starts: their magnitude, their mask, and that drawing them moves no dropout mask."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv.engine.perturb.start import resolve, uniform
from fastadv.engine.safety.rng import apart

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()


def test_l2_is_scaled_by_each_samples_true_length() -> None:
    start = resolve(0.5, None, uniform("l2"))
    assert start is not None
    noise = start.at((3, 4, 1000), MASK, 0, None)
    for sample, length in zip(noise, (4, 2, 1), strict=True):
        bound = 0.5 / math.sqrt(length * 1000)
        assert 0.99 * bound < sample.abs().max() <= bound


def test_linf_is_the_magnitude_itself() -> None:
    start = resolve(True, 0.25, uniform("linf"))
    assert start is not None
    assert 0.249 < start.at((3, 4, 1000), MASK, 0, None).abs().max() <= 0.25


def test_rows_of_a_table_are_one_sample() -> None:
    start = resolve(1.0, None, uniform("l2"))
    assert start is not None
    assert start.at((4, 1000), torch.tensor([True, True, False, False]), 0, None).abs().max() <= 1 / math.sqrt(2000)


@pytest.mark.parametrize(
    ("value", "epsilon", "error", "phrase"),
    [
        (True, None, ValueError, "give a magnitude"),
        (-1.0, 1.0, ValueError, "at least 0"),
        (math.nan, 1.0, ValueError, "finite"),
        (math.inf, 1.0, ValueError, "finite"),
        ("uniform", 1.0, TypeError, "True, False, a magnitude or a callable"),
    ],
)
def test_refuses(value: object, epsilon: float | None, error: type[Exception], phrase: str) -> None:
    with pytest.raises(error, match=phrase):
        resolve(value, epsilon, uniform("l2"))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [False, 0, 0.0])
def test_no_start(value: float) -> None:
    assert resolve(value, 1.0, uniform("l2")) is None


def test_apart_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    with apart(3, torch.device("cpu")):
        first = torch.rand(4)
    with apart(3, torch.device("cpu")):
        assert torch.equal(torch.rand(4), first)
    assert torch.equal(torch.get_rng_state(), before)


class Model(nn.Module):
    def __init__(self, padding_idx: int | None = None, calls: int = 1) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4, padding_idx=padding_idx), nn.Linear(4, 1)
        self.dropout, self.seen = nn.Dropout(0.5), []

    def forward(self, *ids: Tensor) -> Tensor:
        hidden = [self.embedding(i) for i in ids]
        self.seen = [h - self.embedding.weight[i] for h, i in zip(hidden, ids, strict=True)]
        return sum(self.head(self.dropout(h)).square().mean() for h in hidden)  # type: ignore[return-value]


IDS = torch.tensor([[1, 2, 2, 3], [4, 5, 0, 0], [6, 0, 0, 0]])


@pytest.mark.parametrize("scope", ["table", "row", "batch", "sample", "token"])
@pytest.mark.parametrize("how", ["mask", "padding_idx"])
def test_start_is_masked_before_the_first_pass(scope: str, how: str) -> None:
    model = Model(padding_idx=0 if how == "padding_idx" else None)
    adv = fastadv.PGD(model, scope=scope, random_start=0.5, clean_weight=0, steps=1, step_size=0.0, epsilon=None)
    with adv.perturbed(lambda: model(IDS), mask=MASK if how == "mask" else None):
        model(IDS)
    (start,) = model.seen
    assert (start[~MASK] == 0).all()
    assert (start[MASK].abs().amax(-1) > 0).all()
    if scope in ("table", "row"):
        assert torch.equal(start[0, 1], start[0, 2]), "one vector per word"


@pytest.mark.parametrize("mask", [None, MASK], ids=["unknown shape", "known shape"])
def test_same_dropout_is_not_moved_by_a_start_drawn_inside_the_pass(mask: Tensor | None) -> None:
    model = Model()
    losses: list[float] = []

    def closure() -> Tensor:
        loss = model(IDS)
        losses.append(loss.item())
        return loss

    adv = fastadv.PGD(
        model, scope="sample", random_start=0.5, clean_weight=0, steps=2, step_size=0.0, dropout="same", epsilon=None
    )
    adv.backward(closure, mask=mask)
    assert len(set(losses)) == 1


def test_random_start_in_table_scope_with_several_calls() -> None:
    model = Model()
    adv = fastadv.PGD(model, random_start=0.5)
    adv.backward(lambda: model(IDS, IDS[:, :2]))  # the clean pass has seen all ids
    adversarial = fastadv.PGD(model, random_start=0.5, clean_weight=0)
    with pytest.raises(NotImplementedError, match="clean_weight > 0, or scope='sample'"):
        adversarial.backward(lambda: model(IDS, IDS[:, :2]))


def test_callable_of_another_shape() -> None:
    model = Model()
    adv = fastadv.PGD(model, scope="sample", random_start=lambda shape, mask: torch.zeros(3))
    with pytest.raises(ValueError, match=r"must return a tensor of shape \(3, 4, 4\)"):
        adv.backward(lambda: model(IDS))
