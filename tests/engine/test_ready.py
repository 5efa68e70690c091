"""An ascent writes the next forward's embedding, used only if nothing has changed since, and never under others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastadv
from tests.support import assert_gradients, gradients, seeded

IDS = torch.tensor([[1, 2, 2, 3], [4, 5, 0, 0]])
SCOPES = ["table", "sample"]


class Model(nn.Module):
    """What `around` does to the embedding is what a test looks at."""

    def __init__(self, around: Callable[[Tensor], Tensor] = lambda hidden: hidden) -> None:
        super().__init__()
        self.embedding, self.head, self.around = nn.Embedding(9, 4), nn.Linear(4, 3), around

    def forward(self, ids: Tensor = IDS) -> Tensor:
        return self.head(self.around(self.embedding(ids)).tanh()).logsumexp(-1).mean()


def run(model: Model, scope: str, closure: Callable[[], Tensor] | None = None, steps: int = 3) -> dict[str, Tensor]:
    adv = fastadv.PGD(model, scope=scope, steps=steps)
    for _ in range(2):  # the second step finds the first one's buffers
        model.zero_grad()
        adv.backward(closure or model)
    adv.close()
    return gradients(model)


def gathers(model: Model, scope: str, closure: Callable[[], Tensor] | None = None) -> int:
    """How many forwards of two steps had to look words up."""
    from fastadv.ops.gather_perturb import OP

    counted, eager, backends = [], OP.eager, dict(OP.backends)

    def counting(*arguments: object) -> Tensor:
        counted.append(1)
        return eager(*arguments)

    OP.eager, OP.backends = counting, {}
    try:
        run(model, scope, closure)
    finally:
        OP.eager, OP.backends = eager, backends
    return len(counted)


@pytest.mark.parametrize("scope", SCOPES)
def test_only_the_clean_pass_looks_words_up(scope: str) -> None:
    assert gathers(seeded(Model), scope) == 2


@pytest.mark.parametrize("scope", SCOPES)
def test_other_memory_of_the_same_ids_is_looked_up(scope: str) -> None:
    model = seeded(Model)
    assert gathers(model, scope, lambda: model(IDS.clone())) == 8
    assert_gradients(run(model, scope, lambda: model(IDS.clone())), run(model, scope), 1e-12)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_model_that_works_in_place(scope: str) -> None:
    in_place, plain = seeded(lambda: Model(lambda h: h.mul_(2).add_(1))), seeded(lambda: Model(lambda h: h * 2 + 1))
    assert_gradients(run(in_place, scope), run(plain, scope), 1e-14)


@pytest.mark.parametrize("scope", SCOPES)
def test_what_a_closure_keeps_is_not_overwritten(scope: str) -> None:
    kept: list[Tensor] = []
    copies: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        kept.append(hidden)
        copies.append(hidden.detach().clone())
        return hidden

    run(seeded(lambda: Model(keep)), scope)
    assert len(kept) == 8
    assert all(torch.equal(one, copy) for one, copy in zip(kept, copies, strict=True))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_table_that_moves_between_passes_is_looked_up(scope: str) -> None:
    model = seeded(Model)
    start, seen, passes = model.embedding.weight.detach().clone(), [], []
    model.around = lambda hidden: seen.append(hidden.detach().clone()) or hidden

    def closure() -> Tensor:
        with torch.no_grad():
            model.embedding.weight.copy_(start + len(passes))
        passes.append(1)
        return model()

    fastadv.PGD(model, scope=scope, steps=2, epsilon=1e-3).backward(closure)
    for moved, hidden in enumerate(seen):
        assert (hidden - start[IDS] - moved).abs().max() < 2e-3


def memory(adv: fastadv.PGD) -> tuple[int, ...]:
    [lookup] = adv._engine.buffers.lookups
    assert lookup.scratch is not None
    return lookup.scratch.data_ptr(), lookup.delta.data_ptr()


@pytest.mark.parametrize("scope", SCOPES)
def test_memory_serves_again(scope: str) -> None:
    model = seeded(Model)
    adv = fastadv.PGD(model, scope=scope, steps=2)
    adv.backward(model)
    before = memory(adv)
    adv.backward(model)
    assert memory(adv) == before


@pytest.mark.parametrize("scope", SCOPES)
def test_perturbed_forwards_that_work_in_place(scope: str) -> None:
    """Nothing that a forward does to its embedding reaches the next one."""
    model = seeded(lambda: Model(lambda hidden: hidden.mul_(2)))
    adv = fastadv.PGD(model, scope=scope, steps=2)
    with adv.perturbed(model), torch.no_grad():
        first, second = model(), model()
    assert torch.equal(first, second)
