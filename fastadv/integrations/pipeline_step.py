"""A step whose passes a pipeline's schedule runs, on the rank that has the embedding."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from fastadv.engine.forward import Forward
from fastadv.engine.outputs import loss_of
from fastadv.engine.owner import Unowned
from fastadv.engine.results import Pass
from fastadv.engine.step import Step

if TYPE_CHECKING:
    from fastadv.integrations.pipeline import Pipeline

PASSES = (
    "through a pipeline a step takes full passes and probes of one loss: FGM, FGSM, PGD, FreeLB and NEFTune. SMART, "
    "VAT, LLR and BregmanProximal compare the logits of two passes, YOPO's partial passes and attack= have another "
    "end than the loss, and AWP moves the weights of all stages: take one of the former, or shard the model by FSDP2"
)
OPTIONS = "through a pipeline a method goes without backward=, scaler=, probe_dtype=, process_group= and tied='both'"
ONCE = (
    "the first stage ran its embedding {calls} times for {batches} micro-batches: it must run it once for each, and "
    "outside of checkpointed segments"
)


class Verb(enum.IntEnum):
    """What the first rank tells the others to do."""

    BEGIN = 0
    TRAIN = 1
    PROBE = 2
    END = 3
    VOID = 4


class PipelineStep(Step):
    """Forward and backward of each pass are one run of the schedule; what needs them apart is refused."""

    def __init__(self, pipeline: Pipeline, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._pipeline = pipeline
        engine = self.engine
        owned = not isinstance(engine.owner, Unowned) or engine.owner.scaler is not None
        if owned or engine.probe_autocast.dtype is not None or engine.ranks is not None:
            raise ValueError(OPTIONS)
        if not engine.enters:
            raise ValueError(OPTIONS if engine.modules else PASSES)
        if self._term is not None or engine.split is not None or self._target is not None:
            raise ValueError(PASSES)

    def descend(self, weight: float = 1.0, *, last: bool = True, **others: Any) -> Pass:  # noqa: ARG002
        """A full pass of the step's loss."""
        if others:
            raise ValueError(PASSES)
        loss = self._pass(Verb.TRAIN, weight)
        self.tables.collect()
        self._followed = self._started or self._start is None
        self.first = self.first or Pass(loss, None)
        return Pass(loss, None)

    def probe(self, target: Any = None) -> Tensor:
        """The perturbation's gradient alone: every stage freezes its weights. The loss is not told."""
        if target is not None or self._target is not None:
            raise ValueError(PASSES)
        loss = self._pass(Verb.PROBE)
        self._followed = True
        return loss

    def plain(self, read: Any = loss_of) -> Pass:
        """Plain training."""
        if read is not loss_of:
            raise ValueError(PASSES)
        self.draws.next_pass()
        self.first = Pass(self._pipeline.lead(Verb.TRAIN), None)
        return self.first

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """No pass stops half way."""
        raise ValueError(PASSES)

    gradients_by = look = partial = forward

    def _pass(self, verb: Verb, weight: float = 1.0) -> Tensor:
        engine, forward = self.engine, Forward(self, "probe" if verb == Verb.PROBE else "full")
        self.draws.next_pass()
        engine.entrance.forward = forward
        with self.perturbation.collecting():
            loss = self._pipeline.lead(verb, weight)
        if forward.cursor != self._pipeline.batches:
            raise RuntimeError(ONCE.format(calls=forward.cursor, batches=self._pipeline.batches))
        self.lookups.settle(forward.cursor)
        forward.ended, engine.entrance.forward = True, None
        return loss
