"""Gradients that are zero, huge, tiny or not finite; low precision; the statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastadv
from tests.models import D, TinyModel
from tests.oracles import oracles
from tests.support import assert_close, batch, clear, gradients, record, relative, seeded

BAD = 2  # the sample whose gradient is not what it should be


def ready(dtype: torch.dtype = torch.float64) -> tuple[TinyModel, dict[str, Tensor], Callable[[list[float]], Tensor]]:
    """A model whose samples do not mix, and its loss with a weight per sample."""
    model, data = seeded(TinyModel, dtype=dtype), batch()

    def loss(weights: list[float]) -> Tensor:
        logits = model(data["input_ids"], data["attention_mask"]).logits
        losses = F.cross_entropy(logits, data["labels"], reduction="none")
        return (losses * torch.tensor(weights).to(losses)).sum()

    return model, data, loss


def perturbation(model: TinyModel, adv: fastadv.Method, closure: Callable[[], Tensor], mask: Tensor) -> Tensor:
    with record(model) as seen:
        adv.backward(closure, mask=mask)
    return seen[-1] - seen[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("norm", oracles.NORMS)
@pytest.mark.parametrize(("scope", "groups"), [("sample", 1), ("token", 5)])
def test_a_sample_that_is_not_finite_takes_no_step_and_others_do(
    scope: str, groups: int, norm: str, bad: float
) -> None:
    """Counted once per ascent and group: the sample, or each of its five tokens (linf has no group: the sample)."""
    model, data, loss = ready()
    mask, healthy = data["attention_mask"], [i for i in range(4) if i != BAD]
    data["input_ids"][BAD] = torch.tensor([40, 41, 42, 43, 44, 0, 0])  # words of its own
    adv = fastadv.PGD(model, embedding=model.word_embeddings, scope=scope, norm=norm)
    want = perturbation(model, adv, lambda: loss([1, 1, 0, 1]), mask)
    assert int(adv.skipped) == 0
    got = perturbation(model, adv, lambda: loss([1, 1, bad, 1]), mask)
    assert_close(got[healthy], want[healthy], 1e-12, "perturbation of the others")
    assert not got[BAD].any()
    assert int(adv.skipped) == 3 * (groups if norm == "l2" else 1)
    assert float(adv.perturbation_norm) > 0


@pytest.mark.parametrize("scope", ["table", "batch"])
def test_where_all_share_one_norm_nobody_steps(scope: str) -> None:
    model, data, loss = ready()
    adv = fastadv.FGM(model, embedding=model.word_embeddings, scope=scope)
    for count in (1, 2):
        moved = perturbation(model, adv, lambda: loss([1, 1, math.nan, 1]), data["attention_mask"])
        assert not moved.any()
        assert int(adv.skipped) == count


def test_in_row_scope_only_the_words_of_the_bad_sample_stay() -> None:
    model, data, loss = ready()
    ids, mask = data["input_ids"], data["attention_mask"].bool()
    adv = fastadv.FGM(model, embedding=model.word_embeddings, scope="row")
    moved = perturbation(model, adv, lambda: loss([1, 1, math.nan, 1]), mask)
    bad = torch.isin(ids, ids[BAD][mask[BAD]]) & mask
    assert not moved[bad].any()
    assert bool(moved[mask & ~bad].norm(dim=-1).gt(0.99).all())
    assert int(adv.skipped) == len(ids[BAD][mask[BAD]].unique())


@pytest.mark.parametrize("start", [False, True], ids=["zero", "start"])
@pytest.mark.parametrize("norm", oracles.NORMS)
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_a_sample_without_a_gradient_gives_no_nan(scope: str, norm: str, start: bool) -> None:
    model, data, loss = ready()
    data["input_ids"][BAD] = torch.tensor([40, 41, 42, 43, 44, 0, 0])
    adv = fastadv.PGD(
        model,
        embedding=model.word_embeddings,
        scope=scope,
        norm=norm,
        random_start=start,
        clean_weight=float(not start),
    )
    moved = perturbation(model, adv, lambda: loss([1, 1, 0, 1]), data["attention_mask"])
    assert moved.isfinite().all()
    if not start:
        assert not moved[BAD].any()
        assert moved[0].any()
    assert int(adv.skipped) == 0
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_no_gradient_anywhere(scope: str) -> None:
    """Nobody moves: clean and adversarial pass are the same."""
    model, data, loss = ready()
    adv = fastadv.PGD(model, embedding=model.word_embeddings, scope=scope)
    result = adv.backward(lambda: loss([0, 0, 0, 0]), mask=data["attention_mask"])
    assert float(result.loss) == float(result.adv_loss) == 0
    assert float(adv.perturbation_norm) == 0
    assert int(adv.skipped) == 0


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_directions_do_not_depend_on_the_size_of_the_gradient(scope: str, scale: float) -> None:
    """In float32 the squares of these would overflow or vanish."""
    model, data, loss = ready(torch.float32)
    adv = fastadv.PGD(model, embedding=model.word_embeddings, scope=scope)
    want = perturbation(model, adv, lambda: loss([1, 1, 1, 1]), data["attention_mask"])
    clear(model)
    got = perturbation(model, adv, lambda: loss([scale] * 4), data["attention_mask"])
    assert_close(got, want, 1e-5, "perturbation")
    assert int(adv.skipped) == 0


def test_autocast_bfloat16() -> None:
    """Parameters and perturbation stay float32; the direction is the one of float32 up to bfloat16's noise."""
    model, data = seeded(lambda: TinyModel("tfm"), dtype=torch.float32), batch()
    adv = fastadv.PGD(model, embedding=model.word_embeddings, scope="sample")
    want = perturbation(model, adv, lambda: model(**data).loss, data["attention_mask"])
    clear(model)

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**data).loss

    got = perturbation(model, adv, closure, data["attention_mask"])
    assert got.dtype == torch.float32
    lengths = torch.linalg.vector_norm(got, dim=(1, 2))
    assert bool(lengths.le(1 + 1e-6).all())
    cosine = F.cosine_similarity(got.flatten(1), want.flatten(1))
    assert bool(cosine.gt(0.98).all()), cosine
    assert 0 < relative(got, want) < 0.2
    assert all(grad.dtype == torch.float32 for grad in gradients(model).values())


