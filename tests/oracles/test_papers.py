"""FGSM, FreeLB, YOPO and FreeAT against the papers' formulas in float64, on models with attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from tests.models import TinyModel, TinyRoberta
from tests.oracles import oracles, papers
from tests.support import assert_close, assert_gradients, batch, clear, gradients, record, seeded

SIZES = {"l2": {"step_size": 0.3, "epsilon": 0.5}, "linf": {"step_size": 0.03, "epsilon": 0.05}}
SPLIT = {"tfm": "bert.embeddings", "roberta": None}  # the first block of RoBERTa's stack of layers is the default


class Case:
    """A model with attention, a batch, and the loss as a function of embeddings; padding is read, so masks matter."""

    def __init__(self, kind: str, scope: str, masked: bool) -> None:
        self.model: Any = seeded(TinyRoberta if kind == "roberta" else lambda: TinyModel("tfm"), seed=3)
        self.kind, data = kind, batch(pad=1)
        self.ids, self.labels = data["input_ids"], data["labels"]
        self.mask = data["attention_mask"].clone() if masked else None
        if self.mask is not None:
            self.mask[1, 1] = 0  # a hole inside a sentence, at an id that also stands elsewhere
            self.ids[0, 2] = self.ids[1, 1]
        keep = self.mask if masked else self.ids != 1 if kind == "roberta" else torch.ones_like(self.ids)
        self.keep = keep.bool()  # type: ignore[union-attr]
        self.weight = self.model.word_embeddings.weight
        self.site = papers.Site(self.weight, self.ids, scope, self.keep)

    def loss_at(self, embeds: Tensor, shift: int = 0) -> Tensor:
        loss: Tensor = self.model(self.ids, labels=(self.labels + shift) % 3, inputs_embeds=embeds).loss
        return loss

    def closure(self, shift: int = 0) -> Tensor:
        loss: Tensor = self.model(self.ids, labels=(self.labels + shift) % 3).loss
        return loss

    def run(self, method: Any, **options: Any) -> tuple[Any, list[Tensor]]:
        adv = method(self.model, embedding=self.model.word_embeddings, scope=self.site.scope, **options)
        with record(self.model) as seen:
            result = adv.backward(self.closure, mask=self.mask)
        adv.close()
        assert int(adv.skipped) == 0
        return result, [(one - self.weight[self.ids]).detach() for one in seen]

    def start(self, perturbation: Tensor) -> Tensor:
        """What a start was, from what the first pass saw."""
        assert perturbation[self.keep].abs().max() > 0
        assert not perturbation[~self.keep].any()
        if self.site.scope not in oracles.TABLE_SCOPES:
            return perturbation
        table = torch.zeros_like(self.weight)
        table[self.ids[self.keep]] = perturbation[self.keep]
        return table

    def split(self) -> nn.Module:
        inner: nn.Module = (
            self.model.bert.embeddings if self.kind == "tfm" else self.model.decoder["sentence_encoder"].layers[0]
        )
        return inner


def uniform(shape: tuple[int, ...], mask: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return 0.05 * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1)


EVERYWHERE: list[Callable[..., Any]] = [
    pytest.mark.parametrize("started", [False, True], ids=["zero", "start"]),
    pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"]),
    pytest.mark.parametrize("kind", ["tfm", "roberta"]),
    pytest.mark.parametrize("norm", oracles.NORMS),
    pytest.mark.parametrize("scope", oracles.SCOPES),
]


def everywhere(test: Callable[..., None]) -> Callable[..., None]:
    for mark in EVERYWHERE:
        test = mark(test)
    return test


def compare(case: Case, result: Any, seen: list[Tensor], want: oracles.Wanted, started: bool) -> None:
    """Gradients, what each full pass saw, and the losses: the first where it is the clean one, else the mean."""
    assert_gradients(gradients(case.model), want.gradients, 1e-9)
    assert len(seen) == len(want.perturbations)
    for mine, its in zip(seen, want.perturbations, strict=True):
        assert_close(mine, its, 1e-9, "perturbation")
    losses = torch.stack(want.losses)
    assert_close(result.loss, losses.mean() if started else losses[0], 1e-9, "loss")
    assert_close(result.adv_loss, losses[-1], 1e-9, "adv_loss")


@pytest.mark.parametrize("epsilon", [True, False], ids=["ball", "no-ball"])
@everywhere
def test_freelb(scope: str, norm: str, kind: str, masked: bool, started: bool, epsilon: bool) -> None:
    case = Case(kind, scope, masked)
    numbers = {**SIZES[norm], "steps": 3, "norm": norm}
    if not epsilon:
        numbers["epsilon"] = None
    result, seen = case.run(fastadv.FreeLB, random_start=uniform if started else False, adv_weight=0.5, **numbers)
    start = case.start(seen[0]) if started else None
    want = papers.freelb(case.model, case.site, case.loss_at, start=start, adv_weight=0.5, **numbers)
    compare(case, result, seen, want, started)


@pytest.mark.parametrize("inner_steps", [1, 3])
@everywhere
def test_yopo(scope: str, norm: str, kind: str, masked: bool, started: bool, inner_steps: int) -> None:
    """A partial pass ends at the split, behind the tap: what it saw is recorded too, and not compared one by one."""
    case = Case(kind, scope, masked)
    numbers = {**SIZES[norm], "steps": 3, "norm": norm, "inner_steps": inner_steps}
    result, seen = case.run(fastadv.YOPO, random_start=uniform if started else False, split=SPLIT[kind], **numbers)
    start = case.start(seen[0]) if started else None
    want = papers.yopo(case.model, case.site, case.loss_at, case.split(), start=start, **numbers)
    assert len(seen) == 3 + 2 * (inner_steps - 1)
    compare(case, result, seen[::inner_steps], want, started)


@pytest.mark.parametrize("clean_weight", [1.0, 0.0])
@pytest.mark.parametrize("step_size", [None, 0.03])
@pytest.mark.parametrize("started", [False, True], ids=["zero", "start"])
@pytest.mark.parametrize("kind", ["tfm", "roberta"])
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_fgsm(scope: str, kind: str, started: bool, step_size: float | None, clean_weight: float) -> None:
    """The step is epsilon, with a random start 1.25 epsilon (FGSM-RS)."""
    case = Case(kind, scope, masked=True)
    result, seen = case.run(
        fastadv.FGSM,
        epsilon=0.05,
        step_size=step_size,
        clean_weight=clean_weight,
        random_start=uniform if started else False,
    )
    first = seen[1 if clean_weight else 0]
    want = oracles.attack(
        case.model,
        case.loss_at,
        case.weight,
        case.ids,
        scope=scope,
        norm="linf",
        epsilon=0.05,
        step_size=step_size or (0.0625 if started else 0.05),
        steps=1,
        mask=case.keep,
        clean_weight=clean_weight,
        start=case.start(first) if started else None,
    )
    assert_gradients(gradients(case.model), want.gradients, 1e-9)
    for mine, its in zip(seen, want.perturbations, strict=True):
        assert_close(mine, its, 1e-9, "perturbation")
    assert_close(result.adv_loss, want.losses[-1], 1e-9, "adv_loss")
    if not started and step_size is None:
        assert float(seen[-1].abs().max()) == pytest.approx(0.05)


BATCHES = [(4, 7), (2, 9), (3, 4)]  # a smaller batch, a longer sequence, a shorter one


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("norm", oracles.NORMS)
@pytest.mark.parametrize("scope", ["sample", "token", "batch"])
@pytest.mark.parametrize("kind", ["tfm", "mlp"])
def test_freeat(kind: str, scope: str, norm: str, carry: bool) -> None:
    """Three batches of other sizes, three replays each, an optimizer step after every one: 1e-9 until the end."""
    mine, its = (seeded(lambda: TinyModel(kind), seed=3) for _ in range(2))
    numbers = SIZES[norm]
    adv = fastadv.FreeAT(
        mine, embedding=mine.word_embeddings, scope=scope, norm=norm, replays=3, carry=carry, **numbers
    )
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    oracle = papers.FreeAT(its, its.word_embeddings.weight, 4, 9, rate=0.1)
    loader = [batch(*size, seed=number) for number, size in enumerate(BATCHES)]
    for step, data in enumerate(fastadv.repeat(loader, adv.replays)):
        if not carry and step % 3 == 0:
            oracle.begin_anew()
        ids, mask, labels = data["input_ids"], data["attention_mask"], data["labels"]
        table = mine.word_embeddings.weight.detach().clone()
        clear(mine)
        with record(mine) as seen:
            adv.backward(lambda: mine(ids, mask, labels).loss, mask=mask)  # noqa: B023
        optimizer.step()
        want = oracle.replay(ids, mask, lambda e: its(None, mask, labels, e).loss, scope=scope, norm=norm, **numbers)  # noqa: B023
        assert_close(seen[0] - table[ids], want, 1e-9, f"perturbation of replay {step}")
    parameters = ({name: p.detach() for name, p in model.named_parameters()} for model in (mine, its))
    assert_gradients(*parameters, 1e-9)


@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_attack_moves_the_perturbation_alone(scope: str) -> None:
    """FreeLB trains on the loss, and climbs what `attack` returns."""
    case = Case("tfm", scope, masked=False)
    adv = fastadv.FreeLB(
        case.model, embedding=case.model.word_embeddings, scope=scope, steps=3, random_start=False, **SIZES["l2"]
    )
    adv.backward(case.closure, attack=lambda: -case.closure(1))
    want = papers.freelb(
        case.model, case.site, case.loss_at, steps=3, climbed=lambda e: -case.loss_at(e, 1), **SIZES["l2"]
    )
    assert_gradients(gradients(case.model), want.gradients, 1e-9)
