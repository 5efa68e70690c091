"""YOPO, you only propagate once (Zhang et al. 2019, https://arxiv.org/abs/1905.00877)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn
from typing_extensions import Unpack

from fastadv.engine.model.split import SplitChoice
from fastadv.engine.perturb.start import RandomStart
from fastadv.engine.results import StepResult
from fastadv.engine.step import Step
from fastadv.methods.embedding_method import EmbeddingMethod
from fastadv.methods.freelb import FreeLB
from fastadv.methods.options import EmbeddingOptions, Norm, Scope, whole


class YOPO(FreeLB):
    r"""FreeLB with n ascents between two passes, of which all but the first run the first layers alone.

    .. math:: p = \frac{\partial L}{\partial h}\Big|_{h = f_0(x + \delta)}, \qquad
        \delta \leftarrow \Pi\Big(\delta + \alpha \, d\big(\nabla_\delta \langle p, f_0(x + \delta) \rangle\big)\Big)
        \ \text{n times}, \qquad \nabla = \frac{w_{adv}}{m} \sum_{j=1}^{m} \nabla L(x + \delta_j)

    f_0 is the model up to `split`, p the gradient of its output in the last full pass, held while n ascents follow it.
    m full passes a step and (m - 1)(n - 1) partial ones: the first of n ascents needs none, since there the full pass
    has the same gradient already. A partial pass runs the closure and stops it at the split. With `inner_steps=1` and
    l2 norms this is FreeLB. `norm="linf"` steps by alpha * sign(g) and clips.

    Args:
        model: the model to train, wrapped (DDP, torch.compile, PEFT) or not.
        epsilon: radius of the ball that holds the perturbation after each step; None: no ball.
        step_size: length of one ascent step, alpha.
        steps: number of full passes, m.
        inner_steps: number of ascents after each but the last, n.
        split: the module whose output ends the partial passes, or its name; None: the first block of the model's
            longest stack of layers.
        norm: "l2" or "linf".
        scope: what the norm is over: "sample", "token", "batch", "table", "row".
        random_start: the start, as FreeLB has it. False or 0: zero.
        adv_weight: weight of the mean gradient.
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
        TypeError, ValueError: an argument that cannot be, an embedding or a split that cannot be found.
        RuntimeError: `fused=True` where not every op has a native backend. In a step: the split never ran, the loss
            does not depend on its output, or its output does not depend on the embedding.

    Examples:
        >>> import fastadv, torch
        >>> first, rest = torch.nn.Linear(4, 4), torch.nn.Linear(12, 1)
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), first, torch.nn.Tanh(), torch.nn.Flatten(), rest)
        >>> adv = fastadv.YOPO(model, epsilon=0.1, step_size=0.02, random_start=0.03, split=first)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> result = adv.backward(lambda: model(ids).square().mean())  # instead of loss.backward()
        >>> bool(result.adv_loss > result.loss)
        True
    """

    _norms: ClassVar[dict[str, tuple[str, str]]] = EmbeddingMethod._norms  # linf: the sign; FreeLB: by the largest

    _dropout = "same"

    def __init__(
        self,
        model: nn.Module,
        *,
        epsilon: float | None = None,
        step_size: float = 0.1,
        steps: int = 3,
        inner_steps: int = 3,
        split: SplitChoice = None,
        norm: Norm = "l2",
        scope: Scope = "sample",
        random_start: RandomStart = 0.1,
        adv_weight: float = 1.0,
        tied: Literal["lookup"] = "lookup",
        **options: Unpack[EmbeddingOptions],
    ) -> None:
        self.inner_steps = whole("inner_steps", inner_steps, 1)
        super().__init__(
            model,
            epsilon=epsilon,
            step_size=step_size,
            steps=steps,
            norm=norm,
            scope=scope,
            random_start=random_start,
            adv_weight=adv_weight,
            tied=tied,
            **options,
        )
        self._engine.split_at(split)

    def run(self, step: Step) -> StepResult:
        """M full passes. Between two, n ascents: the first up the full pass's gradient, the others up partial ones."""
        step.start()
        passes = []
        for left in reversed(range(self.steps)):
            passes.append(step.descend(self.adv_weight / self.steps, last=left == 0))
            for inner in range(self.inner_steps if left else 0):
                if inner:
                    step.partial()
                step.ascend(self.rule)
        return self._mean(passes)

    def search(self, step: Step) -> None:
        """The ascents of a step, each n of them after a probe."""
        step.start()
        for _ in range(self.steps - 1):
            step.probe()
            for inner in range(self.inner_steps):
                if inner:
                    step.partial()
                step.ascend(self.rule)
