"""Who runs the backward of a full pass: the loss itself, the user's function, or a training framework."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from fastadv.engine.frame import Undo
from fastadv.engine.safety.interrupts import whole

Backward = Callable[[Tensor], Any]

VERBS = ("backward", "probing", "sync")
NO_OWNER = (
    "backward= takes a function of the loss (accelerator.backward), or an owner: an object with backward(loss, last), "
    "probing() and sync(last), such as a fastadv.Owner; {value} is neither.{hint}"
)
FRAMEWORKS = " fastadv.integrations has owners for accelerate, Lightning, Fabric and DeepSpeed"


class Owner:
    """Runs the backward of full passes, and puts around every pass what a training framework needs there.

    Give one as `backward=`; a plain function of the loss is its simplest form. Subclass it and override what differs,
    or give any object with `backward`, `probing` and `sync`. `fastadv.integrations` has owners for accelerate,
    Lightning, Fabric and DeepSpeed.

    Both context managers are left whatever happens: by the pass or, where it fails or is interrupted, by the step that
    puts the model back. They must then put their switches back too (`try`, `finally`), and send nothing.

    Attributes:
        reads_gradients: whether somebody may look at gradients as soon as `backward` has run (a hook of the framework,
            a reduction). Then autograd brings all of them in every pass; otherwise the embedding table's comes once, at
            the step's end.
        divisor: by what `backward` divides every loss, n where it does so under gradient accumulation over n batches.
            The terms of SMART, VAT and BregmanProximal are then divided too: see `Method.share`.
        scaler: the `torch.amp.GradScaler` that `backward` scales losses by; probes are scaled by it as well.
        steps: whether `backward` steps the optimizer too, where a step ends. What follows an optimizer
            (`BregmanProximal.attach`) then follows the owner, which needs `register_step_post_hook`, as torch has it.

    Examples:
        >>> import fastadv, torch
        >>> class Logged(fastadv.Owner):
        ...     def backward(self, loss, last):
        ...         print("the last backward of a step" if last else "a backward")
        ...         loss.backward()
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(12, 1))
        >>> adv = fastadv.FGM(model, epsilon=0.5, backward=Logged())
        >>> result = adv.backward(lambda: model(torch.tensor([[1, 2, 3]])).square().mean())
        a backward
        the last backward of a step
    """

    reads_gradients: bool = True
    divisor: float = 1.0
    scaler: GradScaler | None = None
    steps: bool = False

    def backward(self, loss: Tensor, last: bool) -> None:  # noqa: ARG002
        """Accumulate the gradients of a full pass into `.grad`.

        Args:
            loss: 0-d, with its graph; the terms that a method adds are in it.
            last: gradients are complete after this pass.
        """
        loss.backward()  # type: ignore[no-untyped-call]

    def probing(self) -> AbstractContextManager[Any]:
        """Around forward and backward of a pass that brings the perturbation's gradient and no parameter's.

        The backward inside is `torch.autograd.grad`: the place to quiet hooks that wait for parameters' gradients, or
        that insist on a backward of the framework's own.
        """
        return contextlib.nullcontext()

    def sync(self, last: bool) -> AbstractContextManager[Any]:  # noqa: ARG002
        """Around forward and backward of a full pass: the place to switch the framework's gradient reduction.

        Where probes come between a forward and its backward (SMART, LLR) it is left before them; the backward then runs
        in the `sync` of the last forward. torch's DDP needs nothing here: a step switches it by itself.

        Args:
            last: gradients are complete after this pass: no other full pass of the step follows. AWP, which moves by
                the clean pass's gradient, has two such passes.
        """
        return contextlib.nullcontext()


class Unowned(Owner):
    """The loss itself: `loss.backward()`, scaled where there is a scaler."""

    reads_gradients = False

    def __init__(self, scaler: GradScaler | None = None) -> None:
        self.scaler = scaler

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate into `.grad`."""
        super().backward(loss if self.scaler is None else self.scaler.scale(loss), last)


class Called(Owner):
    """A function that takes the loss. It scales by itself; a `scaler` is for probes."""

    def __init__(self, function: Backward, scaler: GradScaler | None = None) -> None:
        self.function = function
        self.scaler = scaler

    def backward(self, loss: Tensor, last: bool) -> None:  # noqa: ARG002
        """Call it."""
        self.function(loss)


class Resembling(Owner):
    """An object that has an owner's three verbs, and perhaps some of its attributes."""

    def __init__(self, other: Any, scaler: GradScaler | None = None) -> None:
        self.other = other
        self.reads_gradients = bool(getattr(other, "reads_gradients", True))
        self.scaler = getattr(other, "scaler", None) or scaler
        self.steps = bool(getattr(other, "steps", False))

    @property
    def divisor(self) -> float:  # type: ignore[override]
        """The object's, now."""
        return float(getattr(self.other, "divisor", 1.0))

    def backward(self, loss: Tensor, last: bool) -> None:
        """The object's."""
        self.other.backward(loss, last)

    def probing(self) -> AbstractContextManager[Any]:
        """The object's."""
        found: AbstractContextManager[Any] = self.other.probing()
        return found

    def sync(self, last: bool) -> AbstractContextManager[Any]:
        """The object's."""
        found: AbstractContextManager[Any] = self.other.sync(last)
        return found


def owner_of(given: Any, scaler: GradScaler | None = None) -> Owner:
    """The owner that an argument stands for: None, a function of the loss, an owner, or what has an owner's verbs.

    Raises:
        TypeError: it is none of these.
    """
    if given is None:
        return Unowned(scaler)
    if isinstance(given, Owner) and (scaler is None or scaler is given.scaler):
        return given
    if all(callable(getattr(given, verb, None)) for verb in VERBS):
        return Resembling(given, scaler)
    if not callable(given) or isinstance(given, nn.Module):  # an engine or a LightningModule, whose call is a forward
        hint = FRAMEWORKS if hasattr(given, "backward") else ""
        raise TypeError(NO_OWNER.format(value=type(given).__name__, hint=hint))
    return Called(given, scaler)


def scaled(owner: Owner, loss: Tensor) -> Tensor:
    """The loss of a pass that brings no parameter's gradient."""
    return loss if owner.scaler is None else owner.scaler.scale(loss)


class Around:
    """An owner's context manager around the pass that is running: one at a time, which is left once.

    Args:
        undo: what a step that fails does; it leaves the one that was entered.
    """

    def __init__(self, undo: list[Undo]) -> None:
        self._inside: AbstractContextManager[Any] | None = None
        undo.append(self._fail)

    @contextlib.contextmanager
    def one(self, manager: AbstractContextManager[Any]) -> Iterator[None]:
        """Around one pass; nothing here follows an error, which is what `undo` is for."""
        self.enter(manager)
        yield
        self.leave()

    @whole
    def enter(self, manager: AbstractContextManager[Any]) -> None:
        """Leave the one before, and enter this one."""
        self.leave()
        manager.__enter__()
        self._inside = manager

    @whole
    def leave(self) -> None:
        """The pass is done, or another one begins."""
        inside, self._inside = self._inside, None
        if inside is not None:
            inside.__exit__(None, None, None)

    @whole
    def _fail(self) -> None:
        inside, self._inside = self._inside, None
        if inside is not None:
            inside.__exit__(*sys.exc_info())
