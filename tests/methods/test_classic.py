"""The classic scripts' calls: a restore that leaves every bit where it was, gradients that are not there, and names."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv.ops import rows
from tests.classic import Whole, fgm_step, method, pgd_step
from tests.models import Stateful, TinyModel
from tests.oracles.recorded import ENGINES
from tests.support import assert_close, assert_gradients, batch, clear, gradients, refused, same_bits, seeded


def test_the_norm_and_the_scope_of_the_method() -> None:
    for norm, scope in (("linf", "table"), ("l2", "row")):
        model, data = seeded(TinyModel), batch()
        table = model.word_embeddings.weight
        start = table.detach().clone()
        fgm = method(fastadv.FGM, model, norm=norm, scope=scope)
        model(**data).loss.backward()
        fgm.attack(0.1)
        moved, grad = table.detach() - start, table.grad
        size = grad.norm(dim=1, keepdim=True)
        want = 0.1 * grad.sign() if norm == "linf" else 0.1 * torch.where(size > 0, grad / size, 0)
        assert_close(moved, want, 1e-9, norm)
        fgm.restore()
    with pytest.raises(ValueError, match="scope must be 'table' or 'row', not 'sample'"):
        method(fastadv.FGM, model, scope="sample").attack()


def poison(table: Tensor, ids: Tensor) -> None:
    """NaN with payloads and zeros of both signs, in the rows of words that are in no batch and of one that is."""
    with torch.no_grad():
        patterns = torch.tensor([0x7F800001, -0x3FFFFF, -(2**31), 0, 1], dtype=torch.int32).view(torch.float32)
        unused = [row for row in range(len(table)) if row not in set(ids.flatten().tolist())]
        table[unused] = patterns.repeat(4)[: table.shape[1]].to(table.dtype)
        table[ids[0, 0], :2] = torch.tensor([-0.0, 0.0]).to(table.dtype)


@pytest.mark.parametrize("fused", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_restore_is_bit_exact_in_place(dtype: torch.dtype, fused: bool | None) -> None:
    model, data = seeded(TinyModel, dtype=dtype), batch()
    poison(model.word_embeddings.weight, data["input_ids"])
    for attacker in (method(fastadv.FGM, model, fused), method(fastadv.PGD, model, fused)):
        clear(model)
        before = Whole(model)
        first = {} if isinstance(attacker, fastadv.FGM) else {"is_first_attack": True}
        model(**data).loss.backward()
        attacker.attack(0.5, **first)
        table, copy = model.word_embeddings.weight.detach(), before.kept[0][1]
        touched = torch.zeros(len(table), dtype=torch.bool)
        touched[data["input_ids"]] = True
        assert same_bits(table[~touched], copy[~touched])
        assert not same_bits(table[touched], copy[touched])
        assert before.moved()[0]
        version = model.word_embeddings.weight._version
        attacker.restore()
        assert model.word_embeddings.weight._version > version
        assert before.unchanged()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_step_is_rounded_once(dtype: torch.dtype) -> None:
    model, data = seeded(TinyModel, dtype=dtype), batch()
    table = model.word_embeddings.weight
    start, fgm = table.detach().clone(), method(fastadv.FGM, model)
    model(**data).loss.backward()
    fgm.attack(0.7)
    wide = table.grad.double()
    want = (start.double() + 0.7 * wide / wide.norm()).to(dtype)
    assert (table.detach().double() - want.double()).abs().max() <= torch.finfo(dtype).eps * start.abs().max()
    fgm.restore()


def test_a_second_attack_keeps_the_first_backup() -> None:
    """The script loses it: what it restores is the table that the first attack has moved."""
    model, data = seeded(TinyModel), batch()
    before, fgm = Whole(model), method(fastadv.FGM, model)
    model(**data).loss.backward()
    fgm.attack(0.5)
    clear(model)
    model(**batch(seed=9)).loss.backward()
    fgm.attack(0.5)
    fgm.restore()
    assert before.unchanged()


def test_an_error_between_attack_and_restore_can_be_repaired() -> None:
    model, data = seeded(TinyModel), batch()
    before, pgd = Whole(model), method(fastadv.PGD, model)
    model(**data).loss.backward()
    clean = gradients(model)
    pgd.backup_grad()
    pgd.attack(is_first_attack=True)
    with pytest.raises(IndexError):
        model(data["input_ids"] + 1000)
    pgd.restore()
    pgd.restore_grad()
    assert before.unchanged()
    assert_gradients(gradients(model), clean, 0)
    pgd_step(pgd, model, lambda: model(**data).loss, 2)
    assert before.unchanged()


def test_an_error_while_more_rows_are_copied_can_be_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    model, back_up = seeded(TinyModel), rows.back_up
    before, pgd, table = Whole(model), method(fastadv.PGD, model), model.word_embeddings

    def attack(words: list[int], **first: bool) -> None:
        clear(model)
        table(torch.tensor(words)).pow(3).sum().backward()
        pgd.attack(**first)

    def fail(*_: Any, **__: Any) -> Tensor:
        raise MemoryError

    attack([1, 2], is_first_attack=True)
    monkeypatch.setattr(rows, "back_up", fail)
    with pytest.raises(MemoryError):
        attack([3, 4])
    monkeypatch.setattr(rows, "back_up", back_up)
    pgd.restore()
    assert before.unchanged()


def test_a_layer_that_the_model_gets_later_is_backed_up_too() -> None:
    model, data = seeded(TinyModel), batch()
    pgd = method(fastadv.PGD, model)
    pgd_step(pgd, model, lambda: model(**data).loss, 1)
    model.adapter = nn.Linear(2, 2)
    model.adapter.weight.grad = torch.ones(2, 2)
    pgd.backup_grad()
    model.zero_grad()
    pgd.restore_grad()
    assert (model.adapter.weight.grad == 1).all()


def test_both_ways_in_one_step() -> None:
    """`backward` sees the table as it is: around it the calls do what they do without it."""
    model, data = seeded(TinyModel), batch()
    before, fgm = Whole(model), method(fastadv.FGM, model)
    fgm.backward(lambda: model(**data).loss)
    want = gradients(model)
    clear(model)
    fgm_step(fgm, lambda: model(**data).loss)
    assert_gradients(gradients(model), want, 1e-9)
    clear(model)
    fgm.backward(lambda: model(**data).loss)
    assert_gradients(gradients(model), want, 0)
    assert before.unchanged()


def test_parameters_without_a_gradient_stay_without() -> None:
    model, data = seeded(Stateful, dtype=torch.float32), batch()
    pgd = fastadv.PGD(model)
    closure = lambda: model(data["input_ids"], data["labels"]).loss  # noqa: E731
    pgd_step(pgd, model, closure, 3, emb_name="embed")
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {name for name, _ in model.named_parameters() if name.startswith(("frozen", "unused"))}


@pytest.mark.parametrize("grad", ["none", "zero", "nan", "inf"])
def test_a_table_without_a_usable_gradient_stays(grad: str) -> None:
    model = seeded(TinyModel)
    table = model.word_embeddings.weight
    if grad != "none":
        table.grad = torch.zeros_like(table)
        table.grad[3, 4] = {"zero": 0.0, "nan": math.nan, "inf": -math.inf}[grad]
    for attacker in (method(fastadv.FGM, model), method(fastadv.PGD, model)):
        before = Whole(model)
        first = {} if isinstance(attacker, fastadv.FGM) else {"is_first_attack": True}
        attacker.attack(0.5, **first)
        assert before.unchanged()
        attacker.restore()
        assert before.unchanged()
        assert int(attacker.skipped) == (grad in {"nan", "inf"})


def test_a_match_without_a_gradient_is_left_out() -> None:
    model, data = seeded(TinyModel), batch()
    before, fgm = Whole(model), method(fastadv.FGM, model)
    model(**data).loss.backward()
    model.bert.embeddings.position_embeddings.weight.grad = None
    fgm.attack(0.5, "embeddings")
    assert before.moved()[:4] == [True, False, True, True]
    fgm.restore()
    assert before.unchanged()


def test_sparse_gradients() -> None:
    """nn.Embedding(sparse=True): its gradient holds the touched rows alone, some of them twice."""
    results = []
    for sparse in (True, False):
        words = seeded(lambda: nn.Embedding(20, 4, sparse=sparse))  # noqa: B023
        model = nn.ModuleDict({"word_embeddings": words})
        before, pgd = Whole(model), fastadv.PGD(model)
        closure = lambda: words(torch.tensor([3, 5, 3])).pow(3).sum()  # noqa: E731, B023
        pgd_step(pgd, model, closure, 3)
        assert before.unchanged()
        grad = words.weight.grad
        results.append(grad.to_dense() if sparse else grad)
    assert_close(results[0], results[1], 1e-12, "gradient")


def test_names_are_found_under_wrappers() -> None:
    inner, data = seeded(TinyModel), batch()
    before, wrapped = Whole(inner), nn.DataParallel(inner)
    fgm = fastadv.FGM(wrapped, embedding="word_embeddings")
    inner(**data).loss.backward()
    fgm.attack()
    assert before.moved() == [True] + [False] * (len(before.kept) - 1)
    fgm.restore("bert")
    assert before.unchanged()


def test_errors_say_what_to_do() -> None:
    model, data = seeded(TinyModel), batch()
    fgm, pgd = method(fastadv.FGM, model), method(fastadv.PGD, model)
    model(**data).loss.backward()
    names = ("bert.embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight")
    refused(model, lambda: fgm.attack(emb_name="wte"), ValueError, "'wte'", "emb_name=", *names)
    refused(model, lambda: pgd.attack(emb_name="wte", is_first_attack=True), ValueError, *names)
    refused(model, lambda: pgd.attack(), RuntimeError, "is_first_attack=True")
    for attacker in (fgm, pgd):
        refused(model, attacker.restore, RuntimeError, "restore() without attack()")
    refused(model, pgd.restore_grad, RuntimeError, "backup_grad()")
    model.word_embeddings.weight.to_local = None  # as a sharded tensor has it
    refused(model, fgm.attack, TypeError, names[0], "sharded", "backward()")
    del model.word_embeddings.weight.to_local
    model.word_embeddings.requires_grad_(False)
    model.bert.embeddings.more = nn.Parameter(torch.zeros(3, 2).T, requires_grad=False)  # stays where it is
    fgm.attack(emb_name="embeddings")
    fgm.restore()
    refused(model, fgm.attack, ValueError, "frozen", names[0], "backward()")
    with pytest.raises(RuntimeError):
        fgm.restore()
