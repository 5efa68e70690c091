"""What all methods share: the schedule, and the frame in which `run` spends its passes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from fastadv.engine.dropout import MODES
from fastadv.engine.passes import Backward, Closure, Engine, Pass
from fastadv.engine.site import Masks
from fastadv.engine.start import Draw
from fastadv.methods.capturable import Capturable
from fastadv.native import flags
from fastadv.ops import dispatch


class StepResult(NamedTuple):
    """What `backward` saw, detached and still on the device: reading a number is what waits for it.

    Attributes:
        loss: the clean loss where there is a clean pass, else the mean over the full passes. 0-d.
        adv_loss: the loss at the last perturbation; None on a step that was not attacked.
        output: what the closure returned in the first pass, without its graph.
    """

    loss: Tensor
    adv_loss: Tensor | None
    output: Any


class Method(Capturable):
    """A schedule of passes around the user's closure. A subclass writes `run`, and says what `perturbed` finds.

    What most methods perturb is embeddings: see `EmbeddingMethod`. The arguments are described at `fastadv.PGD`; `site`
    is where the subclass perturbs the model.
    """

    replays: int = 1  # how many steps in a row see the same batch

    def __init__(
        self,
        model: nn.Module,
        *,
        start_step: int = 0,
        every: int = 1,
        dropout: str = "fresh",
        fused: bool | None = None,
        backward: Backward | None = None,
        scaler: GradScaler | None = None,
        atomic: bool = True,
        probe_dtype: torch.dtype | None = None,
        site: Mapping[str, Any],
    ) -> None:
        check_module(model)
        one_of("dropout", dropout, MODES)
        self.start_step = whole("start_step", start_step, 0)
        self.every = whole("every", every, 1)
        self.attacked = 0
        self.now = 0  # the step that is running, or ran last
        self._calls = 0
        self.model = model
        self._check_trainable()
        dispatch.require(fused, next(model.parameters()).device.type)
        self.engine = Engine(
            model,
            dropout=dropout,
            fused=fused,
            backward=backward,
            scaler=scaler,
            atomic=atomic,
            probe_dtype=probe_dtype,
            **site,
        )

    # What the user calls

    def backward(
        self, closure: Closure, mask: Masks = None, attack: Closure | None = None, step: int | None = None
    ) -> StepResult:
        """Adversarial training's stand-in for `loss.backward()`: accumulates into `.grad`; the optimizer is yours.

        Args:
            closure: runs the model's forward and returns the loss, an output with `.loss`, a dict with "loss" or a
                tuple that begins with it. It is called once per pass and never calls backward.
            mask: [B, T], true or 1 where a token is. Elsewhere there is no perturbation. Default: where the
                embedding's `padding_idx` is not. A sequence of masks where the embedding is called several times.
            attack: a second closure, whose value the ascent maximises where that is not the loss.
            step: the step that `start_step` and `every` look at. Default: the number of earlier calls.

        Raises:
            TypeError, ValueError: the closure's result holds no scalar loss; the mask has another shape.
            IndexError: ids outside the embedding's table (on the CPU).
            RuntimeError: the closure never ran the embedding, or called backward itself.
            Whatever the closure raises. In every case the model is left as it was.
        """
        self._check_trainable()
        attacking = self.enter(step)
        with self.engine.step(mask, self.draw() if attacking else None):
            result = self.run(closure, attack) if attacking else self.plain(closure)
            self.engine.pay(closure)
        self.count(attacking)
        return result

    def perturbed(self, closure: Closure, mask: Masks = None) -> contextlib.AbstractContextManager[None]:
        """Find the perturbation of one batch, and let every forward inside the block see it: for evaluation.

        Parameters and their gradients are not touched.

        Example:
            >>> with adv.perturbed(lambda: model(ids, labels=labels).loss):  # doctest: +SKIP
            ...     logits = model(ids).logits
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """What the next step needs to know of the earlier ones; `load_state_dict` takes it back."""
        return {"calls": torch.tensor(self._calls), "attacked": torch.tensor(self.attacked)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another run was when `state_dict` was called.

        Raises:
            KeyError: `state` is not of such a method.
        """
        self._calls, self.attacked = int(state["calls"]), int(state["attacked"])

    def check(self) -> None:
        """Wait for the device, and raise if it has met an index out of range.

        On the CPU that is an error at once. A GPU leaves the position out and goes on, so ask now and then, where you
        read a loss anyway.

        Raises:
            IndexError: an id outside of its table, in this or another model on that device.
        """
        flags.check(self.engine.device)

    def close(self) -> None:
        """Take the method out of the model."""
        self.engine.close()

    @property
    def share(self) -> float:
        """The part of an optimizer step that one batch is: 1, or 1 / n where a closure divides its loss by n.

        Under gradient accumulation the terms that SMART, VAT and BregmanProximal add are multiplied with it.
        """
        return self.engine.share

    @share.setter
    def share(self, part: float) -> None:
        self.engine.share = number("share", part)

    @property
    def skipped(self) -> Tensor:
        """How many groups took no step because their gradient was not finite: int64, 0-d, on the device."""
        raise NotImplementedError

    @property
    def perturbation_norm(self) -> Tensor:
        """The last perturbation's norm, the mean over its groups: 0-d, on the device."""
        raise NotImplementedError

    # What a subclass writes

    def run(self, closure: Closure, attack: Closure | None) -> StepResult:
        """One attacked training step."""
        raise NotImplementedError

    def draw(self) -> Draw | None:
        """Where a training step's perturbation starts; None: at zero."""
        return None

    def plain(self, closure: Closure) -> StepResult:
        """One step that is not attacked."""
        done = self.engine.plain(closure)
        return StepResult(done.loss, None, done.output)

    # What a subclass uses

    def descend(self, closure: Closure, weight: float = 1.0, *, more: bool = False) -> Pass:
        """A full pass, whose loss counts `weight`; `more` if another full pass follows in this step."""
        return self.engine.descend(closure, weight, more=more)

    def result(self, clean: Pass | None, adversarial: Pass) -> StepResult:
        """The step's result, from its clean pass (if there was one) and its last."""
        first = self.engine.first or adversarial
        return StepResult((clean or adversarial).loss, adversarial.loss, first.output)

    def _check_trainable(self) -> None:
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("every parameter of the model is frozen: there is nothing to train. Unfreeze some first")


def check_module(model: object) -> None:
    """Raises TypeError unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")


def one_of(name: str, value: object, choices: Any) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in tuple(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def number(name: str, value: Any) -> float:
    """`value` as a finite float of at least 0, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and at least 0, not {value}")
    return float(value)


def whole(name: str, value: Any, least: int) -> int:
    """`value` as an int of at least `least`, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return value
