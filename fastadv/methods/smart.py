"""SMART, smoothness-inducing adversarial regularisation (Jiang et al. 2020, https://arxiv.org/abs/1911.03437)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastadv.engine.perturb.start import Draw, RandomStart, normal, resolve
from fastadv.engine.results import Closure, Pass, StepResult
from fastadv.engine.step import Step
from fastadv.methods.comparison import Comparison, Divergence
from fastadv.methods.embedding_method import EmbeddingMethod
from fastadv.methods.options import EmbeddingOptions, Norm, Scope, number, one_of
from fastadv.ops.divergence import BERNOULLI, two_classes

UPDATES = ("paper", "mt-dnn")
STEP, DEVIATION, GUARD = 1e-3, 1e-5, 1e-6  # of the public code


class SMART(EmbeddingMethod):
    r"""The loss, and a penalty on how far a perturbation can move the model's answer.

    .. math:: \nabla = \nabla L(x) + w \, \nabla D\big(f(x + \delta_K), f(x)\big), \qquad
        \delta_{t+1} = \Pi_{\lVert \delta \rVert_\infty \le \epsilon}
        \Big(\delta_t + \alpha \frac{g_t}{\lVert g_t \rVert_\infty}\Big), \quad
        g_t = \nabla_\delta D\big(f(x + \delta_t), f(x)\big), \quad \delta_0 \sim N(0, \epsilon^2 / 100)

    Two full passes and K probes a step; the ball and the norms are each token's own. D is the symmetric KL divergence
    of the two answers for classification (summed over the labels, where a text may have several) and the squared error
    for regression, and both of its sides are trained. The gradient at zero is zero, so the ascent needs its random
    start. The other half of the paper is `fastadv.BregmanProximal`.

    `update="mt-dnn"` reproduces the authors' public code: delta <- (delta + 0.001 g) / largest, with noise of 1e-5 and
    a stand-in for the KL divergence in the search. Its step adds some 1e-6 to noise that is then brought to length one,
    so that the perturbation is random, and not adversarial.

    Perturbations are float32 (float64 for a float64 model), [B, T, D], in the embedding's own units. The closure
    returns an output with logits [B, C] or, for tokens, [B, T, C], of which those count that the mask has.

    Args:
        model: the model to train, wrapped (DDP, torch.compile, PEFT) or not.
        epsilon: radius of the ball; not used by "mt-dnn", whose perturbation has length one.
        step_size: length of one ascent step, alpha; None: epsilon ("mt-dnn": 0.001 of the gradient).
        steps: number of ascent steps, K.
        norm: "linf" (steps by g / max|g|, then clips) or "l2".
        scope: what the norm is over: "token", "sample", "batch", "row", "table".
        weight: of the penalty, w.
        divergence: "symmetric_kl", "kl" (from the clean answer), "js", "mse" for regression, "symmetric_bernoulli" or
            "bernoulli" for several labels at once, or a callable `(perturbed_logits, clean_logits) -> 0-d tensor`.
            None: by the model's `config.problem_type`: "symmetric_bernoulli", "mse", or else "symmetric_kl".
        search: what the ascent maximises where that is not `divergence`; the clean logits are detached there.
        update: "paper" or "mt-dnn".
        random_start: True: normal with a tenth of epsilon ("mt-dnn": 1e-5) as standard deviation; that deviation; or a
            callable `(shape, mask) -> tensor`.
        direction, ball: "l2", "sign", "max", "adam", "adamw" or "rmsprop" for a step; "l2", "linf" or None for the
            ball. Default: as `norm` says. See docs/concepts.md.
        clamp: "batch": perturbed activations stay in the range of the clean batch's; see docs/concepts.md.
        relative: epsilon, step_size and start in units of the mean norm of the embedding's rows, taken at construction.
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
        >>> adv = fastadv.SMART(model, epsilon=0.005)
        >>> ids, labels = torch.tensor([[1, 2, 3]]), torch.tensor([1])
        >>> def closure():
        ...     logits = model(ids)
        ...     return torch.nn.functional.cross_entropy(logits, labels), logits
        >>> result = adv.backward(closure)  # instead of loss.backward(); result.adv_loss is the divergence
        >>> bool(result.adv_loss > 0)
        True
    """

    _norms: ClassVar[dict[str, tuple[str, str]]] = {"linf": ("max", "linf"), "l2": ("l2", "l2")}

    _dropout = "same"
    _one_radius = True

    def __init__(
        self,
        model: nn.Module,
        *,
        epsilon: float = 0.005,
        step_size: float | None = None,
        steps: int = 1,
        norm: Norm = "linf",
        scope: Scope = "token",
        weight: float = 1.0,
        divergence: Divergence | None = None,
        search: Divergence | None = None,
        update: Literal["paper", "mt-dnn"] = "paper",
        random_start: RandomStart = True,
        tied: Literal["lookup"] = "lookup",
        **options: Unpack[EmbeddingOptions],
    ) -> None:
        refuse_tied("SMART", tied)
        one_of("update", update, UPDATES)
        self.update = update
        self.weight = number("weight", weight)
        self.compare = Comparison(divergence, "SMART", model)
        if search is not None or update == "mt-dnn":
            self.search_by = Comparison(search or self._stand_in, "SMART", model, option="search")
        else:
            self.search_by = self.compare
        if update == "mt-dnn":
            epsilon, step_size = 1.0, STEP if step_size is None else step_size
        super().__init__(
            model,
            epsilon=number("epsilon", epsilon),
            step_size=epsilon if step_size is None else step_size,
            steps=steps,
            norm=norm,
            scope=scope,
            random_start=random_start,
            **options,
        )

    def run(self, step: Step) -> StepResult:
        """The clean forward, the search away from its answer, and one backward through both."""
        clean = step.forward(last=False, clean=True)  # L(x) and f(x), whose graph waits
        answer = self.compare.logits(clean.output)
        step.maximise(self._distance(step, answer.detach()))
        self.search(step)
        moved = self.compare.logits(step.forward().output)
        penalty = self.compare(moved, answer, step, self.weight * step.share)
        step.backward(clean.loss + penalty)
        return step.result(step.first, Pass(penalty / (self.weight or 1), None))

    def search(self, step: Step) -> None:
        """K steps, with a probe between each two."""
        for left in reversed(range(self.steps)):
            if self.update == "paper":
                step.ascend(self.rule)
            else:
                step.move(self._renormalised)
            if left:
                step.probe()

    def _distance(self, step: Step, answer: Tensor) -> Closure:
        """D(f(x + delta), f(x)) by delta: what the ascent maximises."""
        return lambda: self.search_by(self.search_by.logits(step.closure()), answer, step)

    def _stand_in(self, logits: Tensor, target: Tensor) -> Tensor:
        """What mt-dnn's search maximises in the place of its divergence."""
        if self.compare.kind == "mse":
            return squared_error(logits, target)
        if self.compare.kind in BERNOULLI:
            logits, target = two_classes(logits), two_classes(target)
        return stable_kl(logits, target)

    def _aim(self, step: Step) -> None:
        step.maximise(self._distance(step, self.compare.logits(step.look())))

    def _renormalised(self, index: int, delta: Tensor, grad: Tensor) -> Tensor:  # noqa: ARG002
        """The public code's step: the sum is brought to length one, per token."""
        if self._engine.owner.scaler is not None:
            raise ValueError("update='mt-dnn' steps by the gradient's size, which a GradScaler changes: use 'paper'")
        moved: Tensor = delta + self.step_size * grad
        size = moved.abs().amax(-1, keepdim=True) if self._kind == "linf" else moved.norm(dim=-1, keepdim=True)
        return moved / (size + GUARD)

    def _resolve(self, random_start: RandomStart) -> Draw | None:
        deviation = DEVIATION if self.update == "mt-dnn" else (self.epsilon or 0.0) / 10
        return resolve(random_start, deviation, lambda size: normal(size * self._unit))


def stable_kl(logits: Tensor, target: Tensor) -> Tensor:
    """mt-dnn's stand-in for the KL divergence in the search: 2 sum p (logit p - logit q), p's logits held fixed."""
    p, q = (x.float().log_softmax(-1).exp() for x in (logits, target))
    odds_p, odds_q = (-torch.log(1 / (x + GUARD) - 1 + GUARD).detach() for x in (p, q))
    return (p * (odds_p - odds_q) * 2).sum()


def squared_error(logits: Tensor, target: Tensor) -> Tensor:
    """mt-dnn's search for regression: a sum, where the penalty is a mean."""
    return (logits - target).square().sum()


def refuse_tied(who: str, tied: str) -> None:
    """Raises ValueError for `tied="both"`: the weights would move under the graph of the clean pass."""
    one_of("tied", tied, ("lookup", "both"))
    if tied != "lookup":
        raise ValueError(
            f"{who} goes back through its clean pass after the attack, and tied={tied!r} moves the weights that pass "
            "was computed with: use tied='lookup', which perturbs the lookups alone"
        )
