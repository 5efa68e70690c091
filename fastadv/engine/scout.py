"""What a compiled model must know before its first pass: the shape that is perturbed, where no mask gives it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastadv.engine.forward import Forward, as_far_as_reached
from fastadv.engine.results import Closure
from fastadv.engine.safety import rng

if TYPE_CHECKING:
    from fastadv.engine.step import Step


def needs_shape(step: Step) -> bool:
    """Whether this is a first pass that would break the graph where it makes the perturbation."""
    lookups = step.lookups
    if lookups.under_at:  # the first block makes the sites of the last step
        return step.engine.traced and not lookups.settled and not lookups.lent
    return step.engine.traced and not lookups.settled and lookups.given_mask(0) is None


def find_shape(step: Step, closure: Closure) -> bool:
    """Run the closure eagerly as far as the perturbed module, whose perturbation is there then.

    Not where the model must see the end of a forward that it began (DDP, FSDP2), nor where an earlier step has not
    shown that there is one call: what lies between calls would run once more. What ran is as if it had not.

    Returns:
        Whether it was found: if not, the first pass runs eagerly as a whole.
    """
    engine = step.engine
    if len(step.lookups) != 1 or engine.parallelism.sharded or engine.parallelism.parallel is not None:
        return False
    scout = Forward(step, "scout")

    buffers, replayed = engine.guard.remember_buffers(), rng.Replayed(step.device)
    engine.entrance.forward = scout
    with engine.parallelism.eagerly(True):
        step.call(as_far_as_reached(closure))
    engine.entrance.forward = None
    buffers()
    replayed.again()
    return scout.cursor > 0
