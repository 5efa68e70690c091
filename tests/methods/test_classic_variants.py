"""The classes that public scripts use, as each of them calls its own: the numbers are the script's.

`Script` is the arithmetic that all of them have in common; the steps are written as their users write them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from tests.classic import Whole
from tests.models import TinyModel
from tests.support import assert_gradients, batch, clear, gradients, refused, seeded

WORDS = "word_embeddings"


class Script:
    """What the scripts compute: E + epsilon G / |G|, for PGD in steps of alpha onto the ball around E."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.tables = [p for key, p in model.named_parameters() if name in key]
        self.start = [table.detach().clone() for table in self.tables]

    @torch.no_grad()
    def move(self, step: float, radius: float | None) -> None:
        for table, start in zip(self.tables, self.start, strict=True):
            table += step * table.grad / table.grad.norm()
            gone = table - start
            if radius is not None and gone.norm() > radius:
                table.copy_(start + radius * gone / gone.norm())

    @torch.no_grad()
    def put_back(self) -> None:
        for table, start in zip(self.tables, self.start, strict=True):
            table.copy_(start)


def fgm_script(model: nn.Module, loss: Callable[[], Tensor], name: str, epsilon: float) -> None:
    loss().backward()
    script = Script(model, name)
    script.move(epsilon, None)
    loss().backward()
    script.put_back()


def pgd_script(model: nn.Module, loss: Callable[[], Tensor], name: str, epsilon: float, alpha: float, k: int) -> None:
    loss().backward()
    clean, script = gradients(model), Script(model, name)
    for t in range(k):
        script.move(alpha, epsilon)
        model.zero_grad()
        if t == k - 1:
            for key, parameter in model.named_parameters():
                parameter.grad = clean[key].clone() if key in clean else None
        loss().backward()
    script.put_back()


def by_method(model: nn.Module) -> Any:
    fgm = fastadv.FGM(model)
    return lambda: fgm.attack(0.7, WORDS), lambda: fgm.restore(WORDS)


def by_keyword(model: nn.Module) -> Any:
    fgm = fastadv.FGM(model, epsilon=0.7, emb_name=WORDS)
    return fgm.attack, fgm.restore


def name_first(model: nn.Module) -> Any:
    fgm = fastadv.FGM(model, WORDS, 0.7)
    return fgm.attack, fgm.restore


def radius_first(model: nn.Module) -> Any:
    fgm = fastadv.FGM(model, 0.7)
    return lambda: fgm.attack(WORDS), lambda: fgm.restore(emb_name=WORDS)


def both_by_position(model: nn.Module) -> Any:
    fgm = fastadv.FGM(model, 0.7, WORDS + ".")
    return fgm.attack, fgm.restore


def name_and_a_radius_at_the_call(model: nn.Module) -> Any:
    fgm = fastadv.FGM(model=model, emb_name=WORDS)
    return lambda: fgm.attack(epsilon=0.7), fgm.restore


@pytest.mark.parametrize(
    "variant",
    [by_method, by_keyword, name_first, radius_first, both_by_position, name_and_a_radius_at_the_call],
)
def test_fgm(variant: Callable[[nn.Module], Any]) -> None:
    model, data = asked(), batch()
    twin, before = copy.deepcopy(model), Whole(model)
    attack, restore = variant(model)
    model(**data).loss.backward()
    attack()
    model(**data).loss.backward()
    restore()
    assert before.unchanged()
    fgm_script(twin, lambda: twin(**data).loss, WORDS, 0.7)
    assert_gradients(gradients(model), gradients(twin), 1e-9)


def asked() -> TinyModel:
    """A model of transformers' kind, that tells its input embedding."""
    model = seeded(TinyModel)
    model.get_input_embeddings = lambda: model.word_embeddings
    return model


