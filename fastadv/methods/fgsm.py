"""FGSM, the fast gradient sign method (Goodfellow et al. 2015, https://arxiv.org/abs/1412.6572)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn
from typing_extensions import Unpack

from fastadv.engine.perturb.start import RandomStart
from fastadv.engine.results import StepResult
from fastadv.engine.step import Step
from fastadv.methods.embedding_method import EmbeddingMethod
from fastadv.methods.options import Scope, TiedOptions, number


class FGSM(EmbeddingMethod):
    r"""One step up the sign of the gradient, and training on what is found there.

    .. math:: \delta = \Pi_{|\delta_i| \le \epsilon}\big(\delta_0 + \alpha \, \mathrm{sign}(g)\big), \qquad
        \nabla = w_{clean} \nabla L(x) + w_{adv} \nabla L(x + \delta)

    Two full passes a step. Every element of the perturbation moves alike, whatever its gradient's size: an l2 ball that
    holds it has the radius epsilon * sqrt(length * D). With `random_start=True, clean_weight=0` it is FGSM-RS (Wong et
    al. 2020, https://arxiv.org/abs/2001.03994): a start in U(-epsilon, epsilon), a step of 1.25 epsilon, and training
    on the adversarial loss alone (1 probe, 1 full pass).

    Perturbations are float32 (float64 for a float64 model), [B, T, D], in the embedding's own units.

    Args:
        model: the model to train, wrapped (DDP, torch.compile, PEFT) or not.
        epsilon: the largest element of the perturbation. The default is the one that the sweep in docs/training.md
            found to help.
        step_size: length of the step, alpha; None: epsilon, or 1.25 epsilon with a random start.
        norm: "linf"; the l2 twin of this method is `fastadv.FGM`.
        scope: where the perturbation is: "sample", "token" or "batch" (one vector per position), "table" or "row" (one
            per distinct token id). A step along the sign has no norm, so nothing else depends on it.
        random_start: begin elsewhere than at zero. See `fastadv.PGD`.
        clean_weight, adv_weight: weights of the clean and the adversarial gradient.
        direction, ball: "l2", "sign", "max", "adam", "adamw" or "rmsprop" for a step; "l2", "linf" or None for the
            ball. Default: as `norm` says. See docs/concepts.md.
        clamp: "batch": perturbed activations stay in the range of the clean batch's; see docs/concepts.md.
        relative: epsilon, step_size and start in units of the mean norm of the embedding's rows, taken at construction.
        embedding: the module whose output is perturbed, its name, or several; None: the model's input embedding.
        process_group: the ranks that each hold a part of what a norm is over: see docs/integrations.md.
        tied: "lookup" perturbs the lookups alone; "both" moves the table itself, and a tied output layer with it.
        attack_mode: "eval": probes run as after `model.eval()` (no dropout), full passes as the model stands, and every
            ascent follows a probe; None: all passes as the model stands.
        start_step, every: attack from this step on, and each so many steps; the others are plain training.
        dropout: "fresh" masks in every pass (default), the "same" in all passes of a step, or "off".
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
        >>> adv = fastadv.FGSM(model, epsilon=0.002)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> result = adv.backward(lambda: model(ids).square().mean())  # instead of loss.backward()
        >>> round(float(adv.perturbation_norm), 4)
        0.002
    """

    _norms: ClassVar[dict[str, tuple[str, str]]] = {"linf": ("sign", "linf")}

    def __init__(
        self,
        model: nn.Module,
        *,
        epsilon: float = 0.002,
        step_size: float | None = None,
        norm: Literal["linf"] = "linf",
        scope: Scope = "sample",
        random_start: RandomStart = False,
        clean_weight: float = 1.0,
        adv_weight: float = 1.0,
        **options: Unpack[TiedOptions],
    ) -> None:
        if epsilon is None:
            raise ValueError("FGSM's step has length epsilon: it cannot be None")
        self.clean_weight = number("clean_weight", clean_weight)
        self.adv_weight = number("adv_weight", adv_weight)
        if step_size is None:
            step_size = number("epsilon", epsilon) * (1.25 if random_start else 1.0)
        super().__init__(
            model,
            epsilon=epsilon,
            step_size=step_size,
            steps=1,
            norm=norm,
            scope=scope,
            random_start=random_start,
            **options,
        )

    def run(self, step: Step) -> StepResult:
        """The clean pass, the ascent up its gradient, and the adversarial pass."""
        clean = step.descend(self.clean_weight, last=False) if self.clean_weight else None
        self.search(step)
        return step.result(clean, step.descend(self.adv_weight))

    def search(self, step: Step) -> None:
        """The one ascent: delta = start + alpha sign(g), then clipped."""
        step.ascend(self.rule)
