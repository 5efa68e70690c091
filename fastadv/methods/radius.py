"""Suggest a radius: the one at which the loss rises by a set amount."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.engine.safety import rng
from fastadv.engine.safety.interrupts import Block
from fastadv.methods.embedding_method import EmbeddingMethod
from fastadv.methods.fgm import FGM
from fastadv.methods.radius_losses import Run, Task, has_radius

RISE = 0.35  # of a cross entropy: the right answer keeps exp(-0.35) = 70 % of its likelihood
LEAST = 1 / 3  # of the wanted rise must have been learnt
FIRST = 0.05  # the first guess, in units of the mean row norm
WITHIN = 0.05  # of the wanted rise: where the search ends
NARROW = 1.02  # or where a jump lies between radii that differ by less
STEEP = 20.0  # a line through ends whose rises differ by more says little
LOOKS = 20

NOT_LEARNT = (
    "the model has not learnt its task after {fitted} plain steps: its loss is {own:.3g}, and {foreign:.3g} with other "
    "samples' labels. Train it plainly for a while and ask again, or raise fit=, learning_rate= or count="
)
NO_RISE = (
    "the loss does not rise by {wanted:.3g} at any radius from {low:.3g} to {high:.3g} ({method}): does it depend on "
    "the embedding that is perturbed? Name another with embedding=, or ask for less with rise="
)


class Radius(float):
    """A radius, to use as any float, with what it was found by.

    Attributes:
        relative: the radius in units of the mean norm of the embedding's rows; None where there is no table.
        loss, adv_loss: the mean loss of the batches, unperturbed and at this radius.
        foreign: the mean loss with other samples' labels; None where batches have no labels to exchange.
        fitted: the plain steps that a copy was trained for, since the model had not learnt its task.
        curve: every radius that was tried, with its loss.
    """

    relative: float | None = None
    loss: float = math.nan
    adv_loss: float = math.nan
    foreign: float | None = None
    fitted: int = 0
    curve: Sequence[tuple[float, float]] = ()


def suggest_radius(
    model: nn.Module,
    batches: Iterable[Any],
    method: type[EmbeddingMethod] = FGM,
    *,
    rise: float = RISE,
    closure: Run | None = None,
    mask: Callable[[Any], Any] | None = None,
    count: int = 16,
    fit: int = 24,
    learning_rate: float = 1e-4,
    **options: Any,
) -> Radius:
    r"""Find the radius at which the loss rises by `rise`: an `epsilon` to start with, without a sweep.

    .. math:: \frac{1}{n} \sum_i L\big(x_i + r_i(\epsilon), y_i\big) - L(x_i, y_i) = \min\Big(\text{rise}, \;
        \frac{1}{n} \sum_i L(x_i, y_{i+1}) - L(x_i, y_i)\Big)

    r is what `method` finds, dropout off. A cross entropy that rises by 0.35 leaves the right answer 70 % of its
    likelihood: harder, and still to be learnt. It never rises by more than what the model has learnt, which is what
    the loss rises by with another sample's labels. The same likelihood is 1.7 times the loss where labels are numbers
    (a squared error, in a normal distribution with the model's own error), and a rise of 0.35 divided by the number of
    labels where a text has several (`config.problem_type`).

    The last quarter of the batches is measured. The loss of a model that has learnt nothing depends on nothing: then a
    copy is trained plainly first, for `fit` steps of AdamW on the other batches. Where torch.distributed is
    initialised, losses are means over the processes, and all get one radius. docs/concepts.md has the evidence.

    Args:
        model: the model to train. It is left as it is: weights, gradients, modes, generators.
        batches: training batches of the size that you train with, such as the loader, that the model has not been
            trained on. Mappings are moved to the model's device and run as `model(**batch)`.
        method: whose search is measured.
        rise: how much the right answer's log likelihood falls: a cross entropy's rise.
        closure: `closure(model, batch)` returns the loss, or an output that has it. Default: `model(**batch)`.
        mask: `mask(batch)` returns the mask of tokens. Default: the batch's "attention_mask", if it has one.
        count: the most batches that are read.
        fit: plain steps for a copy of a model that has not learnt; 0: an error instead.
        learning_rate: of these steps.
        **options: those of `method`: `scope` (default: "sample"), `norm`, `embedding`, ... `step_size` and
            `random_start` are fractions of the radius. With `relative=True` the radius is in units of the row norm.

    Raises:
        ValueError: no batches; a method without an epsilon.
        RuntimeError: the model learns nothing from the batches, or its loss does not rise at any radius.

    Examples:
        >>> epsilon = fastadv.suggest_radius(model, loader)  # doctest: +SKIP
        >>> adv = fastadv.FGM(model, epsilon=epsilon, scope="sample")  # doctest: +SKIP
        >>> epsilon = fastadv.suggest_radius(model, loader, fastadv.PGD, step_size=0.5)  # doctest: +SKIP
        >>> adv = fastadv.PGD(model, epsilon=epsilon, step_size=epsilon / 2, scope="sample")  # doctest: +SKIP
    """
    if not has_radius(method):
        raise ValueError(
            f"{method.__name__} perturbs no embeddings within an epsilon: take FGM, PGD or another that does"
        )
    device = next(model.parameters()).device
    held = [_placed(batch, device) for batch in itertools.islice(batches, count)]
    if not held:
        raise ValueError("suggest_radius needs batches of training data, such as the training loader")
    task, fitted = Task(method, {"scope": "sample", **options}, closure or _run, mask or _mask), 0
    others, held = held[: -max(1, len(held) // 4)] or held, held[-max(1, len(held) // 4) :]
    with _untouched(model, device):
        losses = task.losses(model, held)
        if fit and losses.learnt < losses.wanted(rise):
            model, fitted = task.fitted(model, others, fit, learning_rate), fit
            losses = task.losses(model, held)
        if losses.learnt < LEAST * losses.wanted(rise):
            raise RuntimeError(NOT_LEARNT.format(own=losses.own, foreign=losses.foreign, fitted=fitted))
        wanted, unit = min(losses.wanted(rise), losses.learnt), task.unit(model)
        curve, result = _search(
            lambda radius: task.attacked(model, held, radius) - losses.own, wanted, FIRST * (unit or 1.0)
        )
    if result is None:
        tried = [radius for radius, _ in curve]
        raise RuntimeError(NO_RISE.format(wanted=wanted, low=min(tried), high=max(tried), method=method.__name__))
    found = Radius(result[0])
    found.relative = found / unit if unit else None
    found.loss, found.adv_loss, found.fitted = losses.own, losses.own + result[1], fitted
    found.foreign = None if math.isinf(losses.foreign) else losses.foreign
    found.curve = [(radius, losses.own + risen) for radius, risen in curve]
    return found


Look = tuple[float, float]  # a radius and the rise there


def _search(rise_at: Callable[[float], float], wanted: float, radius: float) -> tuple[list[Look], Look | None]:
    """Look at radii until the rise is the one `wanted`. Returns all of them, and the one that is it; None: none is."""
    curve: list[Look] = []
    low, high = (0.0, 0.0), (math.inf, math.inf)
    for _ in range(LOOKS):
        risen = rise_at(radius)
        curve.append((radius, risen if math.isfinite(risen) else math.inf))
        if abs(risen - wanted) <= WITHIN * wanted:
            return curve, curve[-1]
        low, high = (curve[-1], high) if risen < wanted else (low, curve[-1])
        if 0 < high[0] < NARROW * low[0]:
            return curve, low
        radius = _between(low, high, wanted)
    return curve, None


def _between(low: Look, high: Look, wanted: float) -> float:
    """Where a line through both ends, in logarithms, meets `wanted`; beyond a single end, 4 times at most."""
    (radius, risen), (above, most) = low, high
    if math.isinf(above):
        return radius * min(max(wanted / risen, 1.3), 4.0) if risen > 0 else radius * 4.0
    if radius == 0:
        return above * min(max(wanted / most, 0.25), 0.77)
    if risen <= 0 or most > STEEP * risen:
        return math.sqrt(radius * above)
    part = math.log(wanted / risen) / math.log(most / risen)
    return radius * math.pow(above / radius, min(max(part, 0.1), 0.9))


def _untouched(model: nn.Module, device: torch.device) -> Block:
    """Inside, the model is in eval mode; afterwards modes and generators are what they were."""
    modes, state = [(module, module.training) for module in model.modules()], rng.save(device)

    def quiet() -> None:
        model.eval()

    def put_back() -> None:
        for module, mode in modes:
            module.training = mode
        rng.restore(state, device)

    return Block(quiet, put_back)


def _placed(batch: Any, device: torch.device) -> Any:
    if not isinstance(batch, Mapping):
        return batch
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _run(model: nn.Module, batch: Any) -> Any:
    return model(**batch)


def _mask(batch: Any) -> Any:
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None
