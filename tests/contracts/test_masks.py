"""A mask in another convention than 1 = token is refused, in every kind of step, and says how to convert it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadv
from tests.models import TinyModel
from tests.support import assert_unchanged, batch, seeded, snapshot

PAD = 1
MINUS_INF = float("-inf")
OTHER: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "0 / -inf": (lambda m: torch.where(m > 0, 0.0, MINUS_INF), "holds -inf.*mask == 0"),
    "0 / least": (lambda m: torch.where(m > 0, 0.0, torch.finfo(torch.float32).min), "mask == 0"),
    "bfloat16": (lambda m: torch.where(m > 0, 0.0, torch.finfo(torch.bfloat16).min).bfloat16(), "mask == 0"),
    "0 / -10000": (lambda m: (1 - m) * -10000, "holds -10000.*mask == 0"),
    "additive, no padding": (lambda m: torch.zeros_like(m).float(), "0 everywhere"),
    "weights": (lambda m: m * 0.5, "holds 0.5.*mask > 0"),
    "one weight": (lambda m: m.float().index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(1e-30)), "mask > 0"),
    "nan": (lambda m: torch.where(m > 0, 1.0, float("nan")), "holds nan"),
    "inf": (lambda m: torch.where(m > 0, float("inf"), 0.0), "holds inf"),
    "packed": (lambda m: m * torch.tensor([1, 1, 2, 2, 3, 3, 3]), "holds 2.*mask != 0"),
    "minus one": (lambda m: -m, "holds -1"),
    "complex": (lambda m: m.to(torch.complex64), "complex64"),
    "nothing, bool": (lambda m: torch.zeros_like(m).bool(), "0 everywhere.*mask == 0"),
    "nothing, int": (torch.zeros_like, "0 everywhere"),
    "True = padding": (lambda m: m == 0, rf"padding alone \(id {PAD}\).*mask == 0"),
    "1 = padding": (lambda m: 1 - m, "padding alone"),
}
WORDS: dict[str, Any] = {"embedding": "word_embeddings"}
STEPS: dict[str, Callable[[TinyModel], fastadv.Method]] = {
    "pgd": lambda model: fastadv.PGD(model, scope="sample", **WORDS),
    "table": lambda model: fastadv.FGM(model, **WORDS),
    "freelb": lambda model: fastadv.FreeLB(model, **WORDS),
    "neftune": lambda model: fastadv.NEFTune(model, **WORDS),
}


def ready() -> tuple[TinyModel, dict[str, Tensor]]:
    return seeded(lambda: TinyModel("tfm", padding_idx=PAD)), batch(pad=PAD)


def step(adv: fastadv.Method, model: TinyModel, data: dict[str, Tensor], mask: Any) -> fastadv.StepResult:
    return adv.backward(lambda: model(data["input_ids"], labels=data["labels"]), mask=mask)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("form", OTHER)
def test_another_convention_is_refused(form: str, name: str) -> None:
    model, data = ready()
    adv = STEPS[name](model)
    change, told = OTHER[form]
    before = snapshot(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=told):
            step(adv, model, data, change(data["attention_mask"]))
        assert_unchanged(model, before)
    step(adv, model, data, data["attention_mask"])


@pytest.mark.parametrize("form", [form for form in OTHER if "= padding" not in form])
@pytest.mark.parametrize(
    "make", [lambda m: fastadv.FGM(m, start_step=9, **WORDS), fastadv.AWP], ids=["unattacked", "awp"]
)
def test_a_step_that_uses_no_mask_refuses_it_too(make: Callable[[TinyModel], fastadv.Method], form: str) -> None:
    """Rather than at the step from which on it is attacked."""
    model, data = ready()
    change, told = OTHER[form]
    with pytest.raises(ValueError, match=told):
        step(make(model), model, data, change(data["attention_mask"]))


def test_a_search_refuses_it() -> None:
    model, data = ready()
    adv = fastadv.PGD(model, scope="sample", **WORDS)
    with pytest.raises(ValueError, match="padding alone"):
        adv.find(lambda: model(data["input_ids"], labels=data["labels"]), mask=data["attention_mask"] == 0)


def test_each_of_several_masks_is_looked_at() -> None:
    model, data = ready()
    adv = fastadv.PGD(model, scope="sample", **WORDS)
    with pytest.raises(ValueError, match="0 everywhere"):
        step(adv, model, data, [data["attention_mask"], torch.zeros(3, 4)])


def some_of(mask: Tensor, keep: list[int]) -> Tensor:
    """Of these rows, and nothing of the others."""
    kept = torch.zeros_like(mask)
    kept[keep] = mask[keep]
    return kept


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(torch.ones_like, id="padding too"),
        pytest.param(lambda m: some_of(m, [1]), id="samples without a token"),
        pytest.param(lambda m: some_of(torch.ones_like(m), [3]), id="a sample with its padding"),
        pytest.param(lambda m: (torch.cumsum(m, 1) == 1).float(), id="one token a row"),
    ],
)
def test_what_is_no_mistake(change: Callable[[Tensor], Tensor]) -> None:
    model, data = ready()
    adv = fastadv.PGD(model, scope="sample", **WORDS)
    assert bool(step(adv, model, data, change(data["attention_mask"])).adv_loss.isfinite())


def test_a_batch_of_padding_alone() -> None:
    model, data = ready()
    data["input_ids"].fill_(PAD)
    step(fastadv.PGD(model, scope="sample", **WORDS), model, data, torch.ones_like(data["input_ids"]))
