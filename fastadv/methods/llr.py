"""LLR, local linearity regularisation (Qin et al. 2019, https://arxiv.org/abs/1907.02610)."""

from __future__ import annotations

from functools import partial
from operator import is_
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastadv.engine.forward import NO_GRADIENT
from fastadv.engine.lookups import Masks
from fastadv.engine.outputs import losses_of
from fastadv.engine.perturb.documents import Groups
from fastadv.engine.perturb.scopes import TABLE_SCOPES
from fastadv.engine.perturb.start import RandomStart
from fastadv.engine.results import Closure, Pass, StepResult
from fastadv.engine.safety.surroundings import attention, use_attention
from fastadv.engine.step import Step
from fastadv.methods.embedding_method import EmbeddingMethod
from fastadv.methods.linear import along, check_samples
from fastadv.methods.options import EmbeddingOptions, Norm, Scope, number, one_of
from fastadv.methods.second_derivative import CustomFunctions
from fastadv.methods.smart import refuse_tied

OPTIMIZERS = ("sign", "adam")
ONCE = ("derivative for", "differentiate twice", "double back", "is not implemented", "once_differentiable")
SHARDED = (
    "LLR differentiates the model twice, and torch cannot through weights that are sharded: FSDP2 ends the process, "
    "tensor parallelism returns a wrong gradient. Train with DistributedDataParallel, or take a method that "
    "differentiates once"
)

COMPILED = "LLR differentiates the model twice, and torch.compile's backward cannot be: leave it out"
FLAT = (
    "LLR differentiates the model twice, and FSDP1 and DeepSpeed's ZeRO-3 lose gradients then: train with DDP, or "
    "shard the optimizer alone (ZeRO-1 or 2)"
)


