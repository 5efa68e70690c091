"""The harness can fail: each kind of violation is planted, and is found and called by its name."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastadv
from tests.campaigns.configurations import Configuration
from tests.campaigns.faults import AtOperation
from tests.campaigns.interrupts import interrupts
from tests.campaigns.pair import AFTER, BEFORE, RETURNED, UNSTRUCK, Pair, Strike, Struck, Verdict
from tests.campaigns.trials import operations


class Broken(fastadv.FGM):
    """A method that does something to its model, or to itself, when a step fails, or when one succeeds."""

    def __init__(self, model: torch.nn.Module, **options: Any) -> None:
        self.fails: Callable[[Broken], None] = lambda _: None
        self.succeeds: Callable[[Broken], None] = lambda _: None
        super().__init__(model, **options)

    def backward(self, *arguments: Any, **options: Any) -> Any:
        try:
            result = super().backward(*arguments, **options)
        except BaseException:
            self.fails(self)
            raise
        self.succeeds(self)
        return result


def pair() -> Pair:
    return Pair(Configuration("FGM", Broken, {"scope": "sample"}, "backward", "all"), 0)


def fault(of: Pair) -> Strike:
    return AtOperation(int(operations(of)) // 2, [RuntimeError("boom")])


def after_a_fault(does: Callable[[Broken], None]) -> Verdict:
    found = pair()
    found.subject.adv.fails = does
    return found.trial(fault(found))


def kinds(verdict: Verdict) -> set[str]:
    return {kind for kind, _ in verdict.violations}


def parameter(adv: Broken) -> torch.nn.Parameter:
    *_, last = adv.model.parameters()
    return last


def nudge(tensor: torch.Tensor) -> None:
    tensor.detach().view(-1)[-1:].copy_(torch.nextafter(tensor.detach().view(-1)[-1:], torch.tensor(9.0)))


def refuse(adv: Broken) -> None:
    def backward(*_: Any) -> None:
        raise RuntimeError("a step is already running")

    adv.backward = backward


def hook(adv: Broken) -> None:
    adv.model.head.register_forward_hook(lambda *_: None)


def other_gradient(adv: Broken) -> None:
    parameter(adv).grad = parameter(adv).grad.clone()


def another_object(adv: Broken) -> None:
    adv.model.head.bias = torch.nn.Parameter(adv.model.head.bias.detach().clone())


PLANTED: dict[str, tuple[Callable[[Broken], Any], str]] = {
    "the last weight is one bit off": (lambda adv: nudge(parameter(adv)), "wrong weights"),
    "a parameter is another object": (another_object, "wrong weights"),
    "a gradient is another object": (other_gradient, "other traces"),
    "a gradient has changed": (lambda adv: nudge(parameter(adv).grad), "other traces"),
    "an integer buffer has": (lambda adv: adv.model.seen.data.add_(1), "other traces"),
    "an expanded buffer has": (lambda adv: adv.model.expanded.data[0, 0].add_(1), "other traces"),
    "a buffer was made": (lambda adv: adv.model.register_buffer("new", torch.ones(1)), "other traces"),
    "a hook was left": (hook, "other traces"),
    "a module's mode has changed": (lambda adv: adv.model.still.train(), "other traces"),
    "a parameter is frozen": (lambda adv: parameter(adv).requires_grad_(False), "other traces"),
    "a generator has moved": (lambda adv: torch.rand(1), "other traces"),
    "grad mode is off": (lambda adv: torch.set_grad_enabled(False), "other traces"),
    "it stays busy": (refuse, "stays busy"),
    "it has counted the step": (lambda adv: adv._count(True), "differs"),
    "its next step is another": (lambda adv: setattr(adv, "step_size", 0.5), "differs"),
}


@pytest.fixture(autouse=True)
def _a_thread_of_its_own() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("what", PLANTED)
def test_planted(what: str) -> None:
    does, kind = PLANTED[what]
    assert kind in kinds(after_a_fault(does))


def test_a_late_rollback() -> None:
    """A generator that was left half way puts something back when the error, which holds its frame, is let go."""

    def late(adv: Broken) -> None:
        weight = parameter(adv)
        old = weight.detach().clone()

        def generator() -> Iterator[None]:
            try:
                yield
            finally:
                weight.detach().copy_(old - 1)

        left = generator()
        next(left)
        raise RuntimeError(left)

    found = pair()
    found.subject.adv.fails = late
    while found.chance.random() >= 0.5:  # whether errors are kept is drawn
        pass
    verdicts = [found.trial(fault(found))]
    for _ in range(5):
        found.subject.adv.fails = late
        verdicts.append(found.trial(fault(found)))
    assert any("let go" in what for verdict in verdicts for _, what in verdict.violations)


def test_nothing_is_planted() -> None:
    """One fault after another in the same pair, before and after an operation is done, and a step without one."""
    found = pair()
    size = int(operations(found))
    for place in range(0, size - 20, 13):  # where a pass makes a buffer there are a few operations more
        verdict = found.trial(AtOperation(place, [KeyboardInterrupt()], done=bool(place % 2)))
        assert verdict == Verdict(BEFORE, []), place
    assert found.trial(AtOperation(10 * size, [KeyboardInterrupt()])) == Verdict(UNSTRUCK, [])


def test_a_fault_after_the_step() -> None:
    """The step is done, and raises all the same: the twin does it too."""

    def late(action: Callable[[], None]) -> Struck:
        action()
        return Struck(True, False, KeyboardInterrupt())

    assert pair().trial(late) == Verdict(AFTER, [])


def test_half_a_step() -> None:
    """What is neither as before nor as done is wrong."""

    def half(action: Callable[[], None]) -> Struck:
        action()
        parameter(found.subject.adv).grad = None
        return Struck(True, False, KeyboardInterrupt())

    found = pair()
    assert kinds(found.trial(half)) == {"other traces"}


def test_signals_arrive() -> None:
    """In an action one raises; where it comes after the action, it is counted and no more."""
    with interrupts() as source:
        struck = source.strike(lambda: [None for _ in iter(int, 1)], 0.001, 1, 0.0)  # type: ignore[arg-type]
        assert isinstance(struck.error, KeyboardInterrupt)
        assert struck.fired and not struck.returned
        assert source.strike(lambda: None, 0.01, 1, 0.0) == Struck(True, True, None)


def test_outcomes_have_different_names() -> None:
    assert len({BEFORE, AFTER, RETURNED, UNSTRUCK}) == 4
