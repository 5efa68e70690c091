"""`divergence` of labels that do not exclude each other, against the textbook's Bernoulli KL in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.ops import divergence
from fastadv.ops.divergence import BERNOULLI
from tests.ops.test_divergence import DTYPES, FUSED, TOLERANCE, assert_near, gradients, pair


def oracle(logits: Tensor, target: Tensor, kind: str) -> Tensor:
    """Each row's: the labels' KL divergences, added up, by log-sigmoids in float64."""
    a, b = logits.double(), target.double()

    def kl(x: Tensor, y: Tensor) -> Tensor:
        yes = x.sigmoid() * (F.logsigmoid(x) - F.logsigmoid(y))
        return (yes + (-x).sigmoid() * (F.logsigmoid(-x) - F.logsigmoid(-y))).sum(-1)

    return kl(b, a) if kind == "bernoulli" else kl(a, b) + kl(b, a)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("labels", [1, 2, 17])
@pytest.mark.parametrize("kind", BERNOULLI)
def test_value_and_gradients(kind: str, labels: int, dtype: torch.dtype, fused: bool | None) -> None:
    logits, target = pair(5, labels, dtype=dtype)
    weights = torch.tensor([0.5, 1.0, 0.0, 2.0, 0.25])
    want = (oracle(logits, target, kind) * weights).sum()
    got = divergence(logits, target, kind, weights=weights, fused=fused)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(got, want, 1e-12 if dtype == torch.float64 else 1e-4)
    for one, other in zip(gradients(got, logits, target), gradients(want, logits, target), strict=True):
        assert one.dtype == dtype
        assert_near(one, other, TOLERANCE[dtype])


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("kind", BERNOULLI)
def test_the_mean_over_tokens(kind: str, fused: bool | None) -> None:
    """[B, T, C] without weights: the mean over rows, not over labels."""
    logits, target = pair(2, 9, 4, dtype=torch.float64)
    assert_near(divergence(logits, target, kind, fused=fused), oracle(logits, target, kind).mean(), 1e-12)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", BERNOULLI)
def test_large_logits_in_low_precision(kind: str, dtype: torch.dtype, fused: bool | None) -> None:
    """Where a sigmoid of these dtypes is 0 or 1, its logarithm is not lost."""
    large = torch.tensor([[6e4, -6e4, 80.0, -80.0, 3e4, 0.0]]).to(dtype)
    other = torch.tensor([[5e4, 6e4, 70.0, 80.0, -20.0, -6e4]]).to(dtype)
    logits, target = large.requires_grad_(), other.requires_grad_()
    value = divergence(logits, target, kind, fused=fused)
    assert_near(value, oracle(logits, target, kind).sum(), 1e-5)
    want = gradients(oracle(logits.double(), target.double(), kind).sum(), logits, target)
    for one, expected in zip(gradients(value, logits, target), want, strict=True):
        assert one.isfinite().all()
        assert_near(one, expected, 4e-3)
    assert divergence(logits, logits.detach().clone(), kind, fused=fused).item() == 0


def test_it_is_not_the_divergence_of_classes() -> None:
    """A shift of all logits is no change to a softmax, and is one to every label."""
    logits = torch.zeros(1, 3)
    assert divergence(logits, logits + 1, "kl").item() == pytest.approx(0, abs=1e-7)
    assert divergence(logits, logits + 1, "bernoulli").item() == pytest.approx(3 * 0.11094407, rel=1e-4)


def test_gradcheck_and_gradgradcheck() -> None:
    logits, target = pair(2, 3, dtype=torch.float64)
    for kind, fused in itertools.product(BERNOULLI, (None, False)):

        def value(a: Tensor, b: Tensor, kind: str = kind, fused: bool | None = fused) -> Tensor:
            return divergence(a, b, kind, fused=fused)

        assert torch.autograd.gradcheck(value, (logits, target))
        assert torch.autograd.gradgradcheck(value, (logits, target))
