"""An embedding whose output something else has cut: it is shorter than its ids, and a sample's norm cannot be known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from tests.support import seeded

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


class Words(nn.Embedding):
    """No plain lookup, so that it is perturbed behind its hooks."""


def cut(padding_idx: int | None = None) -> nn.Module:
    model = seeded(lambda: nn.Sequential(Words(9, 4, padding_idx=padding_idx), nn.Tanh(), nn.Linear(4, 1)))
    model[0].register_forward_hook(lambda module, args, output: output[:, :2])
    return model


@pytest.mark.parametrize("scope", ["sample", "batch", "table", "row"])
def test_norms_of_samples_are_refused(scope: Any) -> None:
    model = cut()
    adv = fastadv.PGD(model, scope=scope)
    with pytest.raises(ValueError, match="process_group="):
        adv.backward(lambda: model(IDS).square().sum())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("options", [{"scope": "token"}, {"scope": "sample", "norm": "linf"}], ids=str)
def test_what_needs_no_sample_is_right(options: dict[str, Any]) -> None:
    found: list[Tensor] = []
    for ids, model in ((IDS, cut()), (IDS[:, :2], cut())):
        adv = fastadv.PGD(model, epsilon=0.2, step_size=0.1, **options)
        adv.backward(lambda model=model, ids=ids: model(ids).square().sum())
        found.append(model[0].weight.grad)
    assert torch.equal(*found)


def test_padding_by_ids_is_refused() -> None:
    model = cut(padding_idx=0)
    adv = fastadv.PGD(model, scope="token")
    with pytest.raises(ValueError, match="give mask="):
        adv.backward(lambda: model(IDS).square().sum())
