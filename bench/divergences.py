"""Who compares two batches of logits: the symmetric KL divergence and its gradient by both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contest import Field
from bench.race import Entry, nothing
from fastadv import ops
from fastadv.reference.smart import symmetric_kl

Found = tuple[Tensor, ...]  # the mean over rows, and its gradients


def inputs(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits of a model, and of the same a little moved."""
    generator = torch.Generator().manual_seed(4)
    logits = 2 * torch.randn(rows, classes, generator=generator)
    return logits, logits + 0.3 * torch.randn(rows, classes, generator=generator)


def by_autograd(value: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor, *, constant: bool) -> Found:
    """A formula, and autograd for the gradients by both, or by the logits alone."""
    a, b = logits.detach().requires_grad_(), target.detach().requires_grad_(not constant)
    found = value(a, b)
    return found.detach(), *torch.autograd.grad(found, (a,) if constant else (a, b))


def shorter(a: Tensor, b: Tensor) -> Tensor:
    """Both sums are one: (p - q) (log p - log q)."""
    log_p, log_q = F.log_softmax(a, -1), F.log_softmax(b, -1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum() / len(a)


class Given(torch.autograd.Function):
    """A function that finds the gradients with the value, as a training step would use it."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, compare: Callable[[Tensor, Tensor], Found]) -> Tensor:
        value, *ctx.found = compare(a, b)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.found if grads[0].item() == 1 else [grads[0] * one for one in ctx.found]
        return left, right, None


def by_hand(a: Tensor, b: Tensor) -> Found:
    """The strongest we could write: gradients by their formulas, in the memory of what is no longer needed."""
    ratio, log_q = F.log_softmax(a, -1), F.log_softmax(b, -1)
    p = ratio.exp()
    ratio.sub_(log_q)
    q = log_q.exp_()
    pr, qr = torch.linalg.vecdot(p, ratio).unsqueeze(1), torch.linalg.vecdot(q, ratio).unsqueeze(1)
    value = (pr.sum() - qr.sum()) / len(a)
    gap = torch.sub(p, q)
    p.mul_(ratio - pr).add_(gap).div_(len(a))
    q.mul_(ratio.neg_().add_(qr)).sub_(gap).div_(len(a))
    return value, p, q


@torch.compile(dynamic=False)
def _compiled(a: Tensor, b: Tensor) -> Found:
    log_p, log_q = F.log_softmax(a, -1), F.log_softmax(b, -1)
    p, q, ratio = log_p.exp(), log_q.exp(), log_p - log_q
    pr, qr = (p * ratio).sum(1, keepdim=True), (q * ratio).sum(1, keepdim=True)
    gap = p - q
    return (pr - qr).sum() / len(a), (p * (ratio - pr) + gap) / len(a), (q * (qr - ratio) - gap) / len(a)


CONTESTANTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reference": symmetric_kl,  # as SMART's public codes have it
    "torch, autograd": shorter,
    "torch": lambda a, b: Given.apply(a, b, by_hand),
    "compiled": lambda a, b: Given.apply(a, b, _compiled),
    "fused": lambda a, b: ops.divergence(a, b, fused=True),
}
TO_A_CONSTANT = ("torch, autograd", "fused")


def field(rows: int, classes: int, device: str, dtype: torch.dtype, *, constant: bool = False) -> Field:
    """Symmetric KL and its gradient by both logits, or with a constant target by one."""
    logits, target = (one.to(device, dtype) for one in inputs(rows, classes))

    def entry(name: str) -> Entry:
        return Entry(nothing, lambda: by_autograd(CONTESTANTS[name], logits, target, constant=constant))

    moved = (3 if constant else 4) * logits.nbytes  # both logits read, both gradients written, or one
    return Field({name: entry(name) for name in (TO_A_CONSTANT if constant else CONTESTANTS)}, moved, (rows, classes))
