r"""FreeLB, YOPO and FreeAT in float64, written straight from the papers; nothing here comes from the package.

FreeLB (Zhu et al. 2020, https://arxiv.org/abs/1909.11764), K passes, gradient 1/K sum_t dL(r_t):
    l2:    r_{t+1} = P(r_t + a g_t / ||g_t||_2)
    linf:  r_{t+1} = clip(r_t + a g_t / max|g_t|, -epsilon, epsilon)

YOPO-m-n (Zhang et al. 2019, https://arxiv.org/abs/1905.00877), gradient 1/m sum_j dL(r_j):
    p = dL/dh at h = f0(x + r_j); then n times r <- P(r + a d(dr <p, f0(x + r)>)), with d(g) = g / ||g||_2, or sign(g)

FreeAT (Shafahi et al. 2019, https://arxiv.org/abs/1904.12843), every batch m times, each with an optimizer step:
    gradient dL(r);  r <- P(r + a d(dr L(r)))
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.oracles.oracles import AXES, TABLE_SCOPES, Wanted, ascend, gradients_of, norm2

LossAt = Callable[[Tensor], Tensor]


class Site:
    """Looked-up embeddings with a perturbation of one scope, at the positions that `keep` has."""

    def __init__(self, weight: Tensor, ids: Tensor, scope: str, keep: Tensor | None = None) -> None:
        self.weight, self.ids, self.scope = weight, ids, scope
        keep = torch.ones(ids.shape) if keep is None else keep
        self.keep = keep.to(weight).unsqueeze(-1)

    def zero(self) -> Tensor:
        shape = self.weight.shape if self.scope in TABLE_SCOPES else (*self.ids.shape, self.weight.shape[1])
        return self.weight.new_zeros(shape).detach()

    def spread(self, r: Tensor) -> Tensor:
        return self.keep * (r[self.ids] if self.scope in TABLE_SCOPES else r)

    def at(self, r: Tensor) -> Tensor:
        return self.weight[self.ids] + self.spread(r)


def max_step(r: Tensor, g: Tensor, scope: str, step_size: float, epsilon: float | None) -> Tensor:
    """By the gradient over its largest element in the group, then clipped. A group without a gradient stays."""
    largest = g.abs().amax(AXES[scope], keepdim=True)
    moved = r + step_size * torch.where(largest > 0, g / largest, torch.zeros_like(g))
    return moved if epsilon is None else moved.clamp(-epsilon, epsilon)


def freelb(
    model: nn.Module,
    site: Site,
    loss_at: LossAt,
    *,
    epsilon: float | None,
    step_size: float,
    steps: int,
    norm: str = "l2",
    start: Tensor | None = None,
    adv_weight: float = 1.0,
    climbed: LossAt | None = None,
) -> Wanted:
    """One step; `climbed` is what the ascent maximises where that is not the loss."""
    r = site.zero() if start is None else start
    wanted, total = Wanted(), torch.zeros((), dtype=r.dtype)
    for t in range(steps):
        wanted.perturbations.append(site.spread(r))
        loss = loss_at(site.at(r))
        wanted.losses.append(loss.detach())
        total = total + loss / steps
        if t == steps - 1:
            break
        free = r.detach().requires_grad_()
        (g,) = torch.autograd.grad((climbed or loss_at)(site.at(free)), free)
        if norm == "linf":
            r = max_step(r, g, site.scope, step_size, epsilon)
        else:
            r = ascend(r, g, scope=site.scope, norm=norm, step_size=step_size, epsilon=epsilon)
    wanted.gradients, wanted.r = gradients_of(model, adv_weight * total), r
    return wanted


def yopo(
    model: nn.Module,
    site: Site,
    loss_at: LossAt,
    split: nn.Module,
    *,
    epsilon: float | None,
    step_size: float,
    steps: int,
    inner_steps: int,
    norm: str = "l2",
    start: Tensor | None = None,
    adv_weight: float = 1.0,
) -> Wanted:
    """One step. All n inner steps run f0, as in the paper."""
    r = site.zero() if start is None else start
    wanted, total = Wanted(), torch.zeros((), dtype=r.dtype)
    for j in range(steps):
        loss, hidden = _with_hidden(split, loss_at, site.at(r))
        wanted.perturbations.append(site.spread(r))
        wanted.losses.append(loss.detach())
        total = total + loss / steps
        if j == steps - 1:
            break
        (p,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        for _ in range(inner_steps):
            free = r.detach().requires_grad_()
            hidden = _with_hidden(split, loss_at, site.at(free))[1]
            (g,) = torch.autograd.grad((p * hidden).sum(), free)
            r = ascend(r, g, scope=site.scope, norm=norm, step_size=step_size, epsilon=epsilon)
    wanted.gradients, wanted.r = gradients_of(model, adv_weight * total), r
    return wanted


def _with_hidden(split: nn.Module, loss_at: LossAt, embeds: Tensor) -> tuple[Tensor, Tensor]:
    seen: list[Tensor] = []
    handle = split.register_forward_hook(lambda *call: seen.append(call[-1]))
    try:
        loss = loss_at(embeds)
    finally:
        handle.remove()
    return loss, seen[0]


class FreeAT:
    """The buffer, one vector per batch slot and position, and SGD."""

    def __init__(self, model: nn.Module, weight: Tensor, rows: int, length: int, rate: float) -> None:
        self.model, self.weight, self.rate = model, weight, rate
        self.buffer = weight.new_zeros(rows, length, weight.shape[1]).detach()

    def begin_anew(self) -> None:
        self.buffer.zero_()

    def replay(
        self, ids: Tensor, keep: Tensor, loss_at: LossAt, *, scope: str, norm: str, epsilon: float, step_size: float
    ) -> Tensor:
        """One replay and its optimizer step; what the model saw."""
        site, (rows, length) = Site(self.weight, ids, scope, keep), ids.shape
        r = (self.buffer[:rows, :length] * site.keep).requires_grad_()
        loss = loss_at(site.at(r))
        (g,) = torch.autograd.grad(loss, r, retain_graph=True)
        gradients = gradients_of(self.model, loss)
        moved = ascend(r.detach(), g, scope=scope, norm=norm, step_size=step_size, epsilon=epsilon)
        self.buffer[:rows, :length] = torch.where(site.keep > 0, moved, self.buffer[:rows, :length])
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter -= self.rate * gradients[name]
        return r.detach()


__all__ = ["FreeAT", "Site", "freelb", "max_step", "norm2", "yopo"]
