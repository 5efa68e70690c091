"""The reference does what the classic scripts do, and not what they get wrong by accident."""

from __future__ import annotations

import pytest
import torch

from fastadv import reference
from tests.models import Stateful, TinyModel
from tests.oracles import oracles, papers
from tests.support import assert_close, assert_gradients, batch, clear, gradients, ready, record, relative, seeded


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


def near() -> tuple[TinyModel, dict[str, torch.Tensor], papers.Site, torch.Tensor]:
    """A model with attention, a batch, where it is perturbed, and a start."""
    model, data = seeded(lambda: TinyModel("tfm")), batch()
    site = papers.Site(model.word_embeddings.weight, data["input_ids"], "sample")
    start = 0.05 * torch.randn(site.zero().shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return model, data, site, start


@pytest.mark.parametrize("clean_weight", [1.0, 0.5, 0.0])
def test_fgsm_equals_the_oracle(clean_weight: float) -> None:
    model, data, site, start = near()
    numbers = {"epsilon": 0.05, "step_size": 0.06, "clean_weight": clean_weight}
    reference.fgsm(lambda: model(**data).loss, model.word_embeddings, start, **numbers)
    want = oracles.attack(
        model,
        lambda e: model(None, data["attention_mask"], data["labels"], e).loss,
        site.weight,
        site.ids,
        scope="sample",
        norm="linf",
        steps=1,
        start=start,
        **numbers,
    )
    assert_gradients(gradients(model), want.gradients, 1e-9)


@pytest.mark.parametrize("epsilon", [None, 0.2])
@pytest.mark.parametrize("norm", oracles.NORMS)
@pytest.mark.parametrize("method", ["freelb", "yopo"])
def test_freelb_and_yopo_equal_the_oracle(method: str, norm: str, epsilon: float | None) -> None:
    model, data, site, start = near()
    numbers = {"epsilon": epsilon, "step_size": 0.1, "steps": 3, "norm": norm}
    split = () if method == "freelb" else (model.bert.embeddings,)
    more = {} if method == "freelb" else {"inner_steps": 2}
    losses = getattr(reference, method)(
        lambda: model(**data).loss, model.word_embeddings, *split, start, **numbers, **more
    )
    loss_at = lambda e: model(None, data["attention_mask"], data["labels"], e).loss  # noqa: E731
    want = getattr(papers, method)(model, site, loss_at, *split, start=start, **numbers, **more)
    assert_gradients(gradients(model), want.gradients, 1e-9)
    assert torch.allclose(torch.stack(losses), torch.stack(want.losses), rtol=1e-12)


def test_freeat_equals_the_oracle() -> None:
    mine, its = (seeded(lambda: TinyModel("tfm")) for _ in range(2))
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    buffer = reference.FreeAT(mine.word_embeddings, 4, 9)
    oracle = papers.FreeAT(its, its.word_embeddings.weight, 4, 9, rate=0.1)
    numbers = {"epsilon": 0.05, "step_size": 0.03}
    for size in [(4, 7), (4, 7), (2, 9), (2, 9)]:
        data = batch(*size)
        ids, mask, labels = data["input_ids"], data["attention_mask"], data["labels"]
        optimizer.zero_grad()
        buffer.replay(lambda: mine(ids, mask, labels).loss, *size, **numbers)  # noqa: B023
        optimizer.step()
        loss_at = lambda e: its(None, mask, labels, e).loss  # noqa: B023, E731
        oracle.replay(ids, torch.ones_like(mask), loss_at, scope="sample", norm="linf", **numbers)
    parameters = ({name: p.detach() for name, p in model.named_parameters()} for model in (mine, its))
    assert_gradients(*parameters, 1e-9)


def test_the_reference_follows_the_accumulated_gradient_as_the_script_does() -> None:
    """A defect of the classic script, kept in the reference and not in the engine."""
    model, _, first = ready()
    second_batch = batch(seed=9)
    weight = model.word_embeddings.weight
    first().loss.backward()
    with record(model) as seen:
        reference.fgm(model, lambda: model(**second_batch).loss, model.word_embeddings, epsilon=0.5)
    ids = second_batch["input_ids"]
    moved = (seen[1] - seen[0]).detach()
    clear(model)
    first().loss.backward()
    model(**second_batch).loss.backward()
    assert_close(moved, (0.5 * weight.grad / weight.grad.norm())[ids], 1e-9, "the script's direction")
    clear(model)
    model(**second_batch).loss.backward()
    own = (0.5 * weight.grad / weight.grad.norm())[ids]
    assert relative(moved, own) > 0.1
