r"""FGM and PGD in float64, written straight from the papers; nothing here comes from the package.

FGM (Miyato et al. 2017, https://arxiv.org/abs/1605.07725) and PGD (Madry et al. 2018, https://arxiv.org/abs/1706.06083):

    l2:    r_0 = start,  r_{t+1} = P(r_t + a g_t / ||g_t||_2),   P(r) = r min(1, epsilon / ||r||_2)
    linf:  r_0 = start,  r_{t+1} = clip(r_t + a sign(g_t), -epsilon, epsilon)

FGM is one step with a = epsilon. The norm is over the scope's group. The loss sees W[ids] + mask * r, or
W[ids] + mask * r[ids] in the table scopes, and the step's gradient is
clean_weight * dL(0) + adv_weight * dL(r_K).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

AXES = {"table": (0, 1), "row": (1,), "batch": (0, 1, 2), "sample": (1, 2), "token": (2,)}
TABLE_SCOPES = ("table", "row")
SCOPES = tuple(AXES)
NORMS = ("l2", "linf")


@dataclass
class Wanted:
    """What each forward must see and give, and what must be in `.grad` in the end."""

    perturbations: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    r: Tensor | None = None


def norm2(x: Tensor, scope: str) -> Tensor:
    """The l2 norm over the scope's groups, kept as dimensions of size one."""
    return x.square().sum(AXES[scope], keepdim=True).sqrt()


def ascend(r: Tensor, g: Tensor, *, scope: str, norm: str, step_size: float, epsilon: float | None) -> Tensor:
    """One step up and back onto the ball. A group whose gradient is zero stays."""
    if norm == "linf":
        moved = r + step_size * g.sign()
        return moved if epsilon is None else moved.clamp(-epsilon, epsilon)
    size = norm2(g, scope)
    moved = r + step_size * torch.where(size > 0, g / size, torch.zeros_like(g))
    if epsilon is None:
        return moved
    length = norm2(moved, scope)
    return torch.where(length > epsilon, moved * epsilon / length, moved)


def attack(
    model: nn.Module,
    loss_at: Callable[[Tensor], Tensor],
    weight: Tensor,
    ids: Tensor,
    *,
    scope: str,
    norm: str = "l2",
    epsilon: float | None,
    step_size: float,
    steps: int,
    mask: Tensor | None = None,
    clean_weight: float = 1.0,
    adv_weight: float = 1.0,
    start: Tensor | None = None,
) -> Wanted:
    """The whole step. `loss_at(embeds)` is the loss as a function of what was looked up; `start` has r's shape."""
    keep = torch.ones(ids.shape) if mask is None else mask
    keep = keep.to(weight).unsqueeze(-1)

    def spread(r: Tensor) -> Tensor:
        return keep * (r[ids] if scope in TABLE_SCOPES else r)

    def gradient_at(r: Tensor) -> Tensor:
        r = r.detach().requires_grad_()
        return torch.autograd.grad(loss_at(weight.detach()[ids] + spread(r)), r)[0]

    wanted = Wanted()

    def see(r: Tensor) -> None:
        wanted.perturbations.append(spread(r))
        wanted.losses.append(loss_at(weight[ids] + spread(r)).detach())

    zero = weight.new_zeros(weight.shape if scope in TABLE_SCOPES else (*ids.shape, weight.shape[1]))
    r = zero if start is None else start
    if clean_weight != 0 and start is not None:
        see(zero)
    for _ in range(steps):
        see(r)
        r = ascend(r, gradient_at(r), scope=scope, norm=norm, step_size=step_size, epsilon=epsilon)
    see(r)
    total = adv_weight * loss_at(weight[ids] + spread(r))
    if clean_weight != 0:
        total = total + clean_weight * loss_at(weight[ids])
    wanted.gradients = gradients_of(model, total)
    wanted.r = r
    return wanted


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """d loss / d parameter for every parameter, zeros where the loss does not depend on it."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, grads, strict=True)}
    return {n: found.get(n, torch.zeros_like(p)) for n, p in model.named_parameters()}
