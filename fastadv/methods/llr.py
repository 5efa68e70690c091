"""LLR, local linearity regularisation (Qin et al. 2019, https://arxiv.org/abs/1907.02610)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastadv.engine.adam import Adam
from fastadv.engine.loss import losses_of
from fastadv.engine.passes import Closure, Held
from fastadv.engine.perturbation import TABLE_SCOPES
from fastadv.engine.site import Masks
from fastadv.engine.start import RandomStart
from fastadv.methods.base import StepResult, number, one_of
from fastadv.methods.embedded import EmbeddingMethod
from fastadv.methods.smart import refuse_tied

OPTIMIZERS = ("sign", "adam")
ONCE = ("derivative for", "differentiate twice", "double back", "is not implemented", "once_differentiable")


class LLR(EmbeddingMethod):
    r"""Trains the loss to be as linear around each sample as it can be: then one gradient says all of its surroundings.

    .. math:: \gamma(\delta) = \big\lvert L(x + \delta) - L(x) - \delta \cdot g \big\rvert, \quad g = \nabla_x L(x),
        \qquad \delta^* = \arg\max_{\lVert \delta \rVert_\infty \le \epsilon} \gamma(\delta), \qquad
        \nabla = \nabla \Big( L(x) + \lambda \, \gamma(\delta^*) + \mu \, \lvert \delta^* \cdot g \rvert \Big)

    Each sample by itself, and the mean over them. Two full passes and K probes a step, and a second derivative: g is
    part of what is trained. So the model runs its attention by the plain formula (the math kernel of
    `scaled_dot_product_attention`; the others cannot be differentiated twice).

    The losses of single samples come from the output's `losses` [B], or from a loss that is a vector [B] (`reduction=
    "none"`). Where there is only their mean, gap and slope are those of the mean, in which samples that curve up and
    down cancel.

    The authors' code searches with two differences: `stop_gradient=True` holds the linear term fixed, and
    `optimizer="adam"` steps by Adam with a rate of 0.1.

    Perturbations are float32 (float64 for a float64 model), [B, T, D], in the embedding's own units.

    Args:
        model: the model to train; it must have second derivatives, so it cannot be compiled.
        epsilon: radius of the ball.
        step_size: length of one ascent step; None: a quarter of epsilon (Adam's rate: 0.1).
        steps: number of ascent steps, K.
        norm: "linf" or "l2".
        scope: what the norm is over: "sample", "token", "batch".
        gap_weight: of the departure from linearity, lambda.
        slope_weight: of the linear part, mu.
        stop_gradient: the search follows the gradient of the loss alone, up or down as the gap's sign says.
        optimizer: "sign" (steps by the norm's rule) or "adam".
        random_start: True: U(-epsilon, epsilon) for linf; a magnitude; or a callable `(shape, mask) -> tensor`.
        dropout: the "same" masks in all passes of a step, "fresh" ones in each, or "off".
        **common: the arguments that all methods take; see `fastadv.PGD`.

    Raises:
        TypeError, ValueError: an argument that cannot be, an embedding that cannot be found, a compiled model, or
            `attack=` in a step.
        RuntimeError: `fused=True` where not every op has a native backend. In a step: a part of the model has no second
            derivative.

    Example:
        >>> import fastadv, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(12, 1))
        >>> adv = fastadv.LLR(model, epsilon=0.1)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> result = adv.backward(lambda: model(ids).square().mean())  # instead of loss.backward()
        >>> bool(result.adv_loss > 0)  # what is added to the loss
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        epsilon: float = 0.002,
        step_size: float | None = None,
        steps: int = 3,
        norm: str = "linf",
        scope: str = "sample",
        gap_weight: float = 4.0,
        slope_weight: float = 3.0,
        stop_gradient: bool = False,
        optimizer: str = "sign",
        random_start: RandomStart = True,
        tied: str = "lookup",
        dropout: str = "same",
        **common: Any,
    ) -> None:
        refuse_tied("LLR", tied)
        one_of("optimizer", optimizer, OPTIMIZERS)
        if scope in TABLE_SCOPES:
            raise ValueError(
                f"LLR measures each sample's own gap, and scope={scope!r} has one perturbation per token id: use "
                "scope='sample', 'batch' or 'token'"
            )
        self.gap_weight = number("gap_weight", gap_weight)
        self.slope_weight = number("slope_weight", slope_weight)
        self.stop_gradient = bool(stop_gradient)
        if step_size is None:
            step_size = 0.1 if optimizer == "adam" else number("epsilon", epsilon) / 4
        super().__init__(
            model,
            epsilon=number("epsilon", epsilon),
            step_size=step_size,
            steps=steps,
            norm=norm,
            scope=scope,
            random_start=random_start,
            dropout=dropout,
            **common,
        )
        if self.engine.wrapping.compiled:
            self.close()
            raise ValueError("LLR differentiates the model twice, and torch.compile's backward cannot be: leave it out")
        self.adam = Adam(self.step_size) if optimizer == "adam" else None

    def backward(
        self, closure: Closure, mask: Masks = None, attack: Closure | None = None, step: int | None = None
    ) -> StepResult:
        """As for every method; what is searched for is the gap, so that there is no `attack`."""
        if attack is not None:
            raise ValueError(
                "LLR's search maximises the gap to linearity, so that attack= has no use here: leave it out"
            )
        with twice_differentiable():
            return super().backward(closure, mask, None, step)

    def run(self, closure: Closure, attack: Closure | None) -> StepResult:  # noqa: ARG002
        """The clean forward and its slope, the search for the largest gap, and one backward through all of it."""
        clean = self.engine.hold(closure, losses_of)
        slope = self.engine.slope(clean.loss.sum())  # g, as a function of the weights
        target = self.departure(closure, clean, slope)
        self.start()
        self.probe(target)
        self.climb(target)
        penalties: list[Tensor] = []

        def total() -> Tensor:
            moved = losses_of(closure())
            linear = self.along([delta.detach().clone() for delta in self.deltas()], slope, clean.loss)
            gap = (moved - clean.loss - linear).abs().mean()
            penalties.append(self.gap_weight * gap + self.slope_weight * linear.abs().mean())
            return clean.loss.mean() + penalties[-1]

        done = self.descend(total)
        first = self.engine.first or done
        return StepResult(first.loss, penalties[-1].detach(), first.output)

    def departure(self, closure: Closure, clean: Held, slope: list[Tensor]) -> Closure:
        """The sum of the gaps by delta, L(x) and g given."""
        losses, g = clean.loss.detach(), [one.detach() for one in slope]

        def gaps() -> Tensor:
            moved = losses_of(closure())
            deltas = [delta.detach() for delta in self.deltas()] if self.stop_gradient else self.deltas()
            return (moved - losses - self.along(deltas, g, losses)).abs().sum()

        return gaps

    def along(self, deltas: list[Tensor], slope: list[Tensor], losses: Tensor) -> Tensor:
        """Delta . g of each sample, or of all of them where there is one loss."""
        products = [(delta * g).flatten(1).sum(1) for delta, g in zip(deltas, slope, strict=True)]
        if len(losses) == 1:
            return torch.stack([product.sum() for product in products]).sum().reshape(1)
        return torch.stack(products).sum(0)

    def deltas(self) -> list[Tensor]:
        """The perturbation, call by call."""
        return self.engine.perturbation.leaves()

    def target(self, closure: Closure) -> Closure:
        """The sum of the gaps, for `perturbed`."""
        with twice_differentiable():
            clean = self.engine.hold(closure, losses_of)
            return self.departure(closure, clean, self.engine.slope(clean.loss.sum()))

    def climb(self, target: Closure) -> None:
        """K steps, with a probe between each two."""
        if self.adam is not None:
            self.adam.begin()
        for left in reversed(range(self.steps)):
            if self.adam is None:
                self.ascend()
            else:
                self.engine.move(self._by_adam)
            if left:
                self.probe(target)

    def _by_adam(self, call: int, delta: Tensor, grad: Tensor) -> Tensor:
        assert self.adam is not None
        moved = delta + self.adam.step(call, grad)
        return moved if self.epsilon is None else moved.clamp(-self.epsilon, self.epsilon)


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Attention by the plain formula; and where something else has no second derivative, an error that says so."""
    try:
        with sdpa_kernel([SDPBackend.MATH]):
            yield
    except RuntimeError as error:
        if any(phrase in str(error) for phrase in ONCE):
            raise RuntimeError(
                f"LLR differentiates the model twice, and a part of it has no second derivative ({error}). Attention: "
                "attn_implementation='eager' or 'sdpa' in transformers; RNNs: torch.backends.cudnn.flags(enabled=False)"
            ) from error
        raise
