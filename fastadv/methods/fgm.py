"""FGM, the fast gradient method (Miyato et al. 2017, https://arxiv.org/abs/1605.07725)."""

from __future__ import annotations

from torch import nn
from typing_extensions import Unpack

from fastadv.classic import ClassicFGM, by_position, places
from fastadv.engine.perturb.start import RandomStart
from fastadv.engine.results import StepResult
from fastadv.engine.step import Step
from fastadv.methods.embedding_method import EmbeddingMethod
from fastadv.methods.options import Norm, Scope, TiedOptions, number
from fastadv.methods.radii import Size


class FGM(ClassicFGM, EmbeddingMethod):
    r"""One step of length `epsilon` up the gradient, and training on what is found there.

    .. math:: r = \epsilon \, g / \lVert g \rVert, \qquad
        \nabla = w_{clean} \nabla L(x) + w_{adv} \nabla L(x + r)

    Two full passes a step. `norm="linf"` takes r = epsilon * sign(g). The default is what the classic scripts do: the
    norm is over the whole table, so all samples of a batch share one budget, and both gradients are summed. With
    `scope="sample", clean_weight=0` it is the paper's adversarial loss by itself.

    `attack` and `restore` are the classic script's calls: see `fastadv.classic`.

    Args:
        model: the model to train, wrapped (DDP, torch.compile, PEFT) or not.
        *classic: `emb_name` and `epsilon` by position, in either order, as the classic scripts have them.
        epsilon: length of the perturbation; in the embedding's own units. One for all perturbed modules, or one for
            each: a sequence in the order of `embedding`, or a dict by name.
        norm: "l2" or "linf".
        scope: what the norm is over: "table", "row" (per word), "batch", "sample", "token".
        random_start: begin elsewhere than at zero, as in `fastadv.PGD`; then epsilon is also the radius of the ball.
        clean_weight, adv_weight: weights of the clean and the adversarial gradient.
        emb_name: the scripts' option: part of the names of the parameters that `attack` moves, and of the embedding
            that `backward` perturbs where there is no `embedding`.
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
        >>> adv = fastadv.FGM(model, epsilon=0.1, scope="sample")
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> result = adv.backward(lambda: model(ids).square().mean())  # instead of loss.backward()
        >>> bool(result.adv_loss > result.loss)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *classic: str | float,
        epsilon: Size = 1.0,
        norm: Norm = "l2",
        scope: Scope = "table",
        random_start: RandomStart = False,
        clean_weight: float = 1.0,
        adv_weight: float = 1.0,
        emb_name: str | None = None,
        **options: Unpack[TiedOptions],
    ) -> None:
        named = by_position(type(self), classic)
        epsilon, self._emb_name = named.get("epsilon", epsilon), named.get("emb_name", emb_name)
        if epsilon is None:
            raise ValueError("FGM's step has length epsilon: it cannot be None")
        if options.get("embedding") is None:
            self._places = places(model, self._emb_name)
        self.clean_weight = number("clean_weight", clean_weight)
        self.adv_weight = number("adv_weight", adv_weight)
        super().__init__(
            model,
            epsilon=epsilon,
            step_size=epsilon,
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
        """The one ascent: r = epsilon g / |g|."""
        step.ascend(self.rule)
