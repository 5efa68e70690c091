"""A partial pass: forward to the split alone, and back from the gradient that the last pass left there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastadv.engine.forward import Forward, as_far_as_reached, differentiate
from fastadv.engine.model.split import NOT_ON_THE_WAY, Crossing
from fastadv.engine.outputs import loss_of
from fastadv.engine.profile import span

if TYPE_CHECKING:
    from fastadv.engine.step import Step


def gradients(step: Step) -> Sequence[Tensor | None]:
    """The perturbation's.

    Raises:
        RuntimeError: the split does not depend on the perturbation.
    """
    engine, split, crossed = step.engine, step.engine.split, step.crossing
    assert split is not None and crossed is not None and crossed.gradient is not None
    sharded = engine.parallelism.sharded
    crossing = Crossing(split.name, partial=True, ends=not sharded)
    ends, weights = [], []

    step.draws.next_pass()
    forward = engine.entrance.forward = Forward(step, "partial", crossing)
    with engine.probe_autocast.lowered(step.device), span("forward"):
        output = step.call(as_far_as_reached(step.target))
    if output is not None:
        # Under FSDP2 the forward runs to its end, since its modules must see the end of what they began; the loss takes
        # part with a zero, since a module's weights are gathered when its output's gradient comes.
        loss = loss_of(output)
        ends, weights = [loss], [torch.zeros_like(loss)]
    hidden = crossing.output(len(step.lookups))
    forward.ended = True
    with span("backward"):
        found = differentiate([*ends, hidden], step.perturbation.leaves(), [*weights, crossed.gradient])
    engine.entrance.forward = None
    if all(grad is None for grad in found):
        raise RuntimeError(NOT_ON_THE_WAY.format(name=split.name))
    return found
