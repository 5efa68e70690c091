"""A tied head. By default the lookups are perturbed and the head is not. tied="both" moves the table itself, and the
head with it, as the classic scripts do; then puts it back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv import reference
from tests.every import HOLDING
from tests.models import TiedLM, TinyModel
from tests.oracles import oracles
from tests.support import (
    PGD3,
    assert_close,
    assert_gradients,
    assert_unchanged,
    batch,
    clear,
    gradients,
    record,
    refused,
    relative,
    seeded,
    snapshot,
)

METHODS = {
    "fgm": (fastadv.FGM, reference.fgm, {"epsilon": 0.5}),
    "pgd": (fastadv.PGD, reference.pgd, {"epsilon": 0.4, "step_size": 0.3, "steps": 3}),
}
FUSED = [None, False]


def lm(dtype: torch.dtype = torch.float64) -> tuple[TiedLM, Any]:
    model, ids = seeded(TiedLM, dtype=dtype), batch()["input_ids"]
    return model, lambda: model(ids).loss


def untied() -> tuple[TinyModel, Any]:
    model, data = seeded(TinyModel), batch()
    return model, lambda: model(*data.values()).loss


def table(model: nn.Module) -> nn.Embedding:
    return model.embed if isinstance(model, TiedLM) else model.word_embeddings


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("build", [lm, untied])
@pytest.mark.parametrize("name", METHODS)
def test_is_the_classic_script(name: str, build: Any, fused: bool | None) -> None:
    method, script, numbers = METHODS[name]
    model, closure = build()
    twin, other = build()
    adv = method(model, embedding=table(model), tied="both", fused=fused, **numbers)
    result = adv.backward(closure)
    loss, adv_loss = script(twin, other, table(twin), **numbers)
    assert_gradients(gradients(model), gradients(twin), 1e-11)
    assert_close(result.loss, loss, 1e-12, "loss")
    assert_close(result.adv_loss, adv_loss if name == "fgm" else adv_loss[-1], 1e-11, "adv_loss")
    assert_close(adv.perturbation_norm, torch.tensor(numbers["epsilon"], dtype=torch.float64), 1e-9, "norm")


@pytest.mark.parametrize("build", [lm, untied])
def test_the_table_goes_back_bit_for_bit(build: Any) -> None:
    model, closure = build()
    weight = table(model).weight
    with torch.no_grad():
        weight[0, 0] = -0.0
    before, version, address = weight.detach().clone(), weight._version, weight.data_ptr()
    adv = fastadv.PGD(model, embedding=table(model), tied="both")
    adv.backward(closure)
    assert torch.equal(weight.view(torch.int64), before.view(torch.int64))
    assert weight._version > version and weight.data_ptr() == address


def test_accumulation_follows_the_micro_batch_alone() -> None:
    model, closure = lm()
    adv = fastadv.FGM(model, tied="both", epsilon=0.5)
    adv.backward(closure)
    once = gradients(model)
    adv.backward(closure)
    assert_gradients(gradients(model), {name: 2 * grad for name, grad in once.items()}, 1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_row_scope_moves_every_word_by_itself(name: str) -> None:
    method, _, numbers = METHODS[name]
    model, closure = untied()
    both = method(model, embedding=table(model), tied="both", scope="row", **numbers)
    both.backward(closure)
    moved = gradients(model)
    both.close()
    model.zero_grad()
    method(model, embedding=table(model), scope="row", **numbers).backward(closure)
    assert_gradients(moved, gradients(model), 1e-10)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_without_a_tied_head_it_is_the_lookups(norm: str) -> None:
    model, closure = untied()
    results = []
    for tied in ("both", "lookup"):
        model.zero_grad()
        adv = fastadv.PGD(model, embedding=table(model), tied=tied, norm=norm, epsilon=0.02, step_size=0.01)
        adv.backward(closure)
        adv.close()
        results.append(gradients(model))
    assert_gradients(*results, 1e-10)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("present", [False, True])
def test_a_fault_in_any_pass_leaves_no_trace(at: int, present: bool) -> None:
    model, closure = lm()
    if present:
        closure().backward()
    passes: list[int] = []

    def failing() -> Tensor:
        passes.append(1)
        if len(passes) == at:
            raise KeyboardInterrupt
        return closure()

    adv = fastadv.PGD(model, tied="both")
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        adv.backward(failing)
    assert_unchanged(model, before)


def test_perturbed_moves_the_table_inside_the_block_alone() -> None:
    model, closure = lm()
    adv = fastadv.PGD(model, tied="both")
    clean = closure()
    with adv.perturbed(closure):
        assert closure() > clean
    assert torch.equal(closure(), clean)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attack_follows_another_loss() -> None:
    model, closure = lm()
    adv = fastadv.FGM(model, tied="both", epsilon=0.5)
    result = adv.backward(closure, attack=lambda: -closure())
    assert result.adv_loss < result.loss


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    model, closure = lm()
    adv = fastadv.FGM(model, tied="both")
    result = adv.backward(lambda: closure() * float("inf"))
    assert result.adv_loss == result.loss
    assert adv.skipped == 1
    assert adv.perturbation_norm == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, closure = lm(dtype)
    adv = fastadv.FGM(model, tied="both", epsilon=0.5)
    before = model.embed.weight.detach().clone()
    adv.backward(closure)
    assert torch.equal(model.embed.weight, before)
    exact, other = lm()
    fastadv.FGM(exact, tied="both", epsilon=0.5).backward(other)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    assert relative(gradients(model)["embed.weight"].double(), gradients(exact)["embed.weight"]) < tolerance


def test_a_compiled_model() -> None:
    (model, _), (want, other) = lm(), lm()
    compiled = torch.compile(model, backend="aot_eager")
    ids = batch()["input_ids"]
    fastadv.PGD(compiled, tied="both").backward(lambda: compiled(ids).loss)
    fastadv.PGD(want, tied="both").backward(other)
    assert_gradients(gradients(model), gradients(want), 1e-12)


@pytest.mark.parametrize("options", [{"scope": "sample"}, {"random_start": 0.1}, {"scope": "token"}])
def test_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs scope='table' or 'row' and random_start=False"):
        fastadv.PGD(lm()[0], tied="both", **options)


def test_refuses_a_frozen_table() -> None:
    model, _ = untied()
    model.word_embeddings.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="this one is frozen"):
        fastadv.PGD(model, embedding=model.word_embeddings, tied="both")


@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_tied_weights_perturb_the_lookups_and_not_the_head(scope: str) -> None:
    model, ids = seeded(TiedLM), batch()["input_ids"]
    weight = model.embed.weight
    adv = fastadv.PGD(model, scope=scope, **PGD3)
    with record(model) as seen:
        adv.backward(lambda: model(ids).loss)
    want = oracles.attack(model, lambda e: model(ids, e).loss, weight, ids, scope=scope, **PGD3)
    assert_gradients(gradients(model), want.gradients, 1e-9)
    assert_close(seen[-1] - weight[ids], want.perturbations[-1], 1e-9, "perturbation")


def test_tied_weights_differ_from_the_classic_script() -> None:
    """The script moves the table, and the head with it; most of that perturbation comes from the head's gradient."""
    model, ids = seeded(TiedLM), batch()["input_ids"]
    adv = fastadv.FGM(model, epsilon=0.5)
    adv.backward(lambda: model(ids).loss)
    mine = gradients(model)
    clear(model)
    adv.close()
    reference.fgm(model, lambda: model(ids).loss, model.embed, epsilon=0.5)
    assert relative(gradients(model)["mix.weight"], mine["mix.weight"]) > 1e-3


@pytest.mark.parametrize("name", HOLDING)
def test_the_output_layer_cannot_be_moved(name: str) -> None:
    model = seeded(TiedLM)
    phrases = [name.upper(), "tied='both'", "tied='lookup'"]
    refused(model, lambda: HOLDING[name](model, scope="table", tied="both"), ValueError, *phrases)
    ids = batch()["input_ids"]
    adv = HOLDING[name](model)
    with record(model) as seen:
        adv.backward(lambda: model(ids))
    assert not torch.equal(seen[-1], seen[0])
