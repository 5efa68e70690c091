"""A compiled model: the gradients of the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastadv
from tests.every import COMPARING, every_but
from tests.models import TinyModel
from tests.support import assert_gradients, batch, clear, gradients, seeded

COMPILED = {**every_but("llr"), **COMPARING, "neftune": fastadv.NEFTune}  # LLR refuses it


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str) -> None:
    """The same gradients under torch.compile."""
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, data = seeded(lambda: TinyModel("tfm")), batch()
        adv_model: Any = torch.compile(model, backend="aot_eager") if compiled else model
        adv = COMPILED[name](adv_model, embedding="word_embeddings")
        torch.manual_seed(1)
        for _ in range(2):
            clear(model)
            adv.backward(lambda: adv_model(**data), mask=data["attention_mask"])  # noqa: B023
            with torch.no_grad():
                model.classifier.weight.mul_(0.9)
        found.append(gradients(model))
        adv.close()
    assert_gradients(found[1], found[0], 1e-9)
