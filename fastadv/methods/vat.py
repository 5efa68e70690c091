"""VAT, virtual adversarial training (Miyato et al. 2019, https://arxiv.org/abs/1704.03976)."""

from __future__ import annotations

import functools
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastadv.engine.outputs import has_loss, loss_if_any
from fastadv.engine.perturb.rule import Rule
from fastadv.engine.perturb.start import Draw, RandomStart, resolve, somewhere_at
from fastadv.engine.results import Closure, StepResult
from fastadv.engine.step import Step
from fastadv.methods.comparison import Comparison, Divergence
from fastadv.methods.embedding_method import EmbeddingMethod
from fastadv.methods.options import EmbeddingOptions, Norm, Scope, check_module, number
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
        divergence: "kl", "symmetric_kl", "js", "mse" for regression, "bernoulli" or "symmetric_bernoulli" for several
            labels at once, or a callable `(perturbed_logits, clean_logits) -> 0-d tensor`. None: by the model's
            `config.problem_type`: "bernoulli", "mse", or else "kl".
        random_start: True: a uniformly random direction of length xi; such a length; or a callable
            `(shape, mask) -> tensor`.
        direction, ball: "l2", "sign" or "max" for a step; "l2", "linf" or None for the ball. Default: as `norm` says.
        clamp: "batch": perturbed activations stay in the range of the clean batch's; see docs/concepts.md.
        relative: epsilon, xi and start in units of the mean norm of the embedding's rows, taken at construction.
        embedding: the module whose output is perturbed, its name, or several; None: the model's input embedding.
        process_group: the ranks that each hold a part of what a norm is over: see docs/integrations.md.
        start_step, every: attack from this step on, and each so many steps; the others are plain training.
        dropout: the "same" masks in all passes of a step (default), "fresh" ones in each, or "off".
        fused: None: the fastest backend there is; True: insist on native ops; False: eager ops.
        backward, scaler: who takes a full pass's loss (`accelerator.backward`), and a `torch.amp.GradScaler`.
        atomic: copy gradients that were there before, and put them back if the step fails.
        probe_dtype: torch.bfloat16 or torch.float16: probes run under autocast to it; None: as all passes.
        communication: "each", "last" or "keep": what FSDP2 sends between passes; see `fastadv.PGD`.

    Raises:
        TypeError, ValueError: an argument that cannot be, or an embedding that cannot be found. In a step: the closure
            returned no logits, or those of one class where distributions are compared.
        RuntimeError: `fused=True` where not every op has a native backend.

    Examples:
        >>> import fastadv, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> adv = fastadv.VAT(model, epsilon=0.3)
        >>> ids = torch.tensor([[1, 2, 3]])  # without a label
        >>> result = adv.backward(lambda: {"logits": model(ids)})  # instead of loss.backward()
        >>> bool(result.adv_loss > 0), round(float(adv.perturbation_norm), 4)
        (True, 0.3)
    """

    _norms: ClassVar[dict[str, tuple[str, str]]] = {"l2": ("l2", "none"), "linf": ("sign", "none")}

    _no_moments = "is no direction of a power iteration, which starts anew with each step: use 'l2', 'sign' or 'max'"

    _dropout = "same"
    _one_radius = True
    _takes_unlabelled = True

    def __init__(
        self,
        model: nn.Module,
        *,
        epsilon: float = 1.0,
        xi: float | None = None,
        steps: int = 1,
        norm: Norm = "l2",
        scope: Scope = "sample",
        weight: float = 1.0,
        divergence: Divergence | None = None,
        random_start: RandomStart = True,
        tied: Literal["lookup"] = "lookup",
        **options: Unpack[EmbeddingOptions],
    ) -> None:
        refuse_tied("VAT", tied)
        self.weight = number("weight", weight)
        self.xi = by_dtype(model, options.get("probe_dtype")) if xi is None else number("xi", xi)
        if not self.xi:
            raise ValueError("xi must be above 0: at a distance of 0 the divergence has no gradient")
        if random_start is False or random_start == 0:
            raise ValueError("VAT needs a random start: at zero the divergence has no gradient")
        self.compare = Comparison(divergence, "VAT", model, "kl")
        super().__init__(
            model,
            epsilon=number("epsilon", epsilon),
            step_size=epsilon,
            steps=steps,
            norm=norm,
            scope=scope,
            random_start=random_start,
            **options,
        )

    def run(self, step: Step) -> StepResult:
        """The clean pass (a forward, if there are no labels), the power iterations, and the divergence at epsilon d."""
        clean = step.descend(read=loss_if_any, last=False, clean=True)
        answer = self.compare.logits(clean.output)
        step.maximise(self._distance(step, answer))
        self.search(step)
        penalty = step.descend(closure=self._distance(step, answer, self.weight * step.share)).loss
        loss = clean.loss if has_loss(clean.output) else penalty
        return StepResult(loss, penalty / (self.weight or 1), clean.output)

    def search(self, step: Step) -> None:
        """From xi d, d random: d <- g / |g|, K times; the last one at length epsilon."""
        step.start()
        step.probe()
        for left in reversed(range(self.steps)):
            step.perturbation.zero_()
            step.ascend(Rule(self.xi * self._unit, None, self._direction, "none") if left else self.rule)
            if left:
                step.probe()

    def _distance(self, step: Step, answer: Tensor, weight: float | Tensor = 1.0) -> Closure:
        """KL(f(x) || f(x + r)) by r, f(x) given."""
        return lambda: self.compare(self.compare.logits(step.closure()), answer, step, weight)

    def _aim(self, step: Step) -> None:
        step.maximise(self._distance(step, self.compare.logits(step.look())))

    def _plain(self, step: Step) -> StepResult:
        """A step that is not attacked: training on the labels, if there are any."""
        done = step.plain(loss_if_any)
        return StepResult(done.loss, None, done.output)

    def _check_lengths(self) -> None:
        """A start on the sphere has the length of what its norm is over, and needs no sample's."""

    def _resolve(self, random_start: RandomStart) -> Draw | None:
        """Xi d, d uniform over the sphere."""
        leading = LEADING[self.scope]
        total = None if self.scope == "token" else self._lengths
        drawn = functools.partial(somewhere_at, leading=leading, total=total)
        by_sample = self.scope != "token"
        return resolve(random_start, self.xi, lambda radius: drawn(radius * self._unit), by_sample=by_sample)


def by_dtype(model: nn.Module, probe_dtype: torch.dtype | None) -> float:
    """How far to probe, by the precision in which `model` is probed here."""
    check_module(model)
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if torch.is_autocast_enabled(device) or probe_dtype is not None or len(dtypes) != 1:
        return 1.0
    return XI.get(dtypes.pop(), 1.0)