PGDS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any, bool], None]]] = {
    "numbers at the call": (
        lambda model: fastadv.PGD(model),
        lambda pgd, first: pgd.attack(0.5, 0.2, WORDS, first),
    ),
    "keywords": (
        lambda model: fastadv.PGD(model, emb_name=WORDS, epsilon=0.5, alpha=0.2),
        lambda pgd, first: pgd.attack(is_first_attack=first),
    ),
    "name, radius, step": (
        lambda model: fastadv.PGD(model, WORDS, 0.5, 0.2),
        lambda pgd, first: pgd.attack(first),
    ),
    "and the number of steps": (
        lambda model: fastadv.PGD(model, WORDS, 0.5, 0.2, 3),
        lambda pgd, first: pgd.attack(first),
    ),
    "radius, step": (
        lambda model: fastadv.PGD(model, 0.5, 0.2),
        lambda pgd, first: pgd.attack(WORDS, first),
    ),
    "radius, step, name at the call": (
        lambda model: fastadv.PGD(model, epsilon=0.5, alpha=0.2),
        lambda pgd, first: pgd.attack(emb_name=WORDS, is_first_attack=first),
    ),
}


@pytest.mark.parametrize("variant", PGDS)
def test_pgd(variant: str) -> None:
    model, data = asked(), batch()
    twin, before = copy.deepcopy(model), Whole(model)
    make, attack = PGDS[variant]
    pgd, k = make(model), 3
    model(**data).loss.backward()
    pgd.backup_grad()
    for t in range(k):
        attack(pgd, t == 0)
        if t != k - 1:
            model.zero_grad()
        else:
            pgd.restore_grad()
        model(**data).loss.backward()
    pgd.restore()
    assert before.unchanged()
    pgd_script(twin, lambda: twin(**data).loss, WORDS, 0.5, 0.2, k)
    assert_gradients(gradients(model), gradients(twin), 1e-9)


def test_the_constructors_name_is_what_backward_perturbs() -> None:
    """Without `embedding=`, in a model that names none: the same gradients as the script's calls."""
    model, data = seeded(TinyModel), batch()
    fgm = fastadv.FGM(model, WORDS, 0.7)
    fgm.backward(lambda: model(**data).loss)
    found = gradients(model)
    clear(model)
    fgm_script(model, lambda: model(**data).loss, WORDS, 0.7)
    assert_gradients(found, gradients(model), 1e-9)
    pgd = fastadv.PGD(model, emb_name="position_embeddings", embedding=WORDS, epsilon=0.5, alpha=0.2)
    assert pgd._engine.modules == [model.word_embeddings], "embedding= goes before emb_name="
    assert fastadv.PGD(model, WORDS, relative=True).rule.epsilon == pytest.approx(
        float(model.word_embeddings.weight.detach().norm(dim=1).mean())
    )


def test_a_name_of_several_embeddings() -> None:
    """The calls move all of them; `backward` takes the input embedding, where the model has told it, or refuses."""
    model, data = asked(), batch()
    broad = fastadv.FGM(model, "embeddings.", 0.7)
    assert broad._engine.modules == [model.word_embeddings]
    model, before = seeded(TinyModel), None
    for name, problem in (("embeddings.", "names 2 embeddings"), ("LayerNorm", "names no embeddings")):
        fgm = fastadv.FGM(model, name, 0.7)
        before = Whole(model)
        model(**data).loss.backward()
        fgm.attack()
        assert sum(before.moved()) == sum(name in key for key, _ in model.named_parameters())
        fgm.restore()
        assert before.unchanged()
        closure = lambda: model(**data).loss  # noqa: E731
        for call in (fgm.backward, fgm.find):
            refused(model, lambda: call(closure), ValueError, problem, "embedding=NAME", WORDS)  # noqa: B023


@pytest.mark.parametrize(
    ("make", "phrase"),
    [
        (lambda model: fastadv.FGM(model, WORDS, "table"), "'table' is none of these: give it by name"),
        (lambda model: fastadv.FGM(model, WORDS, 0.1, 0.3), "0.3 is none of these"),
        (lambda model: fastadv.PGD(model, nn.ReLU()), "emb_name (a string) and epsilon, step_size, steps"),
        (lambda model: fastadv.FGM(model, 0.1, epsilon=0.2), "FGM was given epsilon twice"),
        (lambda model: fastadv.FGM(model, WORDS, emb_name="emb"), "FGM was given emb_name twice"),
        (lambda model: fastadv.PGD(model, step_size=0.1, alpha=0.2), "PGD was given step_size twice"),
        (lambda model: fastadv.PGD(model, 1.0, 0.3, alpha=0.2), "PGD was given step_size twice"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[nn.Module], Any], phrase: str) -> None:
    model = seeded(TinyModel)
    refused(model, lambda: make(model), TypeError, phrase)