class LLR(EmbeddingMethod):
    r"""Trains the loss to be as linear around each sample as it can be: then one gradient says all of its surroundings.

    .. math:: \gamma(\delta) = \big\lvert L(x + \delta) - L(x) - \delta \cdot g \big\rvert, \quad g = \nabla_x L(x),
        \qquad \delta^* = \arg\max_{\lVert \delta \rVert_\infty \le \epsilon} \gamma(\delta), \qquad
        \nabla = \nabla \Big( L(x) + \lambda \, \gamma(\delta^*) + \mu \, \lvert \delta^* \cdot g \rvert \Big)

    Each sample by itself, and the mean over them. Two full passes and K probes a step, and a second derivative: g is
    part of what is trained. So the model runs its attention by the plain formula (the math kernel of
    `scaled_dot_product_attention`; the others cannot be differentiated twice).

    The losses of single samples come from the output's `losses` [B], or from a loss that is a vector [B] (`reduction=
    "none"`); in packed rows (`groups=`) they are those of the documents, row after row. Where there is only their mean,
    gap and slope are those of the mean, in which samples that curve up and down cancel.

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
        optimizer: "sign" (steps by the norm's rule) or "adam", which is `direction="adam"` with the rate above.
        random_start: True: U(-epsilon, epsilon) for linf; a magnitude; or a callable `(shape, mask) -> tensor`.
        direction, ball: "l2", "sign", "max", "adam", "adamw" or "rmsprop" for a step; "l2", "linf" or None for the
            ball. Default: as `norm` says. See docs/concepts.md.
        clamp: "batch": perturbed activations stay in the range of the clean batch's; see docs/concepts.md.
        relative: epsilon, step_size and start in units of the mean norm of the embedding's rows, taken at construction.
        embedding: the module whose output is perturbed, its name, or several; None: the model's input embedding.
        process_group: not taken, since a rank has to know the loss of whole samples.
        start_step, every: attack from this step on, and each so many steps; the others are plain training.
        dropout: the "same" masks in all passes of a step (default), "fresh" ones in each, or "off".
        fused: None: the fastest backend there is; True: insist on native ops; False: eager ops.
        backward, scaler: who takes a full pass's loss (`accelerator.backward`), and a `torch.amp.GradScaler`.
        atomic: copy gradients that were there before, and put them back if the step fails.
        probe_dtype: torch.bfloat16 or torch.float16: probes run under autocast to it; None: as all passes.
        communication: "each", "last" or "keep": what FSDP2 sends between passes; see `fastadv.PGD`.

    Raises:
        TypeError, ValueError: an argument that cannot be, an embedding that cannot be found, a compiled model or one
            that FSDP2 or tensor parallelism shards, or `attack=` in a step.
        RuntimeError: `fused=True` where not every op has a native backend. In a step: a part of the model has no second
            derivative. Fused losses that torch would differentiate in silence, and wrongly, are found by comparing
            their gradients in the first step's passes, and again where the model or the closure is another.

    Examples:
        >>> import fastadv, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(12, 1))
        >>> adv = fastadv.LLR(model, epsilon=0.002)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> result = adv.backward(lambda: model(ids).square().mean())  # instead of loss.backward()
        >>> bool(result.adv_loss > 0)  # what is added to the loss
        True
    """

    _dropout = "same"
    _one_radius = True

    def __init__(
        self,
        model: nn.Module,
        *,
        epsilon: float = 0.002,
        step_size: float | None = None,
        steps: int = 3,
        norm: Norm = "linf",
        scope: Scope = "sample",
        gap_weight: float = 4.0,
        slope_weight: float = 3.0,
        stop_gradient: bool = False,
        optimizer: Literal["sign", "adam"] = "sign",
        random_start: RandomStart = True,
        tied: Literal["lookup"] = "lookup",
        **options: Unpack[EmbeddingOptions],
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
        if optimizer == "adam":
            options["direction"] = options.get("direction", "adam")
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
            **options,
        )
        self._engine.refuse(compiled=COMPILED, flat=FLAT, placed=SHARDED)
        if self._ranks is not None:
            self.close()
            raise ValueError(
                "LLR compares the loss of a whole sample with its slope, and process_group= gives a rank a part of it: "
                "use another method there"
            )
        self._tried: tuple[object, object] = None, None  # the parameters and the closure that were looked into

    def backward(
        self,
        closure: Closure,
        mask: Masks = None,
        attack: Closure | None = None,
        step: int | None = None,
        groups: Groups = None,
    ) -> StepResult:
        """As for every method; what is searched for is the gap, so that there is no `attack`."""
        if attack is not None:
            raise ValueError(
                "LLR's search maximises the gap to linearity, so that attack= has no use here: leave it out"
            )
        return super().backward(closure, mask, None, step, groups)

    def run(self, step: Step) -> StepResult:
        """The clean forward and its slope, the search for the largest gap, and one backward through all of it."""
        with TwiceDifferentiable():
            return self._run(step)

    def _run(self, step: Step) -> StepResult:
        losses = self._clean(step)
        functions = self._untried(step, losses)
        slope = self._linearised(step, losses)
        self.search(step)
        moved = step.forward(read=losses_of)
        if functions is not None:
            functions.check(moved.loss)
        linear = along(step, [delta.detach().clone() for delta in step.perturbation.leaves()], slope, losses)
        gap = (moved.loss - losses - linear).abs().mean()
        penalty = self.gap_weight * gap + self.slope_weight * linear.abs().mean()
        step.backward(losses.mean() + penalty)
        return step.result(step.first, Pass(penalty, None))

    def search(self, step: Step) -> None:
        """K steps, with a probe between each two."""
        for left in reversed(range(self.steps)):
            step.ascend(self.rule)
            if left:
                step.probe()

    def _gaps(self, step: Step, losses: Tensor, slope: list[Tensor]) -> Closure:
        """The sum of the samples' gaps by delta, L(x) and g given."""

        def gaps() -> Tensor:
            moved = losses_of(step.closure())
            deltas = step.perturbation.leaves()
            fixed = [delta.detach() for delta in deltas] if self.stop_gradient else deltas
            return (moved - losses - along(step, fixed, slope, losses)).abs().sum()

        return gaps

    def _aim(self, step: Step) -> None:
        with TwiceDifferentiable():
            self._linearised(step, self._clean(step))

    def _clean(self, step: Step) -> Tensor:
        """L(x) of each sample."""
        losses: Tensor = step.forward(read=losses_of, last=False, clean=True).loss
        check_samples(step, losses)
        return losses

    def _linearised(self, step: Step, losses: Tensor) -> list[Tensor]:
        """G as a function of the weights; ascents maximise the gap between the loss and what L(x) and g say of it."""
        slope = _slope(step, losses.sum())
        step.maximise(self._gaps(step, losses.detach(), [g.detach() for g in slope]))
        return slope

    # What has no second derivative

    def _untried(self, step: Step, losses: Tensor) -> CustomFunctions | None:
        """The functions of a model, or of a closure, that no step has looked into yet."""
        now = self._engine.inventory.parameters, getattr(step.closure, "__code__", type(step.closure))
        if all(map(is_, now, self._tried)):
            return None
        step.undo.append(partial(setattr, self, "_tried", self._tried))
        self._tried = now
        return CustomFunctions(losses)


def _slope(step: Step, loss: Tensor) -> list[Tensor]:
    """The perturbation's gradient of a waiting forward's loss, with a graph; zeros where there is none."""
    leaves = step.perturbation.leaves()
    with step.probing():
        grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    if all(grad is None for grad in grads):
        raise RuntimeError(NO_GRADIENT)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]


class TwiceDifferentiable:
    """A block with attention by the plain formula; where something else has no second derivative, its error says so."""

    def __enter__(self) -> None:
        self._found = attention()
        use_attention(math=True)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        use_attention(**self._found)
        if isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in ONCE):
            raise RuntimeError(
                f"LLR differentiates the model twice, and a part of it has no second derivative ({error}). Attention: "
                "attn_implementation='eager' or 'sdpa' in transformers; RNNs: torch.backends.cudnn.flags(enabled=False)"
            ) from error
