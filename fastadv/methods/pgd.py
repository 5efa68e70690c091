"""PGD, projected gradient descent (Madry et al. 2018, https://arxiv.org/abs/1706.06083)."""

from __future__ import annotations

from torch import nn
from typing_extensions import Unpack

from fastadv.classic import ClassicPGD, by_position, places
from fastadv.engine.perturb.start import RandomStart
from fastadv.engine.results import StepResult
from fastadv.engine.step import Step
from fastadv.methods.embedding_method import EmbeddingMethod
from fastadv.methods.options import Norm, Scope, TiedOptions, number
from fastadv.methods.radii import Radius, Size


class PGD(ClassicPGD, EmbeddingMethod):
    r"""K small steps up the gradient, each followed by a projection onto the epsilon ball.

    .. math:: r_{t+1} = \Pi_{\lVert r \rVert \le \epsilon}\big(r_t + \alpha \, g_t / \lVert g_t \rVert\big), \qquad
        \nabla = w_{clean} \nabla L(x) + w_{adv} \nabla L(x + r_K)

    Two full passes and K - 1 probes a step: a probe computes the gradient of the perturbation alone. `norm="linf"`
    steps by alpha * sign(g) and clips. The default is what the classic scripts do (norm over the whole table, so that
    the samples of a batch share one budget; r starts at zero; clean and last gradient summed). `clean_weight=0` trains
    on the adversarial pass alone (K probes, one full pass), usually with `random_start=True`.

    Perturbations are float32 (float64 for a float64 model), [B, T, D] in position scopes ("batch", "sample", "token")
    and one vector per distinct id in table scopes ("table", "row"). They live in the embedding's own units.

    `attack`, `restore`, `backup_grad` and `restore_grad` are the classic script's calls: see `fastadv.classic`.

    Args:
        model: the model to train, wrapped (DDP, torch.compile, PEFT) or not.
        *classic: `emb_name`, `epsilon` and `alpha` by position, as the classic scripts have them.
        epsilon: radius of the ball; None: no ball. One for all perturbed modules, or one for each: a sequence in the
            order of `embedding`, or a dict by name.
        step_size: length of one ascent step, alpha; one for all, or one for each.
        steps: number of ascent steps, K.
        norm: "l2" or "linf": direction and ball together.
        scope: what the norm is over: "table", "row" (per word), "batch", "sample", "token".
        random_start: False; True (magnitude epsilon); a magnitude; or a callable `(shape, mask) -> tensor`. l2 draws
            U(-1, 1) * magnitude / sqrt(length * D), linf U(-magnitude, magnitude). Masked, not projected.
        clean_weight, adv_weight: weights of the clean and the adversarial gradient.
        emb_name: the scripts' option: part of the names of the parameters that `attack` moves, and of the embedding
            that `backward` perturbs where there is no `embedding`.
        alpha: the scripts' name for step_size.
        direction, ball: "l2", "sign", "max", "adam", "adamw" or "rmsprop" for a step; "l2", "linf" or None for the
            ball. Default: as `norm` says. See docs/concepts.md.
        clamp: "batch": perturbed activations stay in the range of the clean batch's; see docs/concepts.md.
        relative: epsilon, step_size and start in units of the mean norm of the embedding's rows, taken at construction.
        embedding: the module whose output is perturbed, its name, or several; None: the model's input embedding. A name
            may hold alternatives, "layers.{8,16}.mlp"; ("layers.8", "input") perturbs what a module is given.
        process_group: the ranks that each hold a part of what a norm is over: see docs/integrations.md.
        start_step, every: attack from this step on, and each so many steps; the others are plain training.
        dropout: "fresh" masks in every pass (default), the "same" in all passes of a step, or "off".
        tied: "lookup" perturbs the lookups, not an output layer with the same weight; "both" moves the table itself
            during the step, as the classic scripts do ("table" and "row" scopes, no random start, no mask).
        attack_mode: "eval": probes run as after `model.eval()` (no dropout), full passes as the model stands, and every
            ascent follows a probe; None: all passes as the model stands.
        fused: None: the fastest backend there is; True: insist on native ops; False: eager ops.
        backward: who takes a full pass's loss: a function (`accelerator.backward`) or a `fastadv.Owner`; None:
            `loss.backward()`.
        scaler: a `torch.amp.GradScaler`, which then scales probes as well.
        atomic: keep a copy of gradients that were there before, to put back if the step fails.
        probe_dtype: torch.bfloat16 or torch.float16: probes run under autocast to it, full passes as you have them;
            None: all alike. float16 loses small gradients without a `scaler`, and where that has grown too far none is
            finite (`skipped` counts them). The masks of dropout="same" are the same in both on the CPU.
        communication: under FSDP2 "each": weights are gathered and gradients reduced in each pass, in the memory of
            plain training; "last": gradients are reduced in the last pass, and held whole until then; "keep": weights
            are held whole as well, so that a step sends no more than plain training. The gradients are the same.

    Raises:
        TypeError, ValueError: an argument that cannot be, or an embedding that cannot be found.
        RuntimeError: `fused=True` where not every op has a native backend.

    Examples:
        >>> import fastadv, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(12, 1))
        >>> adv = fastadv.PGD(model, epsilon=0.1, step_size=0.05, steps=3, scope="sample")
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> result = adv.backward(lambda: model(ids).square().mean())  # instead of loss.backward()
        >>> round(float(adv.perturbation_norm), 4)
        0.1
    """

    def __init__(
        self,
        model: nn.Module,
        *classic: str | float,
        epsilon: Radius = 1.0,
        step_size: Size = 0.3,
        steps: int = 3,
        norm: Norm = "l2",
        scope: Scope = "table",
        random_start: RandomStart = False,
        clean_weight: float = 1.0,
        adv_weight: float = 1.0,
        emb_name: str | None = None,
        alpha: float | None = None,
        **options: Unpack[TiedOptions],
    ) -> None:
        named = by_position(type(self), classic)
        epsilon, self._emb_name = named.get("epsilon", epsilon), named.get("emb_name", emb_name)
        step_size = named.get("step_size", step_size if alpha is None else alpha)
        if options.get("embedding") is None:
            self._places = places(model, self._emb_name)
        self.clean_weight = number("clean_weight", clean_weight)
        self.adv_weight = number("adv_weight", adv_weight)
        super().__init__(
            model,
            epsilon=epsilon,
            step_size=step_size,
            steps=named.get("steps", steps),
            norm=norm,
            scope=scope,
            random_start=random_start,
            **options,
        )

    def run(self, step: Step) -> StepResult:
        """The clean pass, the search that its gradient begins, and the adversarial pass."""
        clean = step.descend(self.clean_weight, last=False) if self.clean_weight else None
        self.search(step)
        return step.result(clean, step.descend(self.adv_weight))

    def search(self, step: Step) -> None:
        """K ascents, with a probe between each two."""
        for _ in range(self.steps - 1):
            step.ascend(self.rule)
            step.probe()
        step.ascend(self.rule)
