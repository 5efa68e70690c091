"""Positions as indices: what lies where, and its gradient, once and twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Size, Tensor

from fastadv.engine.lookup import Lookup
from fastadv.engine.perturb.masks import MaskCheck
from fastadv.engine.perturb.where import KEPT, Texts

LEFT = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
RIGHT = torch.tensor([[1, 0, 1, 1, 0, 0, 0], [0] * 7, [0, 0, 0, 0, 0, 0, 1]])


def texts() -> Texts:
    return Texts(LEFT, torch.device("cpu"), MaskCheck())


def by_hand(delta: Tensor, mask: Tensor) -> Tensor:
    rows = []
    for sample, kept in enumerate(mask.tolist()):
        left = iter(delta[sample])
        rows.append(torch.stack([next(left) if one else torch.zeros(delta.shape[-1]).double() for one in kept]))
    return torch.stack(rows)


@pytest.mark.parametrize("mask", [LEFT, RIGHT, LEFT.bool()], ids=["first", "longer", "bool"])
def test_values_and_gradients(mask: Tensor) -> None:
    delta = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    where = texts().where(mask)
    shape = Size((*mask.shape, 2))
    moved = where.of(Lookup(delta, None), shape, "a module", plain=False).delta
    want = by_hand(delta, mask)
    assert torch.equal(moved, want)
    gradient = torch.randn(shape, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(want, delta, gradient)
    assert torch.equal(torch.autograd.grad(moved, delta, gradient)[0], wanted)  # zero where there is no vector
    plain = where.of(Lookup(delta, None), shape, "a module", plain=True)
    assert plain.rows is not None
    assert plain.slot is not None
    rows = plain.rows[plain.slot.clamp(min=0)].masked_fill((plain.slot < 0).unsqueeze(-1), 0)
    assert torch.equal(rows, want)
    assert not plain.delta.any()
    assert torch.equal(torch.autograd.grad(plain.delta, delta, gradient)[0], wanted)


def test_it_is_differentiable_twice() -> None:
    where = texts().where(RIGHT)

    def spread(delta: Tensor) -> Tensor:
        return where.of(Lookup(delta, None), Size((3, 7, 2)), "a module", plain=False).delta

    delta = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(spread, delta)
    assert torch.autograd.gradgradcheck(lambda x: spread(x).square(), delta)


def test_there_is_room_for_the_largest_sample_alone() -> None:
    assert texts().there.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    empty = Texts(torch.zeros(2, 4, dtype=torch.bool), torch.device("cpu"), MaskCheck())
    assert empty.there.tolist() == [[False], [False]]


def test_a_mask_is_read_once_unless_it_changes() -> None:
    several, mask = texts(), RIGHT.clone()
    first = several.where(mask)
    assert several.where(mask) is first
    mask[0, 0], mask[0, 1] = 0, 1
    assert several.where(mask).place[0].tolist() == [1, 2, 3]
    made: list[Any] = [RIGHT.clone() for _ in range(2 * KEPT)]
    for one in made:
        several.where(one)
    assert len(several._seen) == KEPT
