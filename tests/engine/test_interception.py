"""The perturbation enters at a module's output, and nothing else about the module changes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastadv
from fastadv.engine.model.hook import LookupHook, OutputHook


class Scaled(nn.Embedding):
    """As Gemma has it: the lookup, scaled."""

    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


class Model(nn.Module):
    def __init__(self, embedding: nn.Module, calls: int = 1, checkpointing: Any = None) -> None:
        super().__init__()
        self.embedding, self.calls, self.checkpointing = embedding, calls, checkpointing
        self.head = nn.Linear(4, 1)

    def forward(self, *ids: Tensor) -> Tensor:
        return sum(self.part(i).square().mean() for i in ids)  # type: ignore[return-value]

    def part(self, ids: Tensor) -> Tensor:
        if self.checkpointing is None:
            return self.embed(ids)
        return checkpoint(self.embed, ids, use_reentrant=False)

    def embed(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).tanh())


IDS = torch.tensor([[1, 2, 2], [3, 0, 1]])
OTHER = torch.tensor([[5, 5, 4], [1, 1, 1]])


def trained(model: nn.Module, *ids: Tensor, **arguments: Any) -> list[Tensor]:
    adv = fastadv.PGD(model, scope="sample", **arguments)
    model.zero_grad()
    adv.backward(lambda: model(*ids))
    adv.close()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    ("embedding", "kind"),
    [
        (nn.Embedding(7, 4), LookupHook),
        (nn.Embedding(7, 4, max_norm=1.0), OutputHook),
        (nn.Embedding(7, 4, scale_grad_by_freq=True), OutputHook),
        (Scaled(7, 4), OutputHook),
        (nn.Sequential(nn.Embedding(7, 4)), OutputHook),
    ],
)
def test_which_way_in(embedding: nn.Module, kind: type) -> None:
    adv = fastadv.FGM(Model(embedding), embedding=embedding, scope="sample")
    assert [type(one) for one in adv._engine._hooks] == [kind]


def test_both_ways_agree() -> None:
    lookup = Model(nn.Embedding(7, 4)).double()
    hooked = copy.deepcopy(lookup)
    hooked.embedding = nn.Sequential(hooked.embedding)
    got = trained(lookup, IDS)
    want = trained(hooked, IDS, embedding=hooked.embedding)
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(got, want, strict=True))


def test_scaled_embedding_is_perturbed_after_the_scale() -> None:
    model = Model(Scaled(7, 4)).double()
    adv = fastadv.FGM(model, epsilon=0.5, scope="batch")
    with adv.perturbed(lambda: model(IDS)):
        shift = model.embedding(IDS) - 3 * model.embedding.weight[IDS]
    assert torch.allclose(shift.norm(), torch.tensor(0.5).double())


def test_tuple_outputs() -> None:
    class Layer(nn.Module):
        def forward(self, hidden: Tensor) -> tuple[Tensor, str]:
            return hidden * 2, "kept"

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.layer, self.head = nn.Embedding(7, 4), Layer(), nn.Linear(4, 1)

        def forward(self, ids: Tensor) -> Tensor:
            hidden, kept = self.layer(self.embedding(ids))
            assert kept == "kept"
            return self.head(hidden).square().mean()

    model = Residual()
    adv = fastadv.FGM(model, embedding="layer", scope="token", epsilon=0.1)
    result = adv.backward(lambda: model(IDS))
    assert result.adv_loss > result.loss


def test_table_scope_needs_a_table() -> None:
    model = Model(nn.Sequential(nn.Embedding(7, 4)))
    with pytest.raises(ValueError, match=r"needs an nn\.Embedding"):
        fastadv.FGM(model, embedding=model.embedding)


def test_two_methods_on_one_model_and_close_in_any_order() -> None:
    model = Model(nn.Embedding(7, 4))
    clean = dict(vars(model.embedding))
    first, second = fastadv.FGM(model, scope="sample"), fastadv.PGD(model, scope="sample")
    second.backward(lambda: model(IDS))
    first.backward(lambda: model(IDS))
    first.close()
    second.backward(lambda: model(IDS))
    second.close()
    second.close()
    assert dict(vars(model.embedding)) == clean
    assert not model.embedding._forward_hooks


@pytest.mark.parametrize("embedding", [nn.Embedding(7, 4), Scaled(7, 4)], ids=["lookup", "hook"])
def test_copies_do_not_carry_it(embedding: nn.Module) -> None:
    model = Model(embedding)
    names = list(model.state_dict())
    adv = fastadv.FGM(model, scope="sample", epsilon=5.0)
    assert list(model.state_dict()) == names
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)]
    clean = model(IDS)
    with adv.perturbed(lambda: model(IDS)):
        assert model(IDS) != clean
        assert all(torch.equal(other(IDS), clean) for other in copies)
    copied = copies[0]
    copied.embedding.weight.data.zero_()
    assert not torch.equal(model(IDS), copied(IDS)), "the copy looks up its own table"
    again = fastadv.FGM(copied, scope="sample")
    assert [type(one) for one in again._engine._hooks] == [type(adv._engine._hooks[0])]


@pytest.mark.parametrize("ids", [(IDS,), (IDS, OTHER), (IDS, IDS[:, :2])], ids=["one call", "two alike", "two"])
@pytest.mark.parametrize("scope", ["table", "token"])
def test_checkpoint_recomputes_with_the_same_perturbation(ids: tuple[Tensor, ...], scope: str) -> None:
    plain = Model(nn.Embedding(7, 4)).double()
    checkpointed = copy.deepcopy(plain)
    checkpointed.checkpointing = True
    for model in (plain, checkpointed):
        adv = fastadv.PGD(model, steps=3, scope=scope)
        adv.backward(lambda: model(*ids))  # noqa: B023
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-14)


def test_shapes_that_change_from_step_to_step() -> None:
    model = Model(nn.Embedding(7, 4)).double()
    adv = fastadv.PGD(model, scope="sample")
    for ids in (IDS, IDS[:1], IDS[:, :2], IDS, torch.stack([IDS, OTHER])):
        model.zero_grad()
        adv.backward(lambda: model(ids))  # noqa: B023
        got = [p.grad for p in model.parameters()]
        want = trained(copy.deepcopy(model), ids)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_dtype_that_changes_from_step_to_step() -> None:
    model = Model(nn.Embedding(7, 4))
    adv = fastadv.PGD(model, scope="sample")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model.zero_grad()
        model.to(dtype)
        result = adv.backward(lambda: model(IDS))
        assert result.loss.dtype == dtype
        assert adv.perturbation_norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("watched", [False, True])
def test_a_probe_computes_no_gradient_of_the_table(watched: bool) -> None:
    model = Model(nn.Embedding(7, 4))
    adv = fastadv.PGD(model, steps=3)
    if watched:
        model.embedding.weight.register_hook(lambda grad: None)
    with torch.profiler.profile() as profile:
        adv.backward(lambda: model(IDS))
    dense = [event.count for event in profile.key_averages() if event.key == "aten::embedding_dense_backward"]
    assert dense == ([2] if watched else []), "one in each full pass that somebody watches, none in the two probes"


def test_a_mask_that_is_no_tensor() -> None:
    model = Model(nn.Embedding(7, 4))
    adv = fastadv.FGM(model)
    for mask in (IDS.numpy(), [IDS.tolist()], "mask"):
        with pytest.raises(TypeError, match="mask must be a tensor"):
            adv.backward(lambda: model(IDS), mask=mask)  # type: ignore[arg-type]


def test_a_backward_that_runs_none() -> None:
    model = Model(nn.Embedding(7, 4))
    adv = fastadv.FGM(model, backward=lambda loss: None)
    with pytest.raises(RuntimeError, match="backward= ran no backward"):
        adv.backward(lambda: model(IDS))