@pytest.mark.parametrize("norm", oracles.NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype, norm: str) -> None:
    """FGM per sample in a half-precision model: round(W + delta), with delta in float32 from the half gradient."""
    model, data = seeded(TinyModel, dtype=dtype), batch()
    ids, mask = data["input_ids"], data["attention_mask"]
    adv = fastadv.FGM(model, embedding=model.word_embeddings, scope="sample", norm=norm, epsilon=0.5)
    with record(model) as seen:
        adv.backward(lambda: model(**data).loss, mask=mask)
    embeds = model.word_embeddings.weight.detach()[ids].requires_grad_()
    (g,) = torch.autograd.grad(model(None, mask, data["labels"], embeds).loss, embeds)
    g = g.double() * mask.unsqueeze(-1)
    r = oracles.ascend(torch.zeros_like(g), g, scope="sample", norm=norm, step_size=0.5, epsilon=0.5)
    want = (embeds.detach().double() + r).to(dtype)
    assert seen[-1].dtype == dtype
    assert torch.equal(seen[0], embeds)
    different = seen[-1] != want
    assert float(different.double().mean()) < 0.01  # only where float32 and float64 straddle a rounding boundary
    assert_close(seen[-1].double(), want.double(), 1e-4, "embedding")


@pytest.mark.parametrize("norm", oracles.NORMS)
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_statistics(scope: str, norm: str) -> None:
    """`perturbation_norm` is the mean over the groups that there are; tensors are 0-d and on the model's device."""
    model, data = seeded(lambda: TinyModel("tfm")), batch()
    ids, mask, weight = data["input_ids"], data["attention_mask"], model.word_embeddings.weight
    adv = fastadv.PGD(model, embedding=model.word_embeddings, scope=scope, norm=norm, epsilon=0.4)
    assert adv.attacked == 0
    adv.backward(lambda: model(**data).loss, mask=mask)
    want = oracles.attack(
        model,
        lambda e: model(None, mask, data["labels"], e).loss,
        weight,
        ids,
        scope=scope,
        norm=norm,
        epsilon=0.4,
        step_size=0.3,
        steps=3,
        mask=mask,
    ).r
    axes = oracles.AXES[scope]
    norms = oracles.norm2(want, scope) if norm == "l2" else want.abs().amax(axes, keepdim=True)
    assert_close(adv.perturbation_norm, norms[norms > 0].mean(), 1e-9, "perturbation_norm")
    assert adv.skipped.dtype == torch.int64
    assert adv.skipped.shape == adv.perturbation_norm.shape == ()
    assert adv.attacked == 1
    assert want.shape[-1] == D


