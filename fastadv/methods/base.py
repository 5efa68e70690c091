"""What all methods share: `backward`, and the frame in which a method's `run` spends its passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from fastadv.engine.capture.graph import Captured
from fastadv.engine.engine import Engine
from fastadv.engine.lookups import Masks
from fastadv.engine.model.units import CHOICES
from fastadv.engine.owner import owner_of
from fastadv.engine.perturb.documents import Groups
from fastadv.engine.perturb.start import Draw
from fastadv.engine.results import Closure, StepResult
from fastadv.engine.safety.dropout import MODES
from fastadv.engine.step import Step
from fastadv.methods import given
from fastadv.methods.options import Dropout, StepOptions, check_module, check_options, number, one_of, scalar
from fastadv.methods.schedule import Schedule
from fastadv.native import flags
from fastadv.ops import dispatch


class Method:
    """A schedule of passes around the user's closure. A subclass writes `run`, one attacked training step.

    Methods that perturb embeddings derive from `EmbeddingMethod`.
    """

    _dropout: Dropout = "fresh"  # the default of `dropout=`
    _places: Mapping[str, Any] = MappingProxyType({"perturbs": False})  # where the engine perturbs the model
    _takes_unlabelled: bool = False  # whether a batch may come without a loss: an output with logits alone
    _given: given.Given  # the constructor's arguments

    if not TYPE_CHECKING:  # a type checker reads the constructor's own options

        def __new__(cls, *args: Any, **options: Any) -> Self:
            check_options(cls, {name: value for name, value in options.items() if name != "model"})
            method = super().__new__(cls)
            method._given = args, options
            return method

        def __getattr__(self, name: str) -> Any:
            if given.thaw(self):
                return getattr(self, name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __init__(self, model: nn.Module, **options: Unpack[StepOptions]) -> None:
        check_module(model)
        dropout = options.get("dropout", self._dropout)
        one_of("dropout", dropout, MODES)
        communication = options.get("communication", "each")
        one_of("communication", communication, CHOICES)
        self._schedule = Schedule(options.get("start_step", 0), options.get("every", 1))
        self.model = model
        check_trainable(model.parameters())
        fused = options.get("fused")
        dispatch.require(fused, next(model.parameters()).device.type)
        self._engine = Engine(
            model,
            dropout=dropout,
            fused=fused,
            owner=owner_of(options.get("backward"), options.get("scaler")),
            atomic=options.get("atomic", True),
            probe_dtype=options.get("probe_dtype"),
            communication=communication,
            **self._places,
        )

    # The user's calls

    def backward(
        self,
        closure: Closure,
        mask: Masks = None,
        attack: Closure | None = None,
        step: int | None = None,
        groups: Groups = None,
    ) -> StepResult:
        """Train on one batch, in place of `loss.backward()`: accumulates into `.grad`; the optimizer is yours.

        Args:
            closure: runs the model's forward and returns the loss, an output with `.loss`, a dict with "loss" or a
                tuple that begins with it. It is called once per pass and never calls backward.
            mask: [B, T], true or 1 where a token is, false or 0 elsewhere: there is no perturbation. Default: where
                the embedding's `padding_idx` is not. A sequence of masks where the embedding is called several times.
            attack: a second closure, whose value the ascent maximises where that is not the loss.
            step: the step that `start_step` and `every` look at. Default: the number of earlier calls.
            groups: [B, T] integers, where rows are packed with several documents: the number of each position's
                document, from 0 on, -1 where none is and nothing is to be perturbed. Numbers count within their row.
                A document is then what a row is otherwise, one sample. `fastadv.packed` reads them from what packing
                collators give. A sequence where the embedding is called several times.

        Raises:
            TypeError, ValueError: the closure's result holds no scalar loss; the mask has another shape, other values
                than 0 and 1, no token, or padding alone; groups are no integers, have another shape, numbers below -1,
                no document, or a document that comes back after another has begun.
            IndexError: ids outside the embedding's table (on the CPU).
            RuntimeError: the closure never ran the embedding, or called backward itself; another process failed.
            Whatever the closure raises. In every case the model is left as it was.
        """
        attacking = self._enter(step)
        schedule, start = (self._attacked, self._draw) if attacking else (self._unattacked, None)
        return self._engine.run(schedule, closure, mask, groups=groups, attack=attack, start=start, trains=True)

    def perturbed(
        self, closure: Closure, mask: Masks = None, groups: Groups = None
    ) -> contextlib.AbstractContextManager[None]:
        """Find the perturbation of one batch, and let every forward inside the block see it: for evaluation.

        Parameters and their gradients are not touched.

        Examples:
            >>> with adv.perturbed(lambda: model(ids, labels=labels).loss):  # doctest: +SKIP
            ...     logits = model(ids).logits
        """
        raise NotImplementedError

    def capture(self, fn: Callable[[Any], Any], example_batch: Any) -> Callable[[Any], Any]:
        """Record a step on batches of one shape as a CUDA graph: for small batches, where the host is the limit.

        Args:
            fn: the step. `fn(batch)` calls `backward`, and nothing in it waits for the device or changes a parameter:
                the optimizer stays outside.
            example_batch: a tensor, or a dict, tuple or list with tensors. `fn` is run on it a few times; the model,
                its gradients and the generators are then put back as they were.

        Returns:
            `step(batch)`, which copies the batch to the device, does what `fn` did and returns what it returned:
            single numbers to keep, larger tensors until the next step. The sum over the step's passes is added to the
            gradients that are there. Steps that `start_step` and `every` leave plain are a graph of their own.

        Raises:
            RuntimeError: the model is not on a CUDA device or is trained by several processes, or `fn` does what
                a graph cannot record.
            ValueError: from `step`, for a batch of another structure, shape or dtype.

        Examples:
            >>> def training_step(batch):
            ...     return adv.backward(lambda: model(**batch).loss, mask=batch["attention_mask"])
            >>> step = adv.capture(training_step, next(iter(loader)))  # doctest: +SKIP
            >>> for batch in loader:  # doctest: +SKIP
            ...     loss = step(batch).loss
            ...     optimizer.step()
            ...     optimizer.zero_grad()
        """
        device, parallelism = self._engine.device, self._engine.parallelism
        self._engine.look()
        if device.type != "cuda":
            raise RuntimeError(f"capture() records a CUDA graph, and the model is on the {device}: call backward()")
        if parallelism.reduces() or parallelism.sharded or self._engine.ranks is not None:
            raise RuntimeError("capture() serves one process: where several train a model, call backward()")
        return Captured(self, fn, example_batch, device)

    def state_dict(self) -> dict[str, Tensor]:
        """The state that the next step needs of the earlier ones; `load_state_dict` takes it back."""
        return {"calls": torch.tensor(self._schedule.calls), "attacked": torch.tensor(self._schedule.attacked)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another run was when `state_dict` was called.

        Raises:
            KeyError: `state` is not of such a method.
        """
        self._schedule.calls, self._schedule.attacked = int(state["calls"]), int(state["attacked"])

    def check(self) -> None:
        """Synchronise, and raise if the device has met an index out of range.

        On the CPU that is an error at once. A GPU leaves the position out and goes on: ask where you read a loss.

        Raises:
            IndexError: an id outside of its table, in this or another model on that device.
        """
        flags.check(self._engine.device)

    def close(self) -> None:
        """Take the method out of the model."""
        self._engine.close()

    def __repr__(self) -> str:
        return f"{given.described(self)} on {given.model_name(self.model)}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy with the model and the state; the copy is attached to the model's copy."""
        return given.reduced(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def share(self) -> float | Tensor:
        r"""The batch's weight in the optimizer step: the terms that SMART, VAT and BregmanProximal add count as much.

        A term is a mean over the batch's own m samples (or, for logits of tokens, the positions that its mask has). So
        that all terms of a step together are the mean over its M of them, in all micro-batches and on all processes:

        .. math:: \mathrm{share} = m / M \text{ where gradients are summed over processes}, \qquad
            \mathrm{share} = R \, m / M \text{ where they are averaged over R of them (DDP, FSDP)}

        One process, batches of equal size, a closure that divides its loss by n: 1 / n. None, the default: the term
        counts as the closure's loss does, 1, or 1 / n where the owner of the backward divides by n (accelerate).
        A number, or a 0-d tensor on the model's device, which nothing waits for; set it before each `backward`.
        """
        share = self._engine.share
        return 1 / self._engine.owner.divisor if share is None else share

    @share.setter
    def share(self, part: float | Tensor | None) -> None:
        if isinstance(part, Tensor):
            self._engine.share = scalar("share", part)
        else:
            self._engine.share = None if part is None else number("share", part)

    @property
    def attacked(self) -> int:
        """The number of attacked steps so far."""
        return self._schedule.attacked

    @property
    def skipped(self) -> Tensor:
        """The number of groups that took no step because their gradient was not finite: int64, 0-d, on the device."""
        return self._engine.buffers.skipped

    @property
    def perturbation_norm(self) -> Tensor:
        """The last perturbation's norm, the mean over its groups: 0-d, on the device."""
        raise NotImplementedError

    def _attacked(self, step: Step) -> StepResult:
        return self._counted(step, self.run, attacked=True)

    def _unattacked(self, step: Step) -> StepResult:
        return self._counted(step, self._plain, attacked=False)

    def _counted(self, step: Step, schedule: Callable[[Step], StepResult], *, attacked: bool) -> StepResult:
        check_trainable(self._engine.inventory.parameters)
        step.undo.append(self._recall())
        result = schedule(step)
        step.finish()
        self._count(attacked)
        return result

    # A subclass's part

    def run(self, step: Step) -> StepResult:
        """One attacked training step."""
        raise NotImplementedError

    def _plain(self, step: Step) -> StepResult:
        """One step that is not attacked."""
        done = step.plain()
        return StepResult(done.loss, None, done.output)

    def _draw(self) -> Draw | None:
        """Where a training step's perturbation starts; None: at zero."""
        return None

    def _enter(self, step: int | None = None) -> bool:
        """Go to a step, by default the next one. Returns whether it is attacked."""
        return self._schedule.enter(step)

    def _recall(self) -> Callable[[], None]:
        """Return what takes the counters back to here, should the step fail."""
        return self._schedule.remember()

    def _count(self, attacked: bool) -> None:
        """The step is done."""
        self._schedule.count(attacked)

    # For a captured step

    def _memory(self) -> list[Tensor]:
        """The tensors that outlive a step and are written in it: a graph that writes them must keep them."""
        return self._engine.memory()

    def _remember(self) -> Any:
        """The counters, for `_rewind`."""
        return self._schedule.calls, self._schedule.attacked, self._engine.buffers.skipped.clone()

    def _rewind(self, state: Any) -> None:
        """Back to them, in the same memory."""
        self._schedule.calls, self._schedule.attacked, skipped = state
        self._engine.buffers.skipped.copy_(skipped, non_blocking=True)


def check_trainable(parameters: Iterable[Tensor]) -> None:
    """Raises ValueError if all of them are frozen."""
    if not any(parameter.requires_grad for parameter in parameters):
        raise ValueError("every parameter of the model is frozen: there is nothing to train. Unfreeze some first")
