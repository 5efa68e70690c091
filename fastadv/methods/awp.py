"""AWP, adversarial weight perturbation (Wu et al. 2020, https://arxiv.org/abs/2004.05884)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastadv.engine.lookups import Masks
from fastadv.engine.model.find import library_of
from fastadv.engine.model.placed import is_placed
from fastadv.engine.perturb.documents import Groups
from fastadv.engine.results import Closure, StepResult
from fastadv.engine.safety.interrupts import Block
from fastadv.engine.step import Step
from fastadv.methods.awp_weights import MovedWeights
from fastadv.methods.base import Method
from fastadv.methods.options import StepOptions, number, whole

SHARDED = "AWP moves each weight as a whole, and FSDP or DeepSpeed's ZeRO-3 shards them: train with DDP, or without"
PLACED = (
    "AWP moves each weight as a whole, and a rank has a part of {name}, which tensor parallelism has placed on a mesh: "
    "choose weights that are whole, parameters=lambda name, p: ..., or train with DDP"
)

Choice = Callable[[str, nn.Parameter], bool]


def matrices(name: str, parameter: nn.Parameter) -> bool:  # noqa: ARG001
    """Every weight with two dimensions or more: no biases, no layer norms."""
    return parameter.dim() > 1


class AWP(Method):
    r"""Moves the weights, not the embeddings, up the loss, and adds the gradient that is found there.

    .. math:: v_l = \gamma \, \lVert w_l \rVert \frac{g_l}{\lVert g_l \rVert} \ \text{for every weight } l, \qquad
        \nabla = w_{clean} \nabla L(w) + w_{adv} \nabla L(w + v)

    Two full passes a step (and a probe where gradients were there before), and memory for a second copy of the weights
    that move. They are put back bit for bit, in the same memory, before `backward` returns or raises, so that the
    optimizer never sees them moved (the authors' code takes v away from the updated weights, after the optimizer's step
    and not exactly).

    With `epsilon`, no element w leaves w +- epsilon |w|, which is the variant of public competition code: there gamma
    is 1, epsilon 0.01, both norms have 1e-6 added, and `parameters=lambda name, p: "weight" in name`, so that layer
    norms move as well.

    Args:
        model: the model to train, wrapped (DDP, torch.compile, PEFT) or not.
        gamma: length of the movement of each weight, in units of the weight's own norm.
        epsilon: how far each element may be moved, in units of its own magnitude; None: no bound.
        steps: how often the weights are moved; each after the first costs a probe.
        parameters: which weights move: a callable `(name, parameter) -> bool`; None: all matrices.
        clean_weight: weight of the gradient at the weights as they are; 0: no part of it is kept.
        adv_weight: weight of the gradient at the moved weights.
        start_step, every: attack from this step on, and each so many steps. Early on, when the weights move by
            themselves, it may do harm.
        dropout: "fresh" masks in every pass (default), the "same" in all passes of a step, or "off".
        fused: None: the fastest backend there is; True: insist on native ops; False: eager ops.
        backward, scaler: who takes a full pass's loss (`accelerator.backward`), and a `torch.amp.GradScaler`.
        atomic: copy gradients that were there before, and put them back if the step fails.
        probe_dtype: torch.bfloat16 or torch.float16: probes run under autocast to it; None: as all passes.
        communication: "each", "last" or "keep": what FSDP2 sends between passes; see `fastadv.PGD`.

    Raises:
        TypeError, ValueError: an argument that cannot be, or no weight that moves.
        RuntimeError: `fused=True` where not every op has a native backend.

    Examples:
        >>> import fastadv, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> adv = fastadv.AWP(model, gamma=0.001)
        >>> result = adv.backward(lambda: model(torch.ones(2, 4)).square().mean())  # instead of loss.backward()
        >>> bool(result.adv_loss > result.loss)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        gamma: float = 0.01,
        epsilon: float | None = None,
        steps: int = 1,
        parameters: Choice | None = None,
        clean_weight: float = 1.0,
        adv_weight: float = 1.0,
        **options: Unpack[StepOptions],
    ) -> None:
        self.gamma = number("gamma", gamma)
        self.epsilon = None if epsilon is None else number("epsilon", epsilon)
        self.steps = whole("steps", steps, 1)
        self.clean_weight = number("clean_weight", clean_weight)
        self.adv_weight = number("adv_weight", adv_weight)
        super().__init__(model, **options)
        self._engine.refuse(sharded=SHARDED)
        self._engine.agreement.averages = True
        if library_of(model) == "deepspeed":
            self.close()
            raise ValueError("AWP moves by the weights' gradients, and DeepSpeed keeps them elsewhere: train with DDP")
        self._choice = matrices if parameters is None else parameters
        self._weights = MovedWeights([], self._engine.places.fused)
        self._known: tuple[list[nn.Parameter], list[bool]] = [], []
        self._follow()

    def _follow(self) -> None:
        """Choose the weights that move, again where the model has got others or trains others than before."""
        self._engine.inventory.look()
        parameters = self._engine.inventory.parameters
        known, now = self._known, (parameters, [parameter.requires_grad for parameter in parameters])
        if len(known[0]) == len(parameters) and all(map(is_, known[0], parameters)) and known[1] == now[1]:
            return
        chosen = [p for name, p in self.model.named_parameters() if p.requires_grad and self._choice(name, p)]
        if not chosen:
            raise ValueError(
                "no weight moves: parameters=(name, parameter) -> bool chose none of those that require a gradient"
            )
        placed = [name for name, p in self.model.named_parameters() if is_placed(p) and any(p is one for one in chosen)]
        if placed:
            raise ValueError(PLACED.format(name=placed[0]))
        self._known, self._weights.weights, self._weights.saved = now, chosen, []

    def run(self, step: Step) -> StepResult:
        """The clean pass, the movement up its gradient, and a pass with the weights there."""
        self._follow()
        moving = self._weights
        alone = bool(self.clean_weight) and step.target is step.closure and not any(w.grad is not None for w in moving)
        clean = step.descend(self.clean_weight) if self.clean_weight else None
        moving.set_out(step.undo)
        self.search(step, self._of_all(step, moving) if alone else None)
        adversarial = step.descend(self.adv_weight)
        moving.put_back()
        return step.result(clean, adversarial)

    def search(self, step: Step, gradients: Sequence[Tensor | None] | None = None) -> None:
        """The movement, along gradients that are there already or are found by a probe."""
        for _ in range(self.steps):
            found = self._probed(step) if gradients is None else gradients
            self._weights.step(found, self.gamma, self.epsilon)
            gradients = None

    def _probed(self, step: Step) -> Sequence[Tensor | None]:
        return self._mean(step, step.gradients_by(self._weights.weights))

    def _of_all(self, step: Step, moving: MovedWeights) -> Sequence[Tensor | None]:
        """The clean pass's gradient, of all processes: in the user's `no_sync` DDP has not reduced it."""
        gradients = [weight.grad for weight in moving]
        return self._mean(step, gradients) if step.engine.parallelism.accumulates() else gradients

    def _mean(self, step: Step, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Of this process's batch: over those of all that train."""
        if not step.engine.parallelism.among_others():
            return gradients
        weights = self._weights.weights
        filled = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
        return step.engine.agreement.mean(filled)

    def perturbed(
        self, closure: Closure, mask: Masks = None, groups: Groups = None
    ) -> contextlib.AbstractContextManager[None]:
        """Move the weights up one batch's loss, for every forward inside the block; see `Method.perturbed`."""
        values = self._engine.run(self._found, closure, mask, groups=groups)

        def move() -> None:
            self._engine.busy = True
            self._weights.move_to(values)

        def put_back() -> None:
            self._weights.put_back()
            self._engine.busy = False

        return Block(move, put_back)

    def _found(self, step: Step) -> list[Tensor]:
        """Where the weights move to. They are back when this returns."""
        self._follow()
        self._weights.set_out(step.undo)
        self.search(step)
        values = self._weights.values()
        self._weights.put_back()
        return values

    @property
    def skipped(self) -> Tensor:
        """The number of weights that stayed because their gradient was not finite: int64, 0-d, on the device."""
        return self._weights.skipped

    @property
    def perturbation_norm(self) -> Tensor:
        """The length of the weights' movements, the mean over them: 0-d, on the device."""
        return self._weights.norm

    # For a captured step

    def _memory(self) -> list[Tensor]:
        return [*super()._memory(), *self._weights.saved, self._weights.skipped, self._weights.norm]

    def _remember(self) -> Any:
        return super()._remember(), self._weights.skipped.clone()

    def _rewind(self, state: Any) -> None:
        counters, skipped = state
        super()._rewind(counters)
        self._weights.skipped.copy_(skipped, non_blocking=True)
