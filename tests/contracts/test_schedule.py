"""When a step is attacked: `start_step`, `every` and the caller's step."""

from __future__ import annotations

from typing import Any

import pytest

import fastadv
from tests.every import EVERY, every_but
from tests.support import clear, gradients, ready, relative, same_bits


@pytest.mark.parametrize("method", every_but("freeat").values(), ids=every_but("freeat"))
@pytest.mark.parametrize(
    ("options", "attacked"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"start_step": 3}, [3, 4, 5, 6, 7]),
        ({"every": 3}, [0, 3, 6]),
        ({"start_step": 1, "every": 4}, [1, 5]),
        ({"start_step": 100}, []),
    ],
    ids=str,
)
def test_start_step_and_every(method: Any, options: dict[str, int], attacked: list[int]) -> None:
    """Other steps are plain training, to the bit."""
    model, _, closure = ready()
    adv = method(model, embedding=model.word_embeddings, **options)
    closure().loss.backward()
    plain = gradients(model)
    done = []
    for step in range(8):
        clear(model)
        result = adv.backward(closure)
        if result.adv_loss is not None:
            done.append(step)
            assert relative(*(g["classifier.weight"] for g in (gradients(model), plain))) > 0.01
        else:
            assert all(same_bits(grad, plain[name]) for name, grad in gradients(model).items())
        if method is not EVERY["neftune"]:  # no pass of it is clean
            assert same_bits(result.loss, closure().loss.detach())
        assert result.output.logits.requires_grad is False
    assert done == attacked
    assert adv.attacked == len(attacked)
    assert isinstance(adv.attacked, int)


def test_the_callers_step_counts_where_it_is_given() -> None:
    """Under gradient accumulation every micro-batch of a step has that step's number."""
    model, _, closure = ready()
    adv = fastadv.FGM(model, embedding=model.word_embeddings, start_step=2, every=2)
    seen = [adv.backward(closure, step=step).adv_loss is not None for step in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)]
    assert seen == [False] * 4 + [True] * 2 + [False] * 2 + [True] * 2
