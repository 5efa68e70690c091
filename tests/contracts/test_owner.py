"""An owner of the backward: what it is given, what is around which pass, and that all of it is left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from tests.contracts.faults import PLACES, Trap, prepare
from tests.contracts.test_faults import METHODS
from tests.every import COMPARING, EVERY
from tests.support import assert_gradients, assert_unchanged, clear, gradients, ready, same_bits, snapshot


class Recording(fastadv.Owner):
    """Writes down what is entered and left, and how."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.inside: list[str] = []
        self.errors: list[BaseException] = []

    def backward(self, loss: Tensor, last: bool) -> None:
        self.events.append(f"backward {last} in {self.inside[-1]}")
        loss.backward()

    def probing(self) -> Any:
        return self.block("probing")

    def sync(self, last: bool) -> Any:
        return self.block(f"sync {last}")

    @contextlib.contextmanager
    def block(self, name: str) -> Iterator[None]:
        assert not self.inside, "one at a time"
        self.inside.append(name)
        self.events.append(name)
        try:
            yield
        except BaseException as error:
            self.errors.append(error)
            raise
        finally:
            assert self.inside.pop() == name


def forward_in(model: nn.Module, owner: Recording) -> list[str]:
    """What is around each forward."""
    seen: list[str] = []
    model.register_forward_pre_hook(lambda *_: seen.append(owner.inside[-1] if owner.inside else ""))
    return seen


FULL = ["sync False", "backward False in sync False"]
LAST = ["sync True", "backward True in sync True"]
PROBE = ["probing"]
WAITING = ["sync False"]  # a forward whose graph waits for a later backward
EVENTS = {
    "fgsm": FULL + LAST,
    "fgm": FULL + LAST,
    "pgd": FULL + PROBE * 2 + LAST,
    "freeat": LAST,
    "yopo": (FULL + PROBE * 2) * 2 + LAST,  # partial passes
    "freelb": FULL * 2 + LAST,
    "neftune": LAST,
    "llr": WAITING + PROBE * 4 + LAST,
    "smart": WAITING + PROBE + LAST,
    "vat": FULL + PROBE + LAST,
}


@pytest.mark.parametrize("name", EVERY)
def test_what_is_around_which_pass(name: str) -> None:
    model, data, closure = ready()
    owner = Recording()
    around = forward_in(model, owner)
    adv = EVERY[name](model, embedding=model.word_embeddings, scope="sample", backward=owner)
    adv.backward(closure, mask=data["attention_mask"])
    assert owner.events == EVENTS[name]
    entered = [event for event in owner.events if not event.startswith("backward")]
    if name == "llr":
        entered.remove("probing")  # the clean loss's slope, which needs no forward of its own
    assert around == entered
    assert owner.inside == owner.errors == []
    mine = gradients(model)
    clear(model)
    adv.close()
    other = EVERY[name](model, embedding=model.word_embeddings, scope="sample", backward=lambda loss: loss.backward())
    other.backward(closure, mask=data["attention_mask"])
    for key, grad in gradients(model).items():
        assert same_bits(mine[key], grad), key


def test_weights_that_move_and_a_step_that_is_not_attacked() -> None:
    model, _, closure = ready()
    owner = Recording()
    around = forward_in(model, owner)
    adv = fastadv.AWP(model, gamma=0.05, steps=2, backward=owner, start_step=1)
    adv.backward(closure)
    assert owner.events == LAST
    adv.backward(closure)
    assert (
        owner.events[len(LAST) :] == LAST + PROBE * 2 + LAST
    )  # it moves by the clean pass's gradient of all processes
    assert around == [event for event in owner.events if not event.startswith("backward")]


def test_a_pass_that_pays_the_teachers_term_is_the_last() -> None:
    model, _, closure = ready()
    owner = Recording()
    inner = fastadv.FreeLB(model, embedding=model.word_embeddings, step_size=1.0, backward=owner)
    adv = fastadv.BregmanProximal(model, 2.0, 0.5, method=inner)
    adv.backward(closure)
    assert owner.events == FULL * 3 + LAST


@pytest.mark.parametrize("earlier", ["none", "all"])
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["RuntimeError", "Ctrl-C"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "index"), [("pgd-table", index) for index in range(4)] + [("freelb-sample", 1)])
def test_what_was_entered_is_left(name: str, index: int, place: str, error: BaseException, earlier: str) -> None:
    model, data = prepare(earlier)
    owner = Recording()
    adv = METHODS[name][1](model, embedding=model.embed, backward=owner)
    before = snapshot(model)
    with pytest.raises(type(error)):
        adv.backward(Trap(model, data, index, place, error))
    assert owner.inside == []
    assert owner.errors == [error]
    assert_unchanged(model, before)
    owner.events.clear()
    adv.backward(lambda: model(data["input_ids"], data["labels"]).loss)
    assert owner.events == {"pgd-table": FULL + PROBE * 2 + LAST, "freelb-sample": FULL * 2 + LAST}[name]


