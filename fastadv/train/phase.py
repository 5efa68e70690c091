# mypy: disable-error-code="no-untyped-call"
"""Train once, plainly or with a method. The two trainings of a comparison differ in nothing else."""

from __future__ import annotations

import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import DataCollatorWithPadding, PrinterCallback, Trainer

from fastadv.integrations import checkpoints
from fastadv.integrations.adversary import Adversary
from fastadv.integrations.checkpoints import CheckpointError
from fastadv.integrations.transformers import AdversarialMixin
from fastadv.integrations.whole_checkpoints import WholeCheckpoints
from fastadv.jobs.conditions import Conditions, Watch
from fastadv.jobs.errors import Interrupted, UserError
from fastadv.jobs.log import read_log, rewind
from fastadv.jobs.memory import PeakMemory
from fastadv.train.behind import Behind
from fastadv.train.evaluate import Evaluator
from fastadv.train.job import Job
from fastadv.train.log import JsonLines, Progress, StopTraining
from fastadv.train.model import check_same_model, unscale
from fastadv.train.modeling_mean_pool import MeanPoolClassifier
from fastadv.train.tokens import LengthGrouped, Tokens


@dataclass(frozen=True)
class Cost:
    """Hold the cost of a training."""

    steps: int
    seconds_per_step: float  # the median
    peak_memory: int  # bytes
    device: str
    conditions: Conditions | None = None


class Trained(NamedTuple):
    """Hold a trained model, what it cost, and what was said of it meanwhile."""

    model: MeanPoolClassifier
    cost: Cost
    warnings: list[str]


class PlainTrainer(WholeCheckpoints, Trainer):
    """Train with batches whose order follows from seed and epoch alone."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length" and isinstance(data, Tokens):
            size = self.args.train_batch_size
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return LengthGrouped(data.lengths(), size, seed)
        return super()._get_train_sampler(train_dataset)


class AdversarialPhaseTrainer(AdversarialMixin, PlainTrainer):
    """Train adversarially on the same batches."""


def train(
    job: Job,
    title: str,
    folder: Path,
    log: Path,
    adversary: Adversary | None,
    *,
    resume: bool = False,
    **fixed: Any,
) -> Trained:
    """Train one model; checkpoints go to `folder`, rows to `log`. `fixed`: TrainingArguments set by the command.

    Raises:
        Interrupted: the user stopped it, after a checkpoint was saved.
        UserError: the checkpoint to resume from is of another model, or another method.
    """
    args = job.arguments(folder, **fixed)
    model = job.build(args.seed)
    progress, stop, behind = Progress(title), StopTraining(), Behind(log, title)
    common: dict[str, Any] = {
        "model": model,
        "args": args,
        "train_dataset": job.train,
        "processing_class": job.tokenizer,
        "data_collator": DataCollatorWithPadding(job.tokenizer),
        "callbacks": [JsonLines(log, title), progress, stop, *([] if adversary is None else [behind])],
    }
    trainer = PlainTrainer(**common) if adversary is None else AdversarialPhaseTrainer(**common, adversary=adversary)
    trainer.remove_callback(PrinterCallback)
    checkpoint = _to_go_on(trainer, title, model) if resume else None
    rewind(log, title, 0 if checkpoint is None else checkpoints.number(checkpoint))
    try:
        with stop, PeakMemory(args.device) as memory, Watch(resumed=checkpoint is not None) as watch:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except CheckpointError as error:
        raise UserError(str(error)) from None
    finally:
        progress.close()
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"{title}: stopped after step {trainer.state.global_step} of {trainer.state.max_steps}")
    if job.scale is not None:
        unscale(model, job.scale)
    seconds = [value for row in read_log(log, title) for value in row["step_seconds"]]
    median = statistics.median(seconds or [0.0])  # a log that somebody removed
    cost = Cost(trainer.state.global_step, median, memory.peak, str(args.device), watch.conditions)
    return Trained(model, cost, [*getattr(trainer, "warnings", []), *behind.warnings])


def _to_go_on(trainer: PlainTrainer, title: str, model: MeanPoolClassifier) -> Path | None:
    """Choose the checkpoint to go on from, and say which are passed over.

    Raises:
        UserError: it is of another model.
    """
    checkpoint, passed_over = trainer.newest()
    for message in passed_over:
        print(f"{title}: {message}", file=sys.stderr)
    if passed_over and checkpoint is None:
        print(f"{title}: no checkpoint is whole: begins afresh", file=sys.stderr)
    elif checkpoint is not None:
        check_same_model(checkpoint, model)
        print(f"{title}: goes on from {checkpoint}", file=sys.stderr)
    return checkpoint


def measure(job: Job, model: MeanPoolClassifier, *, progress: bool = True) -> list[dict[str, Any]]:
    """Measure a model on all test samples, then under the attack at each radius on the first of them."""
    settings = job.settings
    evaluator = Evaluator(model, job.test, job.tokenizer, progress)
    return evaluator.measure(settings.attack_samples, settings.attack_radii, settings.attack_steps)


def only_answer(job: Job, clean: dict[str, Any]) -> str | None:
    """Name the class that the model answers whatever it reads: it is right on that class alone, and always there."""
    labels = [sample.label for sample in job.samples.test]
    right = [mark == "1" for mark in clean.get("right", "")]
    if len(set(labels)) > 1:
        for number, name in enumerate(job.samples.labels):
            if right == [label == number for label in labels] and any(right):
                return name
    return None


def cost_dict(cost: Cost) -> dict[str, Any]:
    """Lay out a cost for JSON."""
    return asdict(cost)
