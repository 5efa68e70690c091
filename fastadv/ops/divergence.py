r"""Divergence of two tensors of logits: forward and backward in one pass.

With p = softmax(logits), q = softmax(target), m = (p + q) / 2, row by row over C classes:

==================  =====================================================================
kind                D
==================  =====================================================================
``symmetric_kl``    KL(p || q) + KL(q || p) = sum (p - q) (log p - log q)
``kl``              KL(q || p) = sum q (log q - log p): from the target, as F.kl_div has it
``js``              (KL(p || m) + KL(q || m)) / 2
``mse``             sum (logits - target)^2 / C, of the logits as they are
==================  =====================================================================

Where each label is a question of its own (multi-label), ``bernoulli`` and ``symmetric_bernoulli`` are the sum over C of
``kl`` and ``symmetric_kl`` between two Bernoulli distributions, with p = sigmoid(logits) and q = sigmoid(target). A
sigmoid is the softmax of two logits, x and 0, so that they are the op's rows of two classes.

Softmax and sums are in float32 (float64 for float64), whatever the logits' dtype; no probabilities are kept. A sum such
as that of `kl` cancels where p is close to q; written as sum q (e^r - 1 - r), r = log p - log q, no term is negative,
and a rounding error of the log-sum-exp counts by its square. A class that has no probability in either (-inf in both)
adds nothing; one that only the second of a KL lacks is at infinity. A row that has no softmax (NaN or +inf in it, or
nothing but -inf) is NaN, with NaN gradients, as `torch.softmax` has it. ``mse`` takes equal infinities for equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastadv import native
from fastadv.arguments.kinds import kind_code
from fastadv.native.divergence import Result
from fastadv.native.divergence import divergence as native_divergence
from fastadv.ops.dispatch import Backend, Op, triton

BERNOULLI = {"bernoulli": "kl", "symmetric_bernoulli": "symmetric_kl"}
"""What the kinds of independent labels are of each label's two classes."""

IMPOSSIBLE = -1e30  # a logit whose class has no probability, and whose difference to itself is zero


def rows(logits: Tensor, target: Tensor, kind: str) -> Tensor:
    """The divergence of each row [N], in plain PyTorch; differentiable any number of times."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    a, b = logits.to(wide), target.to(wide)
    alike = (a == b) & a.isinf()
    if kind == "mse":
        return (a.masked_fill(alike, 0) - b.masked_fill(alike, 0)).square().mean(dim=-1)
    undefined = ~(_largest(a).isfinite() & _largest(b).isfinite())
    neither = alike & ~undefined
    a, b = a.masked_fill(neither, IMPOSSIBLE), b.masked_fill(neither, IMPOSSIBLE)
    a, b = (x + torch.where(undefined, torch.nan, 0) for x in (a, b))  # added, so that the gradient is NaN as well
    log_p, log_q = a.log_softmax(dim=-1), b.log_softmax(dim=-1)
    p, q = log_p.exp(), log_q.exp()
    r = a - b + (b.logsumexp(dim=-1) - a.logsumexp(dim=-1)).unsqueeze(-1)
    if kind == "js":
        return (_product(p, _over_mean(r)) + _product(q, _over_mean(-r))).sum(dim=-1) / 2
    if kind == "symmetric_kl":
        return _product(p - q, r).sum(dim=-1)
    return (p - q - _product(q, r)).sum(dim=-1)


def _largest(x: Tensor) -> Tensor:
    """The largest logit of each row; NaN where there is one."""
    return x.detach().amax(dim=-1, keepdim=True)


def _product(weight: Tensor, log: Tensor) -> Tensor:
    """Weight * log, and zero where the weight is zero and the logarithm infinite."""
    return weight * torch.where(weight == 0, 0, log)


def _over_mean(r: Tensor) -> Tensor:
    """Log p - log m by r = log p - log q: ln 2 - log(1 + e^-r)."""
    zero = torch.zeros_like(r)
    return torch.logaddexp(zero, zero) - torch.logaddexp(zero, -r)


def eager(logits: Tensor, target: Tensor, weights: Tensor, kind: str, for_logits: bool, for_target: bool) -> Result:
    """The op in plain PyTorch."""
    counted = (weights != 0).unsqueeze(1)
    with torch.enable_grad():
        a, b = (torch.where(counted, x.detach(), 0).requires_grad_() for x in (logits, target))
        values = rows(a, b, kind) * weights
        wanted = [x for x, wants in ((a, for_logits), (b, for_target)) if wants]
        found = list(torch.autograd.grad(values.sum(), wanted)) if wanted else []
    empty = logits.new_empty(0)
    grad_logits = found.pop(0) if for_logits else empty
    grad_target = found.pop(0) if for_target else logits.new_empty(0)
    return values.detach(), grad_logits, grad_target


def fake(logits: Tensor, target: Tensor, weights: Tensor, kind: str, for_logits: bool, for_target: bool) -> Result:
    """The op's shapes and dtypes."""
    del kind
    room = [x.new_empty(x.shape if wants else (0,)) for x, wants in ((logits, for_logits), (target, for_target))]
    return torch.empty_like(weights), room[0], room[1]


OP = Op(
    "divergence",
    "(Tensor logits, Tensor target, Tensor weights, str kind, bool for_logits, bool for_target) "
    "-> (Tensor, Tensor, Tensor)",
    eager=eager,
    fake=fake,
    backends=[Backend("C++", "cpu", native_divergence, native.reason), triton("divergence")],
)


