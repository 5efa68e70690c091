"""Who compares two batches of logits: the symmetric KL divergence and its gradient by both, in float32.

`python -m bench.divergences NAME --rows N --classes C` prints the peak memory of one in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv import ops

Found = tuple[Tensor, Tensor, Tensor]  # the mean over rows, and its gradients
Compare = Callable[[Tensor, Tensor], Found]


def inputs(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits of a model, and of the same a little moved."""
    generator = torch.Generator().manual_seed(4)
    logits = 2 * torch.randn(rows, classes, generator=generator)
    return logits, logits + 0.3 * torch.randn(rows, classes, generator=generator)


def by_autograd(value: Callable[[Tensor, Tensor], Tensor]) -> Compare:
    """A formula, and autograd for the rest."""

    def compare(logits: Tensor, target: Tensor) -> Found:
        a, b = logits.detach().requires_grad_(), target.detach().requires_grad_()
        found = value(a, b)
        return found.detach(), *torch.autograd.grad(found, (a, b))

    return compare


def textbook(a: Tensor, b: Tensor) -> Tensor:
    """As SMART's public codes have it."""
    log_p, log_q = F.log_softmax(a, -1), F.log_softmax(b, -1)
    there = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return there + F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def shorter(a: Tensor, b: Tensor) -> Tensor:
    """Both sums are one: (p - q) (log p - log q)."""
    log_p, log_q = F.log_softmax(a, -1), F.log_softmax(b, -1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum() / len(a)


class Given(torch.autograd.Function):
    """A function that finds the gradients with the value, as a training step would use it."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, compare: Compare) -> Tensor:
        value, *ctx.found = compare(a, b)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.found if grads[0].item() == 1 else [grads[0] * one for one in ctx.found]
        return left, right, None


def given(compare: Compare) -> Compare:
    """The same through autograd."""
    return by_autograd(lambda a, b: Given.apply(a, b, compare))


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


CONTESTANTS: dict[str, Compare] = {
    "reference": by_autograd(textbook),
    "torch, autograd": by_autograd(shorter),
    "torch": given(by_hand),
    "compiled": given(_compiled),
    "fused": by_autograd(lambda a, b: ops.divergence(a, b, fused=True)),
}


def moved(rows: int, classes: int) -> int:
    """Bytes: both logits read, both gradients written."""
    return 16 * rows * classes


def measure(contestant: str, rows: int, classes: int, rounds: int) -> dict[str, Any]:
    """Each round's peak resident bytes above what is there before, and its seconds; a first round warms up."""
    from bench.peaks import peak, release, reset_peak

    logits, target = inputs(rows, classes)
    compare = CONTESTANTS[contestant]
    compare(logits, target)
    peaks, seconds = [], []
    for _ in range(rounds):
        release()
        reset_peak()
        before, start = peak(), time.perf_counter()
        compare(logits, target)
        seconds.append(time.perf_counter() - start)
        peaks.append(peak() - before)
    return {"peaks": peaks, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps(measure(options.contestant, options.rows, options.classes, options.rounds)))


if __name__ == "__main__":
    main()
