"""`table_step` is `segment_sum`, `ascend` and a lookup, whatever runs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastadv import native
from fastadv.ops import Segments, ascend, gather_perturb, segment_sum, segments, table_step

IDS = torch.tensor([[3, 1, 3, 0], [1, 1, 6, 3]])
RULE: dict[str, Any] = {"step_size": 0.3, "epsilon": 0.2, "direction": "l2", "ball": "l2", "group": 0}
FUSED = [False, pytest.param(True, marks=pytest.mark.skipif(not native.available(), reason="no C++ ops")), None]


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """A table, a perturbation of the four words, and the positions' gradient."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, 5, generator=generator, dtype=torch.float64).to(dtype) for n in (7, 4, 8))


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("masked", [False, True])
def test_is_its_three_ops(masked: bool, fused: bool | None) -> None:
    weight, delta, grad = inputs()
    mask = (torch.arange(8) % 3 > 0) if masked else None
    groups = segments(IDS.flatten(), 7, mask=mask, fused=False).trimmed()
    want, skipped = delta.clone(), torch.tensor(0)
    ascend(want, segment_sum(grad, groups, fused=False), skipped=skipped, fused=False, **RULE)
    words = gather_perturb(
        weight, IDS, torch.zeros(2, 4, 5).double(), added=want, slot=groups.slot.view(2, 4), fused=False
    )
    out, room = torch.empty(2, 4, 5, dtype=torch.float64), torch.empty_like(delta)
    lookup = {"weight": weight, "ids": IDS, "embedded": out, "room": room}
    table_step(delta, grad, groups, skipped=skipped, fused=fused, **RULE, **lookup)
    torch.testing.assert_close(delta, want, rtol=1e-13, atol=0)
    torch.testing.assert_close(out, words, rtol=1e-13, atol=0)
    assert int(skipped) == 0


@pytest.mark.parametrize("fused", FUSED)
def test_the_gradient_may_have_any_shape_and_strides(fused: bool | None) -> None:
    weight, delta, grad = inputs()
    groups = segments(IDS.flatten(), 7, fused=False).trimmed()
    found = []
    for form in (grad, grad.view(2, 4, 5), grad.t().contiguous().t()):
        moved, out = delta.clone(), torch.empty(2, 4, 5, dtype=torch.float64)
        lookup = {"weight": weight, "ids": IDS, "embedded": out, "room": torch.empty_like(delta)}
        table_step(moved, form, groups, skipped=torch.tensor(0), fused=fused, **RULE, **lookup)
        found.append(moved)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_table_that_requires_grad() -> None:
    """It may be a model's parameter: nothing is recorded."""
    weight, delta, grad = inputs(torch.float32)
    weight.requires_grad_()
    groups = segments(IDS.flatten(), 7, fused=False).trimmed()
    for fused in (False, None):
        out = torch.empty(2, 4, 5)
        lookup = {"weight": weight, "ids": IDS, "embedded": out, "room": torch.empty_like(delta)}
        table_step(delta, grad, groups, skipped=torch.tensor(0), fused=fused, **RULE, **lookup)
        assert not out.requires_grad
        assert not delta.requires_grad


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "direction": ({"direction": "up"}, "direction must be one of"),
    "ball": ({"ball": "cube"}, "ball must be one of"),
    "group": ({"group": 2}, "group must be from 0 to 1"),
    "a narrow gradient": ({"grad": torch.zeros(2, 4, 4).double()}, r"grad must have shape \(8, 5\)"),
    "a short gradient": ({"grad": torch.zeros(7, 5).double()}, r"grad must have shape \(8, 5\)"),
    "small room": ({"room": torch.zeros(3, 5).double()}, "room must have delta's shape"),
    "coarse room": ({"room": torch.zeros(4, 5).half()}, "room must be torch.float64"),
    "groups of other ids": ({"groups": segments(IDS[0], 7, fused=False)}, "slot must have shape .*groups and ids"),
    "room for more words": (
        {"groups": segments(IDS.flatten(), 7, fused=False)},
        r"starts must have shape \(5,\)",
    ),
    "a flat result": ({"embedded": torch.zeros(8, 5).double()}, "embedded must"),
    "a coarse result": ({"embedded": torch.zeros(2, 4, 5)}, "embedded must be torch.float64"),
}


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str, fused: bool | None) -> None:
    change, phrase = REFUSED[name]
    weight, delta, grad = inputs()
    arguments: dict[str, Any] = {
        "groups": segments(IDS.flatten(), 7, fused=False).trimmed(),
        "skipped": torch.tensor(0),
    }
    arguments |= {"delta": delta, "grad": grad, "weight": weight, "ids": IDS}
    arguments |= {"embedded": torch.zeros(2, 4, 5).double(), "room": torch.zeros_like(delta)}
    before = delta.clone()
    with pytest.raises((TypeError, ValueError), match=phrase):
        table_step(**{**arguments, **RULE, **change}, fused=fused)
    assert torch.equal(delta, before)
    assert not arguments["embedded"].any()


def test_opcheck() -> None:
    weight, delta, grad = inputs(torch.float32)
    groups: Segments = segments(IDS.flatten(), 7, fused=False).trimmed()
    arguments = (delta, grad, torch.tensor(0), 0.3, 0.2, "l2", "l2", 0, *groups, weight, IDS)
    torch.library.opcheck(torch.ops.fastadv.table_step.default, (*arguments, torch.zeros(2, 4, 5), torch.zeros(4, 5)))