class _Divergence(torch.autograd.Function):
    """The weighted sum over rows. The forward computes the gradients as well; a second backward recomputes them."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weights: Tensor, kind: str, fused: bool | None, training: bool
    ) -> Tensor:
        ctx.save_for_backward(logits, target, weights)
        ctx.kind, ctx.fused = kind, fused
        wants = [training and needed for needed in ctx.needs_input_grad[:2]]
        values, *ctx.found = OP.on(logits, fused)(logits, target, weights, kind, *wants)
        total: Tensor = values.sum()
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), wants = grads, ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            return _differentiable(ctx, grad, wants)
        found, ctx.found = ctx.found, None
        if found is None:
            logits, target, weights = ctx.saved_tensors
            _, *found = OP.on(logits, ctx.fused)(logits, target, weights, ctx.kind, *wants)
        _scale([one for one, wants_it in zip(found, wants, strict=True) if wants_it], grad)
        return (*(one if wants_it else None for one, wants_it in zip(found, wants, strict=True)), *[None] * 4)


def _differentiable(ctx: Any, grad: Tensor, wants: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients with a graph of their own, to be differentiated again."""
    logits, target, weights = ctx.saved_tensors
    total = grad * (rows(logits, target, ctx.kind) * weights).sum()
    wanted = [x for x, wants_it in zip((logits, target), wants, strict=True) if wants_it]
    found = iter(torch.autograd.grad(total, wanted, create_graph=True))
    return (*(next(found) if wants_it else None for wants_it in wants), *[None] * 4)


def _scale(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """In place; not at all where the factor is seen to be one, which on a GPU would be a sync."""
    if factor.is_cpu and factor.item() == 1:
        return
    for gradient in gradients:
        gradient.mul_(factor)


def divergence(
    logits: Tensor,
    target: Tensor,
    kind: str = "symmetric_kl",
    *,
    weights: Tensor | None = None,
    fused: bool | None = None,
) -> Tensor:
    r"""The weighted sum of the rows' divergences; see the module's formulas.

    .. math:: \sum_n w_n \, D(\text{logits}_n, \text{target}_n)

    Differentiable by `logits` and `target`, and twice so. A backward adds nothing but a multiplication: both gradients
    are found in the forward pass, where they are wanted.

    Args:
        logits: [..., C], any floating dtype.
        target: of the same shape; detach it where it is to get no gradient.
        kind: "symmetric_kl", "kl" (KL(target || logits)), "js" or "mse"; "bernoulli" or "symmetric_bernoulli" for
            labels that do not exclude each other.
        weights: [...], of the rows; one whose weight is zero is not read. None: 1 / N each, which gives the mean.
        fused: which backend.

    Returns:
        0-d, float32 (float64 for float64 logits).

    Raises:
        ValueError: an unknown kind, or shapes that do not fit.

    Examples:
        >>> logits, target = torch.zeros(1, 2, requires_grad=True), torch.tensor([[0.0, 1.0]])
        >>> value = divergence(logits, target, "kl")
        >>> value.backward()
        >>> value.detach(), logits.grad
        (tensor(0.1109), tensor([[ 0.2311, -0.2311]]))
    """
    _check(logits, target, kind, weights)
    if kind in BERNOULLI:
        kind, logits, target = BERNOULLI[kind], two_classes(logits), two_classes(target)
        weights = _of_each_label(weights, logits)
    if logits.dtype != target.dtype:
        dtype = torch.promote_types(logits.dtype, target.dtype)
        logits, target = logits.to(dtype), target.to(dtype)
    logits, target = _flat(logits), _flat(target)
    wide = torch.promote_types(logits.dtype, torch.float32)
    if weights is None:
        count = logits.shape[0]
        weights = torch.full((count,), 1 / max(count, 1), dtype=wide, device=logits.device)
    else:
        weights = weights.detach().to(wide).reshape(-1).contiguous()
    out: Tensor = _Divergence.apply(logits, target, weights, kind, fused, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return out


def two_classes(logits: Tensor) -> Tensor:
    """Logits of labels [..., C] as those of two classes each, the label and its absence: [..., C, 2]."""
    return torch.stack((logits, torch.zeros_like(logits)), dim=-1)


def _of_each_label(weights: Tensor | None, logits: Tensor) -> Tensor:
    """A row's weight [...] for every one of its labels [..., C]: a row is their sum."""
    if weights is None:
        count = logits[..., 0, 0].numel()
        return torch.full(logits.shape[:-1], 1 / max(count, 1), dtype=torch.float64, device=logits.device)
    return weights.unsqueeze(-1).expand(logits.shape[:-1])


def _flat(x: Tensor) -> Tensor:
    """[N, C], with each row in one piece."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _check(logits: Tensor, target: Tensor, kind: str, weights: Tensor | None) -> None:
    if kind not in BERNOULLI:
        kind_code(kind)
    if logits.shape != target.shape or logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"divergence: logits and target must have one shape [..., C], not {tuple(logits.shape)} and "
            f"{tuple(target.shape)}"
        )
    if weights is not None and weights.shape != logits.shape[:-1]:
        raise ValueError(
            f"divergence: weights must have shape {tuple(logits.shape[:-1])}, one per row, not {tuple(weights.shape)}"
        )
