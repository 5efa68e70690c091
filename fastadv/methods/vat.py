"""VAT, virtual adversarial training (Miyato et al. 2019, https://arxiv.org/abs/1704.03976)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastadv.engine.loss import has_loss
from fastadv.engine.passes import Closure
from fastadv.engine.rule import Rule
from fastadv.engine.start import Draw, RandomStart, resolve, somewhere_at
from fastadv.methods.base import StepResult, check_module, number
from fastadv.methods.comparison import Comparison, Divergence
from fastadv.methods.embedded import EmbeddingMethod
from fastadv.methods.smart import refuse_tied

XI = {torch.float64: 1e-5, torch.float32: 1e-2}  # by the dtype that the model computes in; any other: 1
LEADING = {"batch": 0, "sample": 1, "token": -1, "table": 0, "row": 1}


class VAT(EmbeddingMethod):
    r"""Moves the model's answer as far as a perturbation of length epsilon can, and trains it to stay. Labels or not.

    .. math:: d \leftarrow \frac{g}{\lVert g \rVert}, \ g = \nabla_r
        \mathrm{KL}\big(f(x) \,\Vert\, f(x + r)\big)\Big|_{r = \xi d} \ \text{K times}, \qquad
        \nabla = \nabla L(x) + w \, \nabla \mathrm{KL}\big(f(x) \,\Vert\, f(x + \epsilon d)\big)

    The divergence is smallest at r = 0, so there is no gradient to follow; K power iterations find the direction in
    which it curves most, beginning with a random one. f(x) is a constant in both. Two full passes and K probes a step;
    a batch without labels needs no backward of its clean pass.

    An unlabelled batch is one whose closure returns an output with logits and without a loss: then the divergence alone
    is trained. In a mixed batch the loss is that of the labelled part, as the model computes it, and the divergence is
    that of all samples.

    Perturbations are float32 (float64 for a float64 model), [B, T, D], in the embedding's own units.

    Args:
        model: the model to train, wrapped (DDP, torch.compile, PEFT) or not.
        epsilon: length of the perturbation.
        xi: length of the probing step; None: by the dtype in which the model computes: 1e-5 in float64, 0.01 in
            float32, 1 in lower precision, under autocast or with `probe_dtype`. Too short, and rounding hides what it
            changes.
        steps: number of power iterations, K.
        norm: "l2"; "linf" takes the sign of the gradient in place of its direction.
        scope: what the norm is over: "sample", "token", "batch", "row", "table".
        weight: of the divergence, w.
        divergence: "kl", "symmetric_kl", "js", "mse" for regression, or a callable
            `(perturbed_logits, clean_logits) -> 0-d tensor`.
        random_start: True: a uniformly random direction of length xi; such a length; or a callable
            `(shape, mask) -> tensor`.
        dropout: the "same" masks in all passes of a step, "fresh" ones in each, or "off".
        **common: the arguments that all methods take; see `fastadv.PGD`.

    Raises:
        TypeError, ValueError: an argument that cannot be, or an embedding that cannot be found. In a step: the closure
            returned no logits, or those of one class where distributions are compared.
        RuntimeError: `fused=True` where not every op has a native backend.

    Example:
        >>> import fastadv, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> adv = fastadv.VAT(model, epsilon=0.5)
        >>> ids = torch.tensor([[1, 2, 3]])  # without a label
        >>> result = adv.backward(lambda: {"logits": model(ids)})  # instead of loss.backward()
        >>> bool(result.adv_loss > 0), round(float(adv.perturbation_norm), 4)
        (True, 0.5)
    """

    norms: ClassVar[dict[str, tuple[str, str]]] = {"l2": ("l2", "none"), "linf": ("sign", "none")}

    def __init__(
        self,
        model: nn.Module,
        *,
        epsilon: float = 1.0,
        xi: float | None = None,
        steps: int = 1,
        norm: str = "l2",
        scope: str = "sample",
        weight: float = 1.0,
        divergence: Divergence = "kl",
        random_start: RandomStart = True,
        tied: str = "lookup",
        dropout: str = "same",
        **common: Any,
    ) -> None:
        refuse_tied("VAT", tied)
        self.weight = number("weight", weight)
        self.xi = by_dtype(model, common.get("probe_dtype")) if xi is None else number("xi", xi)
        if not self.xi:
            raise ValueError("xi must be above 0: at a distance of 0 the divergence has no gradient")
        if random_start is False or random_start == 0:
            raise ValueError("VAT needs a random start: at zero the divergence has no gradient")
        self.compare = Comparison(divergence, "VAT")
        super().__init__(
            model,
            epsilon=number("epsilon", epsilon),
            step_size=epsilon,
            steps=steps,
            norm=norm,
            scope=scope,
            random_start=random_start,
            dropout=dropout,
            **common,
        )

    def run(self, closure: Closure, attack: Closure | None) -> StepResult:
        """The clean pass (a look, if there are no labels), the power iterations, and the divergence at epsilon d."""
        clean = self.engine.descend_or_look(closure)
        answer = self.compare.logits(clean.output)
        target = attack or self.away_from(answer, closure)
        self.start()  # xi d, d random
        self.probe(target)
        self.climb(target)
        penalty = self.descend(self.away_from(answer, closure, self.weight * self.share)).loss
        loss = clean.loss if has_loss(clean.output) else penalty
        return StepResult(loss, penalty / (self.weight or 1), clean.output)

    def away_from(self, answer: Tensor, closure: Closure, weight: float = 1.0) -> Closure:
        """KL(f(x) || f(x + r)) by r, f(x) given."""
        return lambda: self.compare(self.compare.logits(closure()), answer, self.engine, weight)

    def target(self, closure: Closure) -> Closure:
        """The same for `perturbed`."""
        return self.away_from(self.compare.logits(self.engine.look(closure)), closure)

    def climb(self, target: Closure) -> None:
        """D <- g / |g|, K times; the last one at length epsilon."""
        direction, _ = self.norms[self.norm]
        for left in reversed(range(self.steps)):
            self.engine.level()
            self.engine.ascend(Rule(self.xi if left else self.step_size, None, direction, "none"))
            if left:
                self.probe(target)

    def plain(self, closure: Closure) -> StepResult:
        """A step that is not attacked: training on the labels, if there are any."""
        done = self.engine.plain(closure, labelled=False)
        return StepResult(done.loss, None, done.output)

    def resolve(self, random_start: RandomStart) -> Draw | None:
        """Xi d, d uniform over the sphere."""
        return resolve(random_start, self.xi, lambda radius: somewhere_at(radius, LEADING[self.scope]))


def by_dtype(model: nn.Module, probe_dtype: torch.dtype | None) -> float:
    """How far to probe, by the precision in which `model` is probed here."""
    check_module(model)
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if torch.is_autocast_enabled(device) or probe_dtype is not None or len(dtypes) != 1:
        return 1.0
    return XI.get(dtypes.pop(), 1.0)
