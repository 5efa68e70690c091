"""What a radius is judged by: the losses of batches, as they are, with other labels, and attacked."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastadv import packed
from fastadv.engine.model.find import mean_row_norm
from fastadv.engine.outputs import find_loss
from fastadv.engine.safety import rng
from fastadv.methods.comparison import problem_of
from fastadv.methods.embedding_method import EmbeddingMethod
from fastadv.methods.options import options_of

SCALED = ("step_size", "random_start")  # options that grow with the radius
NO_COPY = (
    "the model has not learnt its task, and a copy of it cannot be made: train it plainly for a while and ask again"
)

Run = Callable[[nn.Module, Any], Any]


def scaled(options: Mapping[str, Any], radius: float) -> dict[str, Any]:
    """The options of a method whose radii are given as fractions of its epsilon."""
    numbers = {name: value for name, value in options.items() if name in SCALED and is_number(value)}
    return {**options, **{name: radius * part for name, part in numbers.items()}, "epsilon": radius}


def has_radius(method: type) -> bool:
    """Whether a method perturbs embeddings within a radius."""
    return issubclass(method, EmbeddingMethod) and "epsilon" in options_of(method)


def is_number(value: object) -> bool:
    """Whether an option is a magnitude, and not True, None or a function."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Losses(NamedTuple):
    """The mean losses of some batches."""

    own: float
    foreign: float  # with other samples' labels; inf where there are none to exchange
    scale: float  # what a log likelihood of 1 is in this loss

    @property
    def learnt(self) -> float:
        """How much the model's answer follows from its input."""
        return self.foreign - self.own

    def wanted(self, rise: float) -> float:
        """The rise of this loss by which the log likelihood of the right answer falls by `rise`."""
        return rise * self.scale


class Task(NamedTuple):
    """How a batch is run and attacked."""

    method: type[EmbeddingMethod]
    options: Mapping[str, Any]
    run: Run
    mask: Callable[[Any], Any]

    @torch.no_grad()
    def losses(self, model: nn.Module, held: Sequence[Any]) -> Losses:
        """The losses without a perturbation."""
        own = _mean([self._loss(model, batch) for batch in held])
        exchanged = [_exchanged(batch) for batch in held]
        if any(batch is None for batch in exchanged):
            return Losses(own, math.inf, 1.0)
        return Losses(own, _mean([self._loss(model, batch) for batch in exchanged]), _scale(model, held[0], own))

    def attacked(self, model: nn.Module, held: Sequence[Any], radius: float) -> float:
        """The mean loss at the perturbation that the method finds within `radius`."""
        device = next(model.parameters()).device
        state = rng.save(device)
        with self.method(model, **scaled(self.options, radius)) as adv:
            found = _mean([self._attacked(adv, model, batch) for batch in held])
        rng.restore(state, device)  # every radius is tried from the same starts
        return found

    def _attacked(self, adv: EmbeddingMethod, model: nn.Module, batch: Any) -> Tensor:
        groups = packed.from_batch(batch) if isinstance(batch, Mapping) else None
        with adv.perturbed(lambda: self.run(model, batch), mask=self.mask(batch), groups=groups), torch.no_grad():
            return self._loss(model, batch)

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = find_loss(self.run(model, batch))
        return loss.detach().float().reshape(())

    def fitted(self, model: nn.Module, held: Sequence[Any], steps: int, learning_rate: float) -> nn.Module:
        """A copy that has been trained plainly."""
        try:
            learner = copy.deepcopy(model)
        except (TypeError, RuntimeError, NotImplementedError) as error:  # wrapped for several processes
            raise RuntimeError(NO_COPY) from error
        learner.zero_grad()
        learner.train()
        optimizer = torch.optim.AdamW([one for one in learner.parameters() if one.requires_grad], lr=learning_rate)
        for batch in itertools.islice(itertools.cycle(held), steps):
            loss: Tensor = find_loss(self.run(learner, batch))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return learner.eval()

    def unit(self, model: nn.Module) -> float | None:
        """The mean row norm, or 1 where the radius is in units of it; None where there is no table."""
        if self.options.get("relative"):
            return 1.0
        try:
            return mean_row_norm(model, self.options.get("embedding"))
        except ValueError:
            return None


def _mean(losses: Sequence[Tensor]) -> float:
    mean = torch.stack(list(losses)).mean()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return float(mean)


def _exchanged(batch: Any) -> Any:
    """The batch with other samples' labels; None where it has none, or one alone."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.dim() == 0 or labels.shape[:2] in ((1,), (1, 1)):
        return None
    return {**batch, "labels": labels.roll(1, dims=0 if len(labels) > 1 else 1)}


def _scale(model: nn.Module, batch: Mapping[str, Tensor], own: float) -> float:
    """What a log likelihood of 1 is in this loss: for classes, for marks of several labels, for numbers."""
    labels = batch["labels"]
    if not labels.is_floating_point():
        return 1.0
    return 1 / labels.shape[-1] if problem_of(model) == "multi_label_classification" else 2 * own
