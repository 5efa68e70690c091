"""The reference does what the classic scripts do, and not what they get wrong by accident."""

from __future__ import annotations

import pytest
import torch

from fastadv import reference
from tests import oracles
from tests.models import Stateful, TinyModel
from tests.support import assert_gradients, batch, gradients, seeded


@pytest.mark.parametrize("kind", ["mlp", "tfm"])
@pytest.mark.parametrize("method", ["fgm", "pgd"])
def test_equals_the_oracle_in_table_scope(method: str, kind: str) -> None:
    model, data = seeded(lambda: TinyModel(kind)), batch()
    weight, ids = model.word_embeddings.weight, data["input_ids"]
    before, numbers = weight.detach().clone(), {"epsilon": 0.5}
    if method == "pgd":
        numbers.update(step_size=0.3, steps=4)
    getattr(reference, method)(model, lambda: model(**data).loss, model.word_embeddings, **numbers)
    assert torch.equal(weight, before)
    full = {"step_size": 0.5, "steps": 1} | numbers
    want = oracles.attack(
        model,
        lambda e: model(None, data["attention_mask"], data["labels"], e).loss,
        weight,
        ids,
        scope="table",
        **full,
    )
    assert_gradients(gradients(model), want.gradients, 1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_parameters_without_a_gradient_stay_without(steps: int) -> None:
    """The script fails here: it clones a gradient that is None."""
    model, data = seeded(Stateful, dtype=torch.float32), batch()
    reference.pgd(model, lambda: model(data["input_ids"], data["labels"]).loss, model.embed, steps=steps)
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {name for name, _ in model.named_parameters() if name.startswith(("frozen", "unused"))}


@pytest.mark.parametrize("attacker", ["FGM", "PGD"])
def test_a_table_without_a_gradient_stays(attacker: str) -> None:
    model = seeded(TinyModel)
    embedding = model.word_embeddings
    before = embedding.weight.detach().clone()
    if attacker == "FGM":
        attack = reference.FGM(embedding)
        attack.attack(1.0)
    else:
        attack = reference.PGD(model, embedding)
        attack.attack(1.0, 0.3, is_first_attack=True)
    assert torch.equal(embedding.weight, before)
    attack.restore()
    assert torch.equal(embedding.weight, before)
    with pytest.raises(RuntimeError, match="attack"):
        attack.restore()
