"""The classic scripts' calls: their numbers, and a restore that leaves every bit where it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv import reference
from fastadv.ops import rows
from tests.models import Stateful, TiedLM, TinyModel
from tests.oracles.recorded import (
    ENGINES,
    FGM_ZHIHU,
    PGD_ZHIHU,
    Watched,
    check_zhihu,
    hyperparameters,
    load,
    zhihu,
)
from tests.support import (
    assert_close,
    assert_gradients,
    batch,
    clear,
    gradients,
    record,
    refused,
    same_bits,
    seeded,
)


def fgm_step(fgm: Any, closure: Callable[[], Tensor], **arguments: Any) -> None:
    """The classic loop, around any attacker with its calls."""
    closure().backward()
    fgm.attack(**arguments)
    closure().backward()
    fgm.restore()


def pgd_step(pgd: Any, model: nn.Module, closure: Callable[[], Tensor], steps: int, **arguments: Any) -> None:
    closure().backward()
    pgd.backup_grad()
    for t in range(steps):
        pgd.attack(is_first_attack=t == 0, **arguments)
        if t != steps - 1:
            model.zero_grad()
        else:
            pgd.restore_grad()
        closure().backward()
    pgd.restore()


def method(kind: type, model: nn.Module, fused: bool | None = None, **arguments: Any) -> Any:
    return kind(model, embedding=model.word_embeddings, fused=fused, **arguments)


class Whole:
    """The bits, the memory and the version of every parameter."""

    def __init__(self, model: nn.Module) -> None:
        self.kept = [(p, p.detach().clone(), p.data_ptr(), p._version) for p in model.parameters()]

    def unchanged(self) -> bool:
        return all(same_bits(p.detach(), copy) and p.data_ptr() == at for p, copy, at, _ in self.kept)

    def moved(self) -> list[bool]:
        return [p._version > version for p, _, _, version in self.kept]


# The numbers


@pytest.mark.parametrize("fused", ENGINES)
@pytest.mark.parametrize("name", FGM_ZHIHU)
def test_fgm_meets_the_script(name: str, fused: bool | None) -> None:
    model, run, watched = zhihu(name)
    before = Whole(model)
    fgm = method(fastadv.FGM, model, fused)
    with record(model) as seen:
        fgm_step(fgm, watched, **hyperparameters(name))
    check_zhihu(model, run, watched, seen)
    assert before.unchanged()


@pytest.mark.parametrize("fused", ENGINES)
@pytest.mark.parametrize("name", PGD_ZHIHU)
def test_pgd_meets_the_script(name: str, fused: bool | None) -> None:
    model, run, watched = zhihu(name)
    numbers, before = hyperparameters(name), Whole(model)
    pgd = method(fastadv.PGD, model, fused)
    with record(model) as seen:
        pgd_step(pgd, model, watched, numbers["steps"], epsilon=numbers["epsilon"], alpha=numbers["step_size"])
    check_zhihu(model, run, watched, seen)
    assert before.unchanged()


@pytest.mark.parametrize("fused", ENGINES)
def test_every_match_moves_by_its_own_norm(fused: bool | None) -> None:
    """Words, positions, and the layer norm's two vectors, as the script's substring matches them."""
    model, run = load("fgm_zhihu_mlp_multi_match", TinyModel)
    watched, before = Watched(lambda: model(run["ids"], run["mask"], run["labels"]).loss), Whole(model)
    fgm = method(fastadv.FGM, model, fused)
    watched().backward()
    fgm.attack(1.0, "embeddings")
    moved = 0
    for name, p in model.named_parameters():
        r = p.detach() - run["w"][name]
        assert_close(r, run["r"][name], 1e-7, name)
        moved += bool(r.any())
    assert moved == 4
    watched().backward()
    fgm.restore()
    assert before.unchanged()
    assert_gradients(gradients(model), run["g"], 1e-7)
    want = torch.stack([run["loss_clean"].reshape(()), run["loss_adv"].reshape(())])
    assert_close(torch.stack(watched.losses), want, 1e-7, "losses")


def test_a_script_that_gives_nothing_gets_the_scripts_numbers() -> None:
    """Epsilon 1.0, and alpha 0.3; a method that was given others has those."""
    model, run, watched = zhihu("fgm_zhihu_mlp_eps1.0")
    fgm_step(method(fastadv.FGM, model), watched)
    assert_gradients(gradients(model), run["g"], 1e-7)
    model, run, watched = zhihu("pgd_zhihu_mlp_eps1.0_a0.3_K5")
    pgd_step(method(fastadv.PGD, model), model, watched, 5)
    assert_gradients(gradients(model), run["g"], 1e-7)
    model, run, watched = zhihu("pgd_zhihu_mlp_eps0.5_a0.3_K3")
    pgd_step(method(fastadv.PGD, model, epsilon=0.5, step_size=0.3), model, watched, 3)
    assert_gradients(gradients(model), run["g"], 1e-7)


@pytest.mark.parametrize("fused", ENGINES)
@pytest.mark.parametrize("kind", ["fgm", "pgd"])
def test_accumulation_mixes_micro_batches_as_the_script_does(kind: str, fused: bool | None) -> None:
    results = []
    for ours in (True, False):
        model = seeded(TinyModel)
        embedding = model.word_embeddings
        if kind == "fgm":
            attacker = method(fastadv.FGM, model, fused) if ours else reference.FGM(embedding)
        else:
            attacker = method(fastadv.PGD, model, fused) if ours else reference.PGD(model, embedding)
        for seed in (1, 2, 3):
            data = batch(seed=seed)
            if kind == "fgm":
                fgm_step(attacker, lambda: model(**data).loss, epsilon=0.7)  # noqa: B023
            else:
                pgd_step(attacker, model, lambda: model(**data).loss, 3, epsilon=0.5, alpha=0.3)  # noqa: B023
        results.append(gradients(model))
    assert_gradients(*results, 1e-9)


@pytest.mark.parametrize("steps", [1, 3])
def test_words_that_only_a_later_attack_touches(steps: int) -> None:
    """Another batch between two attacks: new rows are copied before they move, and the ball is around all of them."""
    results = []
    for ours in (True, False):
        model = seeded(TinyModel)
        start = Whole(model)
        attacker = method(fastadv.PGD, model) if ours else reference.PGD(model, model.word_embeddings)
        for t in range(steps):
            data = batch(seed=t)
            clear(model)
            model(**data).loss.backward()
            attacker.attack(epsilon=0.4, alpha=0.3, is_first_attack=t == 0)
        results.append(model.word_embeddings.weight.detach().clone())
        attacker.restore()
        assert not ours or start.unchanged()
    assert_close(results[0], results[1], 1e-12, "table")


@pytest.mark.parametrize("fused", ENGINES)
def test_a_tied_output_layer_moves_too(fused: bool | None) -> None:
    """The softmax touches every row: the whole table moves, as in the script."""
    results, ids = [], batch()["input_ids"]
    for ours in (True, False):
        model = seeded(TiedLM)
        before = Whole(model)
        fgm = fastadv.FGM(model, fused=fused) if ours else reference.FGM(model.embed)
        model(ids).loss.backward()
        fgm.attack(epsilon=0.5, **({"emb_name": "embed"} if ours else {}))
        assert model.head.weight is model.embed.weight
        assert (model.embed.weight.detach() != before.kept[0][1]).any(dim=1).all()
        model(ids).loss.backward()
        fgm.restore()
        assert not ours or before.unchanged()
        results.append(gradients(model))
    assert_gradients(*results, 1e-9)


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


# No trace


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


# Gradients that are not there, or no numbers


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


# Names


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
