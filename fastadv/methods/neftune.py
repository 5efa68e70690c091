"""NEFTune, noisy embedding fine-tuning (Jain et al. 2024, https://arxiv.org/abs/2310.05914)."""

from __future__ import annotations

from torch import nn
from typing_extensions import Unpack

from fastadv.engine.lookups import Masks
from fastadv.engine.perturb.documents import Groups
from fastadv.engine.perturb.scopes import TABLE_SCOPES
from fastadv.engine.perturb.start import Draw, RandomStart, resolve, uniform_l2
from fastadv.engine.results import Closure, StepResult
from fastadv.engine.step import Step
from fastadv.methods.embedding_method import EmbeddingMethod
from fastadv.methods.options import NoiseOptions, Scope, number


class NEFTune(EmbeddingMethod):
    r"""Training on embeddings with uniform noise, whose size falls with the length of the sentence. No ascent.

    .. math:: \delta_i \sim U(-1, 1)^{L_i \times D} \cdot \frac{\alpha}{\sqrt{L_i D}}, \qquad
        \nabla = \nabla L(x + \delta)

    One full pass a step: what plain training costs. L_i is the true length of sentence i, and padding carries no noise,
    as in the authors' training code. `padded=True` is what their README and transformers' `neftune_noise_alpha` do:
    noise everywhere, and L the padded length, so that a sentence's noise depends on its neighbours in the batch.

    Noise is float32 (float64 for a float64 model), [B, T, D], in the embedding's own units.

    Args:
        model: the model to train, wrapped (DDP, torch.compile, PEFT) or not.
        alpha: the noise's size; its norm is about alpha / sqrt(3) per sentence.
        padded: noise on padding too, by the padded length.
        scope: over what `perturbation_norm` is taken: "sample", "token", "batch".
        random_start: a callable `(shape, mask) -> tensor` in place of the noise; None: as above.
        relative: alpha in units of the mean norm of the embedding's rows, taken at construction.
        embedding: the module whose output is perturbed, its name, or several; None: the model's input embedding.
        process_group: the ranks that each hold a part of what a norm is over: see docs/integrations.md.
        start_step, every: attack from this step on, and each so many steps; the others are plain training.
        dropout: "fresh" masks, or "off".
        fused: None: the fastest backend there is; True: insist on native ops; False: eager ops.
        backward, scaler: who takes a full pass's loss (`accelerator.backward`), and a `torch.amp.GradScaler`.
        atomic: copy gradients that were there before, and put them back if the step fails.
        probe_dtype: torch.bfloat16 or torch.float16: probes run under autocast to it; None: as all passes.
        communication: "each", "last" or "keep": what FSDP2 sends between passes; see `fastadv.PGD`.

    Raises:
        TypeError, ValueError: an argument that cannot be, an embedding that cannot be found, or `attack=` in a step.
        RuntimeError: `fused=True` where not every op has a native backend.

    Examples:
        >>> import fastadv, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(12, 1))
        >>> adv = fastadv.NEFTune(model, alpha=5.0)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> result = adv.backward(lambda: model(ids).square().mean())  # instead of loss.backward()
        >>> bool(adv.perturbation_norm < 5.0)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float = 5.0,
        padded: bool = False,
        scope: Scope = "sample",
        random_start: RandomStart | None = None,
        **options: Unpack[NoiseOptions],
    ) -> None:
        self.alpha = number("alpha", alpha)
        self.padded = bool(padded)
        self._places = {"ignore_padding": self.padded}
        if scope in TABLE_SCOPES:
            raise ValueError(f"NEFTune's noise is each position's own: use scope='sample', not {scope!r}")
        super().__init__(
            model,
            epsilon=None,
            step_size=0.0,
            steps=1,
            norm="l2",
            scope=scope,
            random_start=self.alpha if random_start is None else random_start,
            **options,
        )

    def backward(
        self,
        closure: Closure,
        mask: Masks = None,
        attack: Closure | None = None,
        step: int | None = None,
        groups: Groups = None,
    ) -> StepResult:
        """As for every method; there is no ascent that `attack` could direct."""
        if attack is not None:
            raise ValueError("NEFTune ascends nothing, so that attack= has no use here: leave it out")
        return super().backward(closure, None if self.padded else mask, None, step, None if self.padded else groups)

    def run(self, step: Step) -> StepResult:
        """One pass, noisy."""
        step.start()
        return step.result(None, step.descend())

    def search(self, step: Step) -> None:
        """Noise stays where it was drawn."""
        step.start()

    def _resolve(self, random_start: RandomStart) -> Draw | None:
        return resolve(random_start, None, lambda alpha: uniform_l2(alpha * self._unit, self._lengths), by_sample=True)
