"""`divergence`: values and gradients against float64, at the edges, and differentiated twice."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.arguments.kinds import KINDS
from fastadv.ops import divergence
from fastadv.ops.divergence import OP

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Of the gradients; a value is computed in float32, whatever the logits are.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
FUSED = [pytest.param(None, id="fused"), pytest.param(False, id="eager")]


def oracle(logits: Tensor, target: Tensor, kind: str) -> Tensor:
    """Each row's divergence as the textbook has it, in float64."""
    a, b = logits.double(), target.double()
    if kind == "mse":
        return (a - b).square().mean(-1)
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)

    def kl(log_from: Tensor, log_to: Tensor) -> Tensor:
        return (log_from.exp() * (log_from - log_to)).sum(-1)

    if kind == "kl":
        return kl(log_q, log_p)
    if kind == "symmetric_kl":
        return kl(log_p, log_q) + kl(log_q, log_p)
    log_m = torch.log((log_p.exp() + log_q.exp()) / 2)
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits and a target not far from them; in low precision many of them are equal."""
    logits = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    target = (logits.double() + 0.7 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    return logits.requires_grad_(), target.requires_grad_()


def gradients(value: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, of)


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = float((got.detach().double() - want.detach().double()).norm())
    assert error <= tolerance * float(want.detach().double().norm()), error


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 3, 17, 300, 1500])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients(kind: str, classes: int, dtype: torch.dtype, fused: bool | None) -> None:
    """On rows with weights of their own; one that does not count holds NaN."""
    logits, target = pair(5, classes, dtype=dtype)
    weights = torch.tensor([0.5, 1.0, 0.0, 2.0, 0.25])
    rows = oracle(logits, target, kind)
    want = (rows * weights).sum()
    want_gradients = gradients(want, logits, target)
    with torch.no_grad():
        logits[2], target[2, 0] = math.nan, math.nan
    got = divergence(logits, target, kind, weights=weights, fused=fused)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(got, want, 1e-12 if dtype == torch.float64 else 1e-4 if classes == 2 else 2e-5)
    for one, other in zip(gradients(got, logits, target), want_gradients, strict=True):
        assert one.dtype == dtype
        assert_near(one, other, TOLERANCE[dtype])


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_gradients_that_are_wanted(kind: str, fused: bool | None) -> None:
    logits, target = pair(3, 7)
    want = gradients(divergence(logits, target, kind, fused=fused), logits, target)
    [left] = gradients(divergence(logits, target.detach(), kind, fused=fused), logits)
    [right] = gradients(divergence(logits.detach(), target, kind, fused=fused), target)
    assert torch.equal(left, want[0])
    assert torch.equal(right, want[1])
    with torch.no_grad():
        assert not divergence(logits, target, kind, fused=fused).requires_grad


@pytest.mark.parametrize("fused", FUSED)
def test_the_mean_over_tokens_and_a_factor_behind_it(fused: bool | None) -> None:
    """[B, T, C] in bfloat16, rows that lie apart, and a loss scaled as a GradScaler does."""
    logits, target = pair(2, 9, 40, dtype=torch.bfloat16)
    got = 1024 * divergence(logits[:, :-1], target[:, 1:], "kl", fused=fused)
    want = 1024 * oracle(logits[:, :-1], target[:, 1:], "kl").mean()
    assert_near(got, want, 1e-5)
    for one, other in zip(gradients(got, logits, target), gradients(want, logits, target), strict=True):
        assert_near(one, other, 4e-3)


@pytest.mark.parametrize("fused", FUSED)
def test_a_second_backward_finds_the_same(fused: bool | None) -> None:
    logits, target = pair(3, 7)
    value = divergence(logits, target, fused=fused) * 3
    first = torch.autograd.grad(value, (logits, target), retain_graph=True)
    assert all(map(torch.equal, first, gradients(value, logits, target)))


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_no_difference_is_exactly_zero(kind: str, fused: bool | None) -> None:
    logits = (10 * torch.randn(4, 33)).requires_grad_()
    target = logits.detach().clone().requires_grad_()
    value = divergence(logits, target, kind, fused=fused)
    assert value.item() == 0
    assert all(float(g.abs().max()) < 1e-6 for g in gradients(value, logits, target))


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("symmetric_kl", torch.bfloat16), ("kl", torch.bfloat16), ("kl", torch.float32), ("js", torch.bfloat16)],
    ids=str,
)
def test_finite_for_logits_of_ten_thousand_and_a_quarter_of_a_million_classes(
    kind: str, dtype: torch.dtype, fused: bool | None
) -> None:
    logits = torch.randn(1, 250_000)
    logits = (logits * 1e4 / logits.abs().max()).to(dtype).requires_grad_()
    target = (2000 * torch.randn(1, 250_000)).to(dtype).requires_grad_()
    value = divergence(logits, target, kind, fused=fused)
    want = oracle(logits.detach(), target.detach(), kind).mean()
    assert_near(value, torch.tensor(math.log(2)) if kind == "js" else want, 1e-5)
    for gradient in gradients(value, logits, target):
        assert gradient.isfinite().all()
        assert kind == "js" or gradient.any()  # of js there is none where nothing overlaps


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("kind", ["symmetric_kl", "kl", "js"])
def test_classes_that_cannot_be(kind: str, fused: bool | None) -> None:
    """-inf in both: as if the class were not there. In one: infinite, where its logarithm counts."""
    logits, target = pair(2, 8)
    want = gradients(divergence(logits, target, kind, fused=fused), logits, target)
    wider = [F.pad(x.detach(), (0, 1), value=-math.inf).requires_grad_() for x in (logits, target)]
    value = divergence(*wider, kind, fused=fused)
    for one, other in zip(gradients(value, *wider), want, strict=True):
        assert torch.allclose(one[:, :8], other, atol=1e-7)
        assert not one[:, 8].any()
    with torch.no_grad():
        target[0, 0] = -math.inf
    only_in_logits = divergence(logits.detach(), target.detach(), kind, fused=fused)
    assert bool(only_in_logits.isinf()) == (kind == "symmetric_kl")


@pytest.mark.parametrize("kind", ["symmetric_kl", "kl"])
def test_small_divergences_in_float32(kind: str) -> None:
    """Logits that differ by 1e-4: KL is 5e-9. Sums of float32 that cancel say 1e-7, or less than nothing."""
    if OP.choose("cpu", None) is OP.eager:
        pytest.skip("the eager formula's terms cancel")
    logits = 5 * torch.randn(64, 1000)
    target = logits + 1e-4 * torch.randn(64, 1000)
    want = float(oracle(logits, target, kind).mean())
    assert abs(divergence(logits, target, kind).item() / want - 1) < 2e-3
    plain = float(F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean"))
    if kind == "kl":
        assert abs(plain / want - 1) > 0.1  # what F.kl_div makes of it: half, or the double, as the machine rounds


def test_gradcheck_and_gradgradcheck() -> None:
    logits, target = pair(2, 3, dtype=torch.float64)
    weights = torch.tensor([0.3, 1.2], dtype=torch.float64)
    for kind, fused in itertools.product(KINDS, (None, False)):

        def value(a: Tensor, b: Tensor, kind: str = kind, fused: bool | None = fused) -> Tensor:
            return divergence(a, b, kind, weights=weights, fused=fused)

        assert torch.autograd.gradcheck(value, (logits, target))
        assert torch.autograd.gradgradcheck(value, (logits, target))


@pytest.mark.parametrize("fused", FUSED)
def test_nothing_to_compare(fused: bool | None) -> None:
    logits, target = pair(0, 5)
    value = divergence(logits, target, fused=fused)
    assert value.item() == 0
    assert gradients(value, logits)[0].shape == (0, 5)


def test_opcheck() -> None:
    logits, target = (x.detach() for x in pair(3, 5))
    for kind, left, right in itertools.product(KINDS, (True, False), (True, False)):
        arguments = (logits, target, torch.ones(3), kind, left, right)
        torch.library.opcheck(torch.ops.fastadv.divergence.default, arguments)


@pytest.mark.parametrize("fused", FUSED)
def test_bad_arguments(fused: bool | None) -> None:
    logits, target = pair(3, 5)
    with pytest.raises(ValueError, match="kind must be one of 'symmetric_kl', 'kl', 'js', 'mse', not 'KL'"):
        divergence(logits, target, "KL", fused=fused)
    with pytest.raises(ValueError, match=r"one shape \[..., C\], not \(3, 5\) and \(3, 4\)"):
        divergence(logits, target[:, :4], fused=fused)
    with pytest.raises(ValueError, match=r"weights must have shape \(3,\), one per row, not \(5,\)"):
        divergence(logits, target, weights=torch.ones(5), fused=fused)


UNDEFINED = {
    "+inf in both": ([math.inf, 1.0, 2.0], [math.inf, 1.5, 0.0]),
    "+inf in the first": ([math.inf, 1.0, 2.0], [0.0, 1.5, 0.0]),
    "+inf in the second": ([0.0, 1.0, 2.0], [0.0, math.inf, 0.0]),
    "nothing but -inf in both": ([-math.inf] * 3, [-math.inf] * 3),
    "nothing but -inf in one": ([-math.inf] * 3, [-math.inf, 0.0, 1.0]),
    "NaN": ([0.0, math.nan, 1.0], [0.0, 1.0, 1.0]),
}


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("kind", ["symmetric_kl", "kl", "js"])
@pytest.mark.parametrize("name", UNDEFINED)
def test_a_row_without_a_softmax_is_nan(name: str, kind: str, fused: bool | None) -> None:
    """As torch.softmax has it; the rows beside it are what they are."""
    first, second = UNDEFINED[name]
    a, b = torch.tensor([first, [1.0, 2.0, 3.0]]), torch.tensor([second, [0.0, 2.0, 1.0]])
    assert a.softmax(-1)[0].isnan().all() or b.softmax(-1)[0].isnan().all()
    a.requires_grad_(), b.requires_grad_()
    assert divergence(a, b, kind, weights=torch.tensor([1.0, 0.0]), fused=fused).isnan()
    value = divergence(a, b, kind, fused=fused)
    assert value.isnan()
    for grad in torch.autograd.grad(value, (a, b)):
        assert grad[0].isnan().all()
        assert grad[1].isfinite().all()
    assert divergence(a, b, kind, weights=torch.tensor([0.0, 1.0]), fused=fused).isfinite()


@pytest.mark.parametrize("fused", [None, False])
def test_mse_takes_equal_infinities_for_equal(fused: bool | None) -> None:
    a = torch.tensor([[math.inf, -math.inf, 1.0]])
    assert divergence(a, torch.tensor([[math.inf, -math.inf, 4.0]]), "mse", fused=fused) == 3


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_lowest_number_is_a_logit(dtype: torch.dtype, fused: bool | None) -> None:
    """Which masks are made of: a row of nothing else is even."""
    lowest = torch.full((1, 4), torch.finfo(dtype).min, dtype=dtype)
    assert divergence(lowest, torch.zeros_like(lowest), "symmetric_kl", fused=fused) == 0
