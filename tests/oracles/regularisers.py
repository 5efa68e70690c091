r"""SMART, VAT, LLR, AWP, NEFTune and the Bregman proximal point in float64, written straight from the papers.

Nothing here comes from the package. A model is given as functions of what was looked up (`answer_at(E)`: logits [B, C];
`losses_at(E)`: [B]); gradients are those of one scalar, by autograd, with every perturbation a constant.

    SMART    L(x) + w D(f(x + d_K), f(x)),            d <- clip(d + a g / max|g| per token), g of D(f(x + d), sg f(x))
    VAT      L(x) + w KL(sg f(x) || f(x + r)),        r = epsilon g / |g|, g of KL(sg f(x) || f(x + xi d)), K times
    LLR      mean_i L_i + l |gap_i(d)| + m |d . g_i|, d <- clip(d + a sign of d |gap_i| / dd),
             gap_i(d) = L_i(x + d) - L_i(x) - d . g_i, g_i = dL_i / dx
    AWP      dL(w) + dL(w + v),                       v = gamma |w| g / |g| per matrix
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tests.oracles.oracles import ascend, gradients_of, norm2

At = Callable[[Tensor], Tensor]


@dataclass
class Found:
    """What is added to the words in the last pass, the penalty there, and the step's gradient."""

    perturbation: Tensor
    penalty: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q), the mean over rows."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    return kl(a, b) + kl(b, a)


def bernoulli(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) of independent labels: the sum over labels, the mean over rows."""
    p, q = p_logits.sigmoid(), q_logits.sigmoid()
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1).mean()


def symmetric_bernoulli(a: Tensor, b: Tensor) -> Tensor:
    return bernoulli(a, b) + bernoulli(b, a)


def mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean()


def smart(
    model: nn.Module,
    loss_at: At,
    answer_at: At,
    words: Tensor,
    start: Tensor,
    *,
    keep: Tensor,
    epsilon: float,
    step_size: float,
    steps: int,
    weight: float,
    norm: str = "linf",
    scope: str = "token",
    distance: Callable[[Tensor, Tensor], Tensor] = symmetric_kl,
) -> Found:
    """`words` is the lookup with its graph; `keep` [B, T, 1] is the mask."""
    constant = words.detach()
    fixed = answer_at(constant).detach()
    d = start * keep
    for _ in range(steps):
        d = d.detach().requires_grad_()
        [g] = torch.autograd.grad(distance(answer_at(constant + keep * d), fixed), d)
        if norm == "l2":
            d = ascend(d.detach(), g, scope=scope, norm="l2", step_size=step_size, epsilon=epsilon)
        else:
            axes = {"token": (2,), "sample": (1, 2), "batch": (0, 1, 2)}[scope]
            largest = g.abs().amax(axes, keepdim=True)
            d = (d.detach() + step_size * torch.where(largest > 0, g / largest, 0)).clamp(-epsilon, epsilon)
    d = (d * keep).detach()
    penalty = distance(answer_at(words + d), answer_at(words))
    return Found(d, penalty.detach(), gradients_of(model, loss_at(words) + weight * penalty))


def vat(
    model: nn.Module,
    loss_at: At | None,
    answer_at: At,
    words: Tensor,
    start: Tensor,
    *,
    keep: Tensor,
    epsilon: float,
    xi: float,
    steps: int,
    weight: float,
    scope: str = "sample",
    distance: Callable[[Tensor, Tensor], Tensor] = kl,
) -> Found:
    """`start` is xi times a direction."""
    constant = words.detach()
    fixed = answer_at(constant).detach()
    r = start * keep
    for left in reversed(range(steps)):
        r = r.detach().requires_grad_()
        [g] = torch.autograd.grad(distance(fixed, answer_at(constant + keep * r)), r)
        size = norm2(g, scope)
        r = (xi if left else epsilon) * torch.where(size > 0, g / size, 0)
    r = (r * keep).detach()
    penalty = distance(fixed, answer_at(words + r))
    total = weight * penalty if loss_at is None else loss_at(words) + weight * penalty
    return Found(r, penalty.detach(), gradients_of(model, total))


def llr(
    model: nn.Module,
    losses_at: At,
    words: Tensor,
    start: Tensor,
    *,
    keep: Tensor,
    epsilon: float,
    step_size: float,
    steps: int,
    gap_weight: float,
    slope_weight: float,
    stop_gradient: bool = False,
) -> Found:
    """Each sample's own; the slope g is a function of the weights, the perturbation is not."""

    def slope(at: Tensor) -> Tensor:
        [g] = torch.autograd.grad(losses_at(at).sum(), at, create_graph=True)
        return g * keep

    constant = words.detach().requires_grad_()
    fixed, g_fixed = losses_at(constant).detach(), slope(constant).detach()
    d = start * keep
    for _ in range(steps):
        d = d.detach().requires_grad_()
        linear = ((d.detach() if stop_gradient else d) * g_fixed).sum((1, 2))
        gaps = (losses_at(constant.detach() + keep * d) - fixed - linear).abs()
        [g] = torch.autograd.grad(gaps.sum(), d)
        d = ascend(d.detach(), g, scope="sample", norm="linf", step_size=step_size, epsilon=epsilon)
    d = (d * keep).detach()
    linear = (d * slope(words)).sum((1, 2))
    gap = losses_at(words + d) - losses_at(words) - linear
    penalty = gap_weight * gap.abs().mean() + slope_weight * linear.abs().mean()
    return Found(d, penalty.detach(), gradients_of(model, losses_at(words).mean() + penalty))


def awp(
    model: nn.Module, loss: Callable[[], Tensor], *, gamma: float, steps: int, clean_weight: float, adv_weight: float
) -> dict[str, Tensor]:
    """The step's gradient; the model is moved, and put back."""
    clean = gradients_of(model, loss())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for _ in range(steps):
            with torch.enable_grad():
                found = gradients_of(model, loss())
            for name, p in model.named_parameters():
                size = found[name].square().sum().sqrt()
                if p.dim() > 1 and size > 0:
                    p += gamma * p.square().sum().sqrt() * found[name] / size
    there = gradients_of(model, loss())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    return {name: clean_weight * clean[name] + adv_weight * there[name] for name in clean}
