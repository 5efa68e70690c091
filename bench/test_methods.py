"""One training step of each method that perturbs positions: by hand in plain PyTorch, and with fastadv.

All steps of all methods take turns in one race, so that the methods compare with each other too: what YOPO's inner
steps cost, and what a pass of FreeLB costs over one of plain training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadv
from bench import by_hand
from bench.check import same_gradients
from bench.race import Copy, Entry, Result, race, replay_clock, report
from bench.workloads import Size, classifier, loss_closure, zipf
from fastadv import reference

pytestmark = pytest.mark.filterwarnings("ignore:FreeAT")  # no optimizer steps between replays: they are not timed

Steps = dict[tuple[str, str], Callable[[], object]]
EPSILON, STEP = 0.002, 0.1
WORK = ("FGSM", "FreeLB-3", "YOPO-3-3", "YOPO-3-5", "FreeAT, one replay")
CONTESTANTS = ("plain", "plain PyTorch", "fastadv")
ROUNDS = 5


@pytest.fixture(scope="module")
def result(size: Size, copy: Copy, rounds: Callable[[int], int]) -> Result:
    """The race of all, after their gradients were compared with the reference's, which is not timed."""
    vocabulary = size.vocabularies[0]
    model = classifier(size.model, vocabulary)
    steps = contestants(model, size, loss_closure(model, size, vocabulary), vocabulary)
    for work in [*WORK, "FreeAT, one replay"]:  # again: its second replay is the first that is perturbed
        others = {f"{work}, {name}": steps[work, name] for name in CONTESTANTS[1:]}
        same_gradients(model, steps[work, "reference"], others, 1e-3)
    entries = {
        f"{work}: {contestant}": Entry(model.zero_grad, step)
        for (work, contestant), step in steps.items()
        if contestant in CONTESTANTS
    }
    return race(entries, rounds(ROUNDS), copy)


def contestants(model: Any, size: Size, closure: Callable[[], Tensor], vocabulary: int) -> Steps:
    """Every step; those of FreeAT go on from replay to replay."""
    embedding, ids = model.get_input_embeddings(), zipf(size.batch, size.length, vocabulary)
    zero = torch.zeros(size.batch, size.length, embedding.embedding_dim)
    hand, layers, first = by_hand.ByHand(model), by_hand.Layers(model, ids), model.bert.encoder.layer[0]
    buffer = reference.FreeAT(embedding, size.batch, size.length)
    by_hands, freeat = by_hand.FreeAT(hand, EPSILON), fastadv.FreeAT(model, epsilon=EPSILON)
    fgsm, freelb = fastadv.FGSM(model, epsilon=EPSILON), fastadv.FreeLB(model, step_size=STEP, random_start=False)
    size_of = {"epsilon": EPSILON, "step_size": EPSILON}
    steps: Steps = {
        ("", "plain"): lambda: closure().backward(),  # type: ignore[no-untyped-call]
        ("FGSM", "reference"): lambda: reference.fgsm(closure, embedding, zero, **size_of),
        ("FGSM", "plain PyTorch"): lambda: by_hand.fgsm(hand, closure, EPSILON),
        ("FGSM", "fastadv"): lambda: fgsm.backward(closure),
        ("FreeLB-3", "reference"): lambda: reference.freelb(closure, embedding, zero),
        ("FreeLB-3", "plain PyTorch"): lambda: by_hand.freelb(hand, closure, 3, STEP),
        ("FreeLB-3", "fastadv"): lambda: freelb.backward(closure),
        ("FreeAT, one replay", "reference"): lambda: buffer.replay(closure, size.batch, size.length, **size_of),
        ("FreeAT, one replay", "plain PyTorch"): lambda: by_hands.replay(closure),
        ("FreeAT, one replay", "fastadv"): lambda: freeat.backward(closure),
    }
    for inner in (3, 5):
        yopo = fastadv.YOPO(model, step_size=STEP, random_start=False, inner_steps=inner)
        steps[f"YOPO-3-{inner}", "reference"] = lambda n=inner: reference.yopo(
            closure, embedding, first, zero, inner_steps=n
        )
        steps[f"YOPO-3-{inner}", "plain PyTorch"] = lambda n=inner: by_hand.yopo(hand, closure, layers, 3, n, STEP)
        steps[f"YOPO-3-{inner}", "fastadv"] = lambda method=yopo: method.backward(closure)
    return steps


@pytest.mark.benchmark(timer=replay_clock)
@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("work", WORK)
def test_methods(benchmark: Any, work: str, contestant: str, size: Size, result: Result, info: dict[str, Any]) -> None:
    seconds = result.seconds[f"{'' if contestant == 'plain' else work}: {contestant}"]
    found = {**info, "contestant": contestant, "copy_bandwidth": result.bandwidth}
    report(benchmark, f"training step, {work}, V {size.vocabularies[0]:,}", seconds, found)
