"""The table's gradient is what autograd would have brought, whoever adds it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from tests.models import TinyModel
from tests.support import assert_close, assert_gradients, assert_unchanged, batch, gradients, seeded, snapshot

SCOPES = ["table", "row", "batch", "sample", "token"]
METHODS = {"fgm": (fastadv.FGM, {}), "pgd": (fastadv.PGD, {"steps": 3}), "last": (fastadv.PGD, {"clean_weight": 0})}


def step(model: nn.Module, name: str = "pgd", **options: Any) -> dict[str, Tensor]:
    data = batch()
    method, common = METHODS[name]
    adv = method(model, embedding=model.word_embeddings, epsilon=0.5, **common, **options)
    adv.backward(lambda: model(*data.values()).loss, mask=data["attention_mask"])
    adv.close()
    return gradients(model)


def watch(model: nn.Module) -> list[Tensor]:
    """A hook on the table's gradient: from here on autograd brings it."""
    seen: list[Tensor] = []
    model.word_embeddings.weight.register_hook(lambda grad: seen.append(grad.clone()))
    return seen


def pair(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """Two equal models, of which the second's table is watched."""
    alone, watched = seeded(TinyModel, dtype=dtype), seeded(TinyModel, dtype=dtype)
    return alone, watched, watch(watched)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", METHODS)
def test_is_what_autograd_brings(name: str, scope: str, fused: bool | None) -> None:
    alone, watched, seen = pair()
    got, want = step(alone, name, scope=scope, fused=fused), step(watched, name, scope=scope, fused=fused)
    assert len(seen) == (1 if name == "last" else 2)
    assert_gradients(got, want, 1e-12)


@pytest.mark.parametrize("scope", ["table", "sample"])
def test_adds_to_what_is_there(scope: str) -> None:
    alone, watched, _ = pair()
    for model in (alone, watched):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    kept = alone.word_embeddings.weight.grad
    assert_gradients(step(alone, scope=scope), step(watched, scope=scope), 1e-12)
    assert alone.word_embeddings.weight.grad is kept


def test_the_version_of_a_gradient_that_is_added_to_moves() -> None:
    model = seeded(TinyModel)
    grad = model.word_embeddings.weight.grad = torch.zeros_like(model.word_embeddings.weight)
    before = grad._version
    step(model)
    assert grad._version > before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    alone, watched, _ = pair(dtype)
    got, want = step(alone, scope="sample"), step(watched, scope="sample")
    weight = "bert.embeddings.word_embeddings.weight"
    assert got[weight].dtype == dtype
    assert_close(got[weight].float(), want[weight].float(), 2e-2, "table")


@pytest.mark.parametrize("hook", ["tensor", "post accumulate"])
def test_hooks_on_the_table_run(hook: str) -> None:
    model, ran = seeded(TinyModel), []
    weight = model.word_embeddings.weight
    if hook == "tensor":
        weight.register_hook(lambda grad: ran.append(grad))
    else:
        weight.register_post_accumulate_grad_hook(lambda parameter: ran.append(parameter))
    step(model)
    assert len(ran) == 2


def test_a_backward_of_the_users_sees_every_gradient() -> None:
    model, seen = seeded(TinyModel), []

    def backward(loss: Tensor) -> None:
        loss.backward()
        seen.append(model.word_embeddings.weight.grad.clone())

    step(model, backward=backward)
    assert len(seen) == 2 and all((grad != 0).any() for grad in seen)


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract:UserWarning")
@pytest.mark.parametrize("other", ["transposed", "sparse"])
def test_a_gradient_of_another_kind_is_autograds(other: str) -> None:
    alone, plain = seeded(TinyModel), seeded(TinyModel)
    weight = alone.word_embeddings.weight
    zeros = torch.zeros_like(weight)
    weight.grad = zeros.t().contiguous().t() if other == "transposed" else zeros.to_sparse()
    step(alone)
    weight.grad = weight.grad.to_dense()
    assert_gradients(gradients(alone), step(plain), 1e-12)


def test_a_frozen_table_has_no_gradient() -> None:
    model = seeded(TinyModel)
    model.word_embeddings.weight.requires_grad_(False)
    step(model)
    assert model.word_embeddings.weight.grad is None


def test_the_row_of_padding_idx_gets_none() -> None:
    model = seeded(TinyModel)
    model.word_embeddings.padding_idx = 3
    data = batch(pad=3)
    adv = fastadv.PGD(model, embedding=model.word_embeddings)
    adv.backward(lambda: model(data["input_ids"], torch.ones_like(data["attention_mask"]), data["labels"]).loss)
    grad = model.word_embeddings.weight.grad
    assert (data["input_ids"] == 3).any()
    assert (grad[3] == 0).all() and (grad != 0).any()


@pytest.mark.parametrize("scope", ["table", "sample"])
def test_a_weight_that_stands_in_for_the_tables_keeps_its_graph(scope: str) -> None:
    """As in meta-learning: what the forward looks up was computed from something else."""
    results = []
    for watched in (False, True):
        model, factor, data = seeded(TinyModel), torch.tensor(1.5, dtype=torch.float64, requires_grad=True), batch()
        if watched:
            watch(model)
        adv = fastadv.PGD(model, embedding=model.word_embeddings, scope=scope)

        def closure(model: nn.Module = model, factor: Tensor = factor, data: dict[str, Tensor] = data) -> Tensor:
            scaled = {name: factor * parameter for name, parameter in model.named_parameters()}
            return torch.func.functional_call(model, scaled, tuple(data.values())).loss

        adv.backward(closure)
        results.append({**gradients(model), "factor": factor.grad})
    assert_gradients(*results, 1e-12)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("scope", ["table", "sample"])
@pytest.mark.parametrize("name", METHODS)
def test_each_pass_has_the_gradient_of_its_own_ids(name: str, scope: str, in_place: bool) -> None:
    """A model that drops words at random looks up others in every pass."""
    results = []
    for watched in (False, True):
        model, data, generator = seeded(TinyModel), batch(), torch.Generator().manual_seed(0)
        if watched:
            watch(model)

        def closure(model: nn.Module = model, data: Any = data, generator: Any = generator) -> Tensor:
            ids = data["input_ids"]
            dropped = torch.rand(ids.shape, generator=generator) < 0.2
            ids = ids.masked_fill_(dropped, 1) if in_place else ids.masked_fill(dropped, 1)
            return model(ids, data["attention_mask"], data["labels"]).loss

        method, common = METHODS[name]
        method(model, embedding=model.word_embeddings, scope=scope, **common).backward(closure)
        results.append(gradients(model))
    assert_gradients(*results, 1e-12)


class SparseToo(nn.Module):
    """Two modules share a table, and one of them has sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.again = nn.Embedding(11, 4), nn.Embedding(11, 4, sparse=True)
        self.again.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return (self.words(ids) * self.again(ids.flip(1)).tanh()).logsumexp(-1).mean()


def test_a_sparse_gradient_of_the_same_table_is_added_to() -> None:
    results = []
    for watched in (False, True):
        model = seeded(SparseToo)
        if watched:
            model.words.weight.register_hook(lambda grad: None)
        adv = fastadv.PGD(model, embedding="words", steps=2)
        for _ in range(2):
            adv.backward(lambda model=model: model(torch.tensor([[1, 2, 2, 9], [10, 1, 0, 0]])))
        model.words.weight.grad = model.words.weight.grad.to_dense()
        results.append(gradients(model))
    assert_gradients(*results, 1e-12)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_transposed_table(scope: str) -> None:
    """Its rows are not in one piece: it is looked up as any other module is called."""
    odd, plain = seeded(TinyModel), seeded(TinyModel)
    odd.word_embeddings.weight = nn.Parameter(odd.word_embeddings.weight.detach().t().contiguous().t())
    assert_gradients(step(odd, scope=scope), step(plain, scope=scope), 1e-12)


class Twice(nn.Module):
    """Two tables, the first of them looked up twice, and a head that shares the second's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(11, 4), nn.Embedding(5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.words(ids) + self.words(ids.flip(1)) * self.kinds(ids % 5)
        return (hidden.tanh() @ self.kinds.weight.T).logsumexp(-1).mean()


@pytest.mark.parametrize("scope", SCOPES)
def test_several_tables_and_calls_and_a_shared_head(scope: str) -> None:
    ids, results = torch.tensor([[1, 2, 2, 9], [10, 1, 0, 0]]), []
    for watched in (False, True):
        model = seeded(Twice)
        if watched:
            for parameter in model.parameters():
                parameter.register_hook(lambda grad: None)
        adv = fastadv.PGD(model, embedding=["words", "kinds"], scope=scope, steps=2)
        adv.backward(lambda model=model: model(ids), mask=[ids > 0] * 3)
        results.append(gradients(model))
    assert_gradients(*results, 1e-12)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("present", [False, True])
def test_a_fault_in_any_pass_leaves_no_trace(at: int, present: bool) -> None:
    model, data, passes = seeded(TinyModel), batch(), []
    if present:
        model(*data.values()).loss.backward()
    adv = fastadv.PGD(model, embedding=model.word_embeddings, steps=2)

    def closure() -> Tensor:
        passes.append(1)
        if len(passes) == at:
            raise KeyboardInterrupt
        return model(*data.values()).loss

    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        adv.backward(closure)
    assert_unchanged(model, before)
    passes.append(9)
    twin = seeded(TinyModel)
    if present:
        twin(*data.values()).loss.backward()
    adv.backward(closure)
    fastadv.PGD(twin, embedding=twin.word_embeddings, steps=2).backward(lambda: twin(*data.values()).loss)
    assert_gradients(gradients(model), gradients(twin), 1e-14)
