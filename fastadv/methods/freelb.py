"""FreeLB, free large-batch adversarial training (Zhu et al. 2020, https://arxiv.org/abs/1909.11764)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from typing_extensions import Unpack

from fastadv.engine.perturb.start import RandomStart
from fastadv.engine.results import Pass, StepResult
from fastadv.engine.step import Step
from fastadv.methods.embedding_method import EmbeddingMethod
from fastadv.methods.options import Norm, Scope, TiedOptions, number
from fastadv.methods.radii import Radius, Size


class FreeLB(EmbeddingMethod):
    r"""K passes up the loss, and the mean of all their gradients: a batch K times as large, for one of its size.

    .. math:: \delta_{t+1} = \Pi\big(\delta_t + \alpha \, g_t / \lVert g_t \rVert\big), \qquad
        \nabla = \frac{w_{adv}}{K} \sum_{t=0}^{K-1} \nabla L(x + \delta_t)

    K full passes and K - 1 ascents a step: the gradient that trains is also the one that the perturbation follows.
    There is no clean pass, unless the start is zero, which makes the first pass one. `norm="linf"` steps by
    alpha * g / max|g| (not the sign) and clips, each per sample.

    Perturbations are float32 (float64 for a float64 model), [B, T, D], in the embedding's own units.

    Args:
        model: the model to train, wrapped (DDP, torch.compile, PEFT) or not.
        epsilon: radius of the ball that holds the perturbation after each step; None: no ball. One for all perturbed
            modules, or one for each: a sequence in the order of `embedding`, or a dict by name.
        step_size: length of one ascent step, alpha (the public code's `adv_lr`); one for all, or one for each.
        steps: number of passes, K (`adv_steps` of the code for transformers; one more than that of fairseq's).
        norm: "l2" or "linf".
        scope: what the norm is over: "sample", "token", "batch", "table", "row".
        random_start: the start (`adv_init_mag`): a magnitude, of which l2 draws U(-1, 1) * magnitude / sqrt(length * D)
            with each sample's true length, and linf U(-magnitude, magnitude); masked, not projected. False or 0: zero.
        adv_weight: weight of the mean gradient.
        direction, ball: "l2", "sign", "max", "adam", "adamw" or "rmsprop" for a step; "l2", "linf" or None for the
            ball. Default: as `norm` says. See docs/concepts.md.
        clamp: "batch": perturbed activations stay in the range of the clean batch's; see docs/concepts.md.
        relative: epsilon, step_size and start in units of the mean norm of the embedding's rows, taken at construction.
        embedding: the module whose output is perturbed, its name, or several; None: the model's input embedding. A name
            may hold alternatives, "layers.{8,16}.mlp"; ("layers.8", "input") perturbs what a module is given.
        process_group: the ranks that each hold a part of what a norm is over: see docs/integrations.md.
        tied: "lookup" perturbs the lookups alone; "both" moves the table itself, and a tied output layer with it.
        attack_mode: "eval": probes run as after `model.eval()` (no dropout), full passes as the model stands, and every
            ascent follows a probe; None: all passes as the model stands.
        start_step, every: attack from this step on, and each so many steps; the others are plain training.
        dropout: the "same" masks in all passes of a step (default, as in the paper), "fresh" ones in each, or "off".
        fused: None: the fastest backend there is; True: insist on native ops; False: eager ops.
        backward, scaler: who takes a full pass's loss (`accelerator.backward`), and a `torch.amp.GradScaler`.
        atomic: copy gradients that were there before, and put them back if the step fails.
        probe_dtype: torch.bfloat16 or torch.float16: probes run under autocast to it; None: as all passes.
        communication: "each", "last" or "keep": what FSDP2 sends between passes; see `fastadv.PGD`.

    Raises:
        TypeError, ValueError: an argument that cannot be, or an embedding that cannot be found.
        RuntimeError: `fused=True` where not every op has a native backend.

    Examples:
        >>> import fastadv, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(12, 1))
        >>> adv = fastadv.FreeLB(model, epsilon=0.1, step_size=0.05, random_start=0.05)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> result = adv.backward(lambda: model(ids).square().mean())  # instead of loss.backward()
        >>> bool(result.adv_loss > result.loss)  # the last pass's loss, the mean over the three
        True
    """

    _norms: ClassVar[dict[str, tuple[str, str]]] = {"l2": ("l2", "l2"), "linf": ("max", "linf")}

    _dropout = "same"

    def __init__(
        self,
        model: nn.Module,
        *,
        epsilon: Radius = None,
        step_size: Size = 0.1,
        steps: int = 3,
        norm: Norm = "l2",
        scope: Scope = "sample",
        random_start: RandomStart = 0.1,
        adv_weight: float = 1.0,
        **options: Unpack[TiedOptions],
    ) -> None:
        self.adv_weight = number("adv_weight", adv_weight)
        super().__init__(
            model,
            epsilon=epsilon,
            step_size=step_size,
            steps=steps,
            norm=norm,
            scope=scope,
            random_start=random_start,
            **options,
        )

    def run(self, step: Step) -> StepResult:
        """K passes, with an ascent between each two; every gradient is kept."""
        step.start()
        passes = []
        for left in reversed(range(self.steps)):
            passes.append(step.descend(self.adv_weight / self.steps, last=left == 0))
            if left:
                step.ascend(self.rule)
        return self._mean(passes)

    def search(self, step: Step) -> None:
        """The ascents of a step, with a probe between each two."""
        step.start()
        for _ in range(self.steps - 1):
            step.probe()
            step.ascend(self.rule)

    def _mean(self, passes: list[Pass]) -> StepResult:
        """The first loss where it is the clean one, else the mean."""
        clean = passes[0].loss if self._start is None else torch.stack([one.loss for one in passes]).mean()
        return StepResult(clean, passes[-1].loss, passes[0].output)
