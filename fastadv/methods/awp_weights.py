"""Weights that are moved for a pass or two, and put back bit for bit in the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fastadv.ops.ascend import l2_norm
from fastadv.ops.grads import Plan, fit

SAFE = {torch.float32: 1e-15, torch.float64: 1e-130}  # of a norm whose squares have lost nothing that matters
FAR = 2.0**100  # a gradient below one over that is scaled by it
GUARD = 1e-6  # of the public code that clamps: on the weight's norm and on the gradient's


class MovedWeights:
    """The weights of a model that move, and where they were.

    Attributes:
        away: whether they may be elsewhere than `saved` says. One call of a native op takes them all back.
    """

    def __init__(self, weights: Sequence[nn.Parameter], fused: bool | None) -> None:
        self.weights = list(weights)
        self.away = False
        self.saved: list[Tensor] = []
        self.skipped = torch.zeros((), dtype=torch.int64, device="cpu")
        self.norm = torch.zeros((), device="cpu")  # of the last step's movements, the mean
        self._lenient = False if fused is False else None
        self._save, self._restore = Plan([], [], self._lenient), Plan([], [], self._lenient)

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self.weights)

    def set_out(self, undo: list[Callable[[], None]]) -> None:
        """Copy the weights as they are. From here on they may move, until `put_back`, which `undo` is told."""
        self.put_back()  # never are moved weights taken for the ones to go back to
        if not fit(self.saved, self.weights):
            self._make_room()
        undo.append(self.put_back)
        self._save.copy()
        self.away = True

    def put_back(self) -> None:
        """Take the weights back to where they were, bit for bit; also after an error, and twice."""
        if self.away:
            self._restore.copy()
            torch.clear_autocast_cache()  # it keeps casts by tensor, and does not see that one was written to
            self.away = False

    def values(self) -> list[Tensor]:
        """Copies of the weights where they are."""
        return [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def move_to(self, values: Sequence[Tensor]) -> None:
        """Put the weights there."""
        self.set_out([])
        Plan(self.weights, values, self._lenient).copy()
        torch.clear_autocast_cache()

    def _make_room(self) -> None:
        """In a first step, or after the model has gone to another device or precision, or has other weights."""
        device = self.weights[0].device
        self.saved = [torch.empty_like(weight, requires_grad=False) for weight in self.weights]
        self.skipped, self.norm = self.skipped.to(device), self.norm.to(device)
        self._save = Plan(self.saved, self.weights, self._lenient)
        self._restore = Plan(self.weights, self.saved, self._lenient)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], gamma: float, epsilon: float | None) -> None:
        """Move each weight by gamma times its own norm along its gradient, then within epsilon |w| of each element.

        One without a gradient stays where it is; one whose gradient is not finite does too, and is counted.
        """
        moving = [(w, s, g) for w, s, g in zip(self.weights, self.saved, gradients, strict=True) if g is not None]
        if not moving:
            return
        guard = 0.0 if epsilon is None else GUARD
        sizes, lengths = (norms([group[index] for group in moving]).to(self.norm.device) for index in (2, 0))
        finite = sizes.isfinite()
        live = finite & (sizes > 0)
        powers = torch.where(sizes < 1 / FAR, FAR, 1.0)  # of two, so that the share of next to nothing is a number
        shares = torch.where(live, gamma * (lengths + guard) / torch.where(live, (sizes + guard) * powers, 1), 0)
        self.skipped += (~finite).sum()
        self.norm.copy_((shares * torch.where(live, sizes * powers, 0)).mean())
        for (weight, saved, grad), power, share, lives in zip(moving, powers, shares, live, strict=True):
            if weight.is_cpu and not lives.item():
                continue
            _add(weight, grad if weight.is_cpu else torch.where(lives.to(grad.device), grad, 0), power, share)
            if epsilon is not None:
                reach = epsilon * saved.abs()
                torch.clamp(weight, saved - reach, saved + reach, out=weight)
        torch.clear_autocast_cache()


def _add(weight: Tensor, grad: Tensor, power: Tensor, share: Tensor) -> None:
    """Add share * (grad * power) in place: in float32 at least, rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if not power.is_cpu or power > 1:
        grad = grad.to(wide) * power.to(grad.device, wide)
    share = share.to(weight.device, wide)
    if weight.dtype == wide:
        weight.addcmul_(grad, share)
    else:
        weight.copy_(torch.addcmul(weight.to(wide), grad.to(wide), share))


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The l2 norm of each [n], in float64."""
    if tensors[0].is_cuda and all(tensor.dtype != torch.float64 for tensor in tensors):
        return torch.stack(list(torch._foreach_norm(list(tensors), 2, torch.float64)))  # squares have room there
    return torch.stack([norm(tensor) for tensor in tensors])


def norm(x: Tensor) -> Tensor:
    """The l2 norm of all of `x`, 0-d, for numbers of any size; on the CPU without memory for a copy, mostly."""
    plain: Tensor = torch.linalg.vector_norm(x)
    if x.is_cpu and x.dtype in SAFE and SAFE[x.dtype] < plain.item() < 1 / SAFE[x.dtype]:
        return plain.double()
    if x.dtype == torch.float64:
        return l2_norm(x.reshape(1, -1)).squeeze()
    wide: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)  # squares have room there
    return wide