@pytest.mark.parametrize("at", ["backward", "entering", "leaving"])
def test_an_owner_that_fails(at: str) -> None:
    class Failing(Recording):
        def backward(self, loss: Tensor, last: bool) -> None:
            super().backward(loss, last)
            if last and at == "backward":
                raise ZeroDivisionError

        @contextlib.contextmanager
        def block(self, name: str) -> Iterator[None]:
            if name == "sync True" and at == "entering":
                raise ZeroDivisionError
            with super().block(name):
                yield
            if name == "sync True" and at == "leaving":
                raise ZeroDivisionError

    model, _, closure = ready()
    owner = Failing()
    adv = fastadv.FGM(model, embedding=model.word_embeddings, backward=owner)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        adv.backward(closure)
    assert owner.inside == []
    assert_unchanged(model, before)
    assert adv.attacked == 0


class Duck:
    """Has an owner's verbs, and no class in common with it."""

    def __init__(self) -> None:
        self.backward = lambda loss, last: loss.backward()
        self.probing = contextlib.nullcontext
        self.sync = lambda last: contextlib.nullcontext()


def test_an_object_with_the_three_verbs() -> None:
    model, _, closure = ready()
    fastadv.PGD(model, embedding=model.word_embeddings, backward=Duck()).backward(closure)
    mine, duck = gradients(model), Duck()
    clear(model)
    duck.divisor = 4.0
    adv = fastadv.PGD(model, embedding=model.word_embeddings, backward=duck)
    assert adv.share == 0.25
    adv.close()
    fastadv.PGD(model, embedding=model.word_embeddings).backward(closure)
    assert_gradients(mine, gradients(model), 1e-12)


@pytest.mark.parametrize("given", [nn.Linear(1, 1), 3, "loss.backward"], ids=["module", "number", "name"])
def test_what_is_no_owner(given: Any) -> None:
    model, _, _ = ready()
    with pytest.raises(TypeError, match="takes a function of the loss"):
        fastadv.FGM(model, embedding=model.word_embeddings, backward=given)


class Dividing(fastadv.Owner):
    """Divides every loss, as accelerate does."""

    divisor = 4.0

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss / 4).backward()


def regularised(name: str, model: Any, **options: Any) -> fastadv.Method:
    if name != "bregman":
        return EVERY[name](model, embedding=model.word_embeddings, scope="sample", **options)
    adv = fastadv.BregmanProximal(model, 2.0, 0.5, method=regularised("smart", model, **options))
    for tensor in adv.teacher.values():
        tensor.mul_(0.9)
    return adv


def shared(name: str, divided: float, share: Any, **options: Any) -> dict[str, Tensor]:
    """The gradients of a step whose closure divides its loss."""
    model, _, closure = ready()

    def loss() -> tuple[Tensor, Tensor]:
        output = closure()
        return output.loss / divided, output.logits

    adv = regularised(name, model, **options)
    if share is not ...:
        adv.share = share
    adv.backward(loss)
    return gradients(model)


@pytest.mark.parametrize("name", [*COMPARING, "bregman"])
def test_terms_count_the_batchs_share_whoever_divides(name: str) -> None:
    """By hand: the loss and each term divided by four. The owner divides the loss: the terms are not divided twice."""
    want = {key: grad / 4 for key, grad in shared(name, 1, ...).items()}
    assert_gradients(shared(name, 4, 0.25), want, 1e-12)
    assert_gradients(shared(name, 1, ..., backward=Dividing()), want, 1e-12)
    assert_gradients(shared(name, 1, 0.25, backward=Dividing()), want, 1e-12)
    assert_gradients(shared(name, 1, None, backward=Dividing()), want, 1e-12)


@pytest.mark.parametrize("name", [*COMPARING, "bregman"])
@pytest.mark.parametrize("share", [torch.tensor(0.25, dtype=torch.float64), torch.tensor([0.25])])
def test_a_share_may_be_a_tensor(name: str, share: Tensor) -> None:
    for key, grad in shared(name, 4, 0.25).items():
        assert same_bits(shared(name, 4, share)[key], grad), key


@pytest.mark.parametrize("share", [torch.ones(2), torch.tensor(True), -1, float("nan"), "1"])
def test_what_is_no_share(share: Any) -> None:
    model, _, _ = ready()
    adv = fastadv.SMART(model, embedding=model.word_embeddings)
    with pytest.raises((TypeError, ValueError), match="share must be"):
        adv.share = share
