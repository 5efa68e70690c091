"""Train adversarially through a pipeline: a schedule of torch.distributed.pipelining runs each pass of a step.

See docs/design/0024-pipelines.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastadv.engine.model.parallelism import Parallelism
from fastadv.engine.results import StepResult
from fastadv.engine.safety.dropout import MODES, Draws, quieted
from fastadv.engine.safety.guard import Guard
from fastadv.engine.safety.inventory import Inventory
from fastadv.integrations.pipeline_step import PipelineStep, Verb
from fastadv.methods.base import Method

SCHEDULE = (
    "Pipeline takes a schedule with one stage on each rank and a loss_fn (ScheduleGPipe, Schedule1F1B), not {kind}"
)
SCALES = (
    "the schedule divides all gradients after each pass, those of earlier passes again: make it with "
    "scale_grads=False, and let loss_fn return the micro-batch's share of the loss (a sum over the batch's token count)"
)
STAGE = "a pipeline's stage must be a plain module: no DDP, FSDP or tensor parallelism around or in it, and no compile"
FIRST = "backward is for the first stage's rank, which has the method: the others call follow"
CLOSURE = "a schedule runs the passes of this step: a method that calls its closure cannot go through a pipeline"
VOID = "the first stage's rank failed in this step, which is void on all ranks: its own error says why"


def no_closure() -> None:
    """Stands where a method wants one."""
    raise RuntimeError(CLOSURE)


class Pipeline:
    """One rank's part in steps through a schedule: the first stage's rank has the method, and the others follow.

    In each pass every rank runs the schedule once. Before it the first rank tells the others which pass it is and what
    its loss counts, two numbers; after a full pass the last rank tells the loss. A micro-batch is what a batch is
    otherwise: with `scope="batch"` each has a ball of its own. dropout="same" and "off" hold in all stages.

    Where the first rank fails between passes, the step is void on all ranks, and gradients are what they were. Where a
    rank fails inside of one, the others wait until their process group gives up.

    Args:
        schedule: one of `torch.distributed.pipelining` with one stage on each rank, a loss_fn and scale_grads=False.

    Raises:
        TypeError, ValueError: another schedule, or a stage that is wrapped.

    Examples:
        >>> schedule = Schedule1F1B(stage, 4, loss_fn=loss_fn, scale_grads=False)  # doctest: +SKIP
        >>> pipeline = Pipeline(schedule)  # doctest: +SKIP
        >>> adv = fastadv.PGD(stage.submod, scope="sample") if stage.is_first else None  # doctest: +SKIP
        >>> for ids, labels in loader:  # doctest: +SKIP
        ...     if stage.is_first:
        ...         pipeline.backward(adv, ids)
        ...     else:
        ...         pipeline.follow(target=labels)
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(self, schedule: Any) -> None:
        if not hasattr(schedule, "_stage") or schedule._loss_fn is None:
            raise TypeError(SCHEDULE.format(kind=type(schedule).__name__))
        if schedule.scale_grads:
            raise ValueError(SCALES)
        self._schedule, self._stage = schedule, schedule._stage
        self._loss_fn, schedule._loss_fn = schedule._loss_fn, self._weighted
        self._model = Inventory(self._stage.submod)
        around = Parallelism(self._model)
        if around.sharded or around.placed or around.compiled or around.parallel is not None:
            raise ValueError(STAGE)
        self._weight, self._losses = 1.0, list[Tensor]()
        self._learnt = self._inside = False
        self._pass: Callable[[], Any] = lambda: None
        self.batches: int = schedule._n_microbatches

    def backward(
        self,
        adv: Method,
        *args: Any,
        mask: Tensor | None = None,
        groups: Tensor | None = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> StepResult:
        """Train on one batch, in place of `schedule.step`: on the first stage's rank.

        Args:
            adv: the method, made with the stage's module.
            *args: the batch, as for `schedule.step`.
            mask: [B, T], of the whole batch: as for `Method.backward`, as are `groups` and `step`.
            groups: [B, T].
            step: of `start_step` and `every`.
            **kwargs: as for `schedule.step`.

        Returns:
            The losses, each a sum over micro-batches; no output.

        Raises:
            ValueError: a method that cannot train so.
            As `Method.backward` does.
        """
        if not self._stage.is_first:
            raise ValueError(FIRST)
        engine, made = adv._engine, adv._engine.new_step
        self._pass, self._inside = functools.partial(self._schedule.step, *args, **kwargs), False
        engine.new_step = functools.partial(PipelineStep, self)
        try:
            self._tell(Verb.BEGIN, MODES.index(engine.dropout))
            self._learn()
            result = adv.backward(no_closure, self._split(mask), step=step, groups=self._split(groups))
        except BaseException:
            if not self._inside:
                self._tell(Verb.VOID)
            raise
        finally:
            engine.new_step = made
        self._tell(Verb.END)
        return result

    def follow(self, **kwargs: Any) -> None:
        """Take part in one step: on every other rank.

        Args:
            **kwargs: as for `schedule.step`; the last stage's rank gives `target`.

        Raises:
            RuntimeError: the first rank failed; gradients are what they were.
        """
        self._pass = functools.partial(self._schedule.step, **kwargs)
        mode = MODES[int(self._hear()[1])]
        self._learn()
        guard = Guard(self._model, atomic=True, fused=None)
        saved, draws = guard.save(), Draws(mode, self._stage.device)
        try:
            for module in quieted(mode, self._model.modules):
                module.training = False
            while (told := self._hear())[0] != Verb.END:
                if told[0] == Verb.VOID:
                    raise RuntimeError(VOID)
                draws.next_pass()
                self._run(*told)
        except BaseException:
            _call(guard.put_back(saved))
            raise
        for module, training in zip(saved.modules, saved.modes, strict=True):
            module.training = training

    def lead(self, verb: Verb, weight: float = 1.0) -> Tensor:
        """The first rank's part in a pass that all take part in: its loss."""
        self._tell(verb, weight)
        return self._run(verb, weight)

    def _run(self, verb: Verb, weight: float = 1.0) -> Tensor:
        """The schedule, once; a probe's loss is not told, and 0 here."""
        self._weight, self._losses, self._inside = weight, [], True
        frozen = [one for one in self._model.parameters if one.requires_grad and verb == Verb.PROBE]
        for parameter in frozen:
            parameter.requires_grad_(False)
        self._pass()
        for parameter in frozen:
            parameter.requires_grad_(True)
        loss = torch.zeros((), dtype=torch.float64, device=self._stage.device)
        if verb == Verb.TRAIN:
            loss += sum(self._losses)
            self._broadcast(loss, self._stage.num_stages - 1)
        self._inside = False
        return loss

    def _weighted(self, output: Any, target: Any, **kwargs: Any) -> Tensor:
        """What the last stage goes back through."""
        loss: Tensor = self._loss_fn(output, target, **kwargs)
        self._losses.append(loss.detach())
        return loss * self._weight

    def _learn(self) -> None:
        """Before the first step a pass of which nothing stays: from it torch learns what stages send each other."""
        self._model.look()
        if not self._learnt:
            guard = Guard(self._model, atomic=True, fused=None)
            saved = guard.save()
            self._run(Verb.BEGIN)
            _call(guard.put_back(saved))
        self._learnt = True

    def _split(self, whole: Tensor | None) -> list[Tensor] | None:
        return None if whole is None else list(whole.tensor_split(self.batches))

    def _tell(self, verb: Verb, value: float = 0.0) -> None:
        self._broadcast(torch.tensor([verb, value], dtype=torch.float64, device=self._stage.device), 0)

    def _hear(self) -> tuple[Verb, float]:
        told = torch.zeros(2, dtype=torch.float64, device=self._stage.device)
        self._broadcast(told, 0)
        verb, value = told.tolist()
        return Verb(int(verb)), value

    def _broadcast(self, tensor: Tensor, stage: int) -> None:
        group: Any = self._stage.group or dist.group.WORLD
        dist.broadcast(tensor, dist.get_global_rank(group, stage), group)


def _call(undo: list[Callable[[], None]]) -> None:
    for one in undo:
        one()