@pytest.mark.parametrize("norm", oracles.NORMS)
@pytest.mark.parametrize("name", ["FreeLB", "YOPO", "FreeAT"])
def test_a_sample_without_a_gradient_stays_and_is_not_counted(name: str, norm: str) -> None:
    """With a zero start the public code of FreeLB divides zero by zero here."""
    model, data = seeded(lambda: TinyModel("tfm")), batch()
    ids, labels = data["input_ids"], data["labels"]
    options: dict[str, Any] = {"norm": norm, "epsilon": 0.3}
    options |= {"YOPO": {"split": "bert.embeddings"}, "FreeAT": {"step_size": 0.1, "replays": 3}}.get(name, {})
    if name != "FreeAT":
        options |= {"random_start": False, "step_size": 0.1}
    adv = getattr(fastadv, name)(model, embedding=model.word_embeddings, **options)

    def closure() -> Tensor:
        logits = model(ids, data["attention_mask"]).logits
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return losses[[0, 1, 3]].mean()  # nothing is asked of sample 2

    with record(model) as seen:
        for _ in range(3 if name == "FreeAT" else 1):
            adv.backward(closure, mask=data["attention_mask"], step=0 if name != "FreeAT" else None)
            with torch.no_grad():
                model.classifier.bias += 0.0  # an optimizer's step, as far as FreeAT can see
    moved = (seen[-1] - model.word_embeddings.weight[ids]).detach().flatten(1).norm(dim=1)
    assert moved[2] == 0
    assert (moved[[0, 1, 3]] > 0.01).all()
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    assert int(adv.skipped) == 0


@pytest.mark.parametrize("name", ["FreeLB", "YOPO"])
def test_a_sample_whose_gradient_is_not_finite_is_skipped(name: str) -> None:
    """Of the others nothing is lost; each ascent counts it."""
    model, data = seeded(lambda: TinyModel("tfm")), batch()
    more = {"split": "bert.embeddings", "inner_steps": 1} if name == "YOPO" else {}
    adv = getattr(fastadv, name)(model, embedding=model.word_embeddings, random_start=False, **more)
    poisoned = model.tap.register_forward_hook(_poisons)
    with record(model) as seen:
        adv.backward(lambda: model(**data).loss)
    poisoned.remove()
    moved = (seen[-1] - model.word_embeddings.weight[data["input_ids"]]).detach().flatten(1).norm(dim=1)
    assert moved[1] == 0
    assert (moved[[0, 2, 3]] > 0.1).all()
    assert int(adv.skipped) == 2


def _poisons(*call: Any) -> None:
    call[-1].register_hook(_poison)


def _poison(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[1, 0, 0] = math.nan
    return gradient
