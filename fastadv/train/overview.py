"""Look at the data before anything is trained: what is there, and what is likely to go wrong."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from fastadv.train.data import Sample, Samples
from fastadv.train.labels import CLASSIFICATION, MULTI_LABEL, REGRESSION
from fastadv.train.sources import MISSING
from fastadv.train.tokens import Tokens

# A warning is given beyond these.
UNKNOWN = 0.05  # of the tokens
TRUNCATED = 0.2  # of the texts
LARGEST = 0.9  # of the samples, in one class
FEW = 10  # training samples of a class
STEPS = 50  # optimizer steps
TEST = 100  # test samples
REPEATED = 0.2  # of the rows
CONTRADICTING = 0.01  # of the rows
NAMED = 5  # classes, in a warning


@dataclass(frozen=True)
class Overview:
    """Hold what is known of data, tokens and training before it begins."""

    task: str
    train: dict[str, int]  # samples by class; for regression, all
    test: dict[str, int]
    tokens: int  # of the training texts, without the tokenizer's own
    unknown: float  # share of these
    truncated: float  # share of the training texts
    cut: float  # share of the tokens that truncation takes away
    steps: int
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Lay it out for result.json, but for the warnings, which stand beside it."""
        found = asdict(self)
        del found["warnings"]
        return found


def of(samples: Samples, tokens: Tokens, tokenizer: Any, args: Any, max_length: int) -> Overview:
    """Look at the samples and at the tokens of those to train on. `args`: TrainingArguments."""
    special = tokenizer.num_special_tokens_to_add() * len(tokens)
    total = max(1, sum(tokens.lengths()) - special)
    cut = sum(tokens.cut)
    found = Overview(
        samples.task,
        counts(samples.train, samples),
        counts(samples.test, samples),
        total,
        _unknown(tokens, tokenizer) / total,
        len(tokens.cut) / len(tokens),
        cut / (cut + total),
        planned_steps(args, len(tokens)),
        [],
    )
    found.warnings.extend(_warnings(found, samples, max_length))
    return found


def counts(samples: Sequence[Sample], whole: Samples) -> dict[str, int]:
    """Count the samples of each class."""
    if whole.task == REGRESSION:
        return {whole.labels[0]: len(samples)}
    numbers = [0] * len(whole.labels)
    for sample in samples:
        for number in _classes(sample):
            numbers[number] += 1
    return dict(zip(whole.labels, numbers, strict=True))


def _classes(sample: Sample) -> list[int]:
    if isinstance(sample.label, tuple):
        return [number for number, there in enumerate(sample.label) if there]
    return [int(sample.label)]


def _unknown(tokens: Tokens, tokenizer: Any) -> int:
    unknown = tokenizer.unk_token_id
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)
    if unknown is None or unknown in others:  # GPT-2 calls its end token unknown, and knows every byte
        return 0
    return sum(item["input_ids"].count(unknown) for item in tokens.items)


def planned_steps(args: Any, samples: int) -> int:
    """Count the optimizer steps of a training, as the Trainer does."""
    if args.max_steps > 0:
        return int(args.max_steps)
    size: int = args.train_batch_size
    accumulated: int = args.gradient_accumulation_steps
    epochs: float = args.num_train_epochs
    batches = samples // size if args.dataloader_drop_last else math.ceil(samples / size)
    return math.ceil(epochs * max(1, math.ceil(batches / accumulated)))


def _warnings(found: Overview, samples: Samples, max_length: int) -> Iterator[str]:
    if samples.task != REGRESSION:
        yield from _about_classes(found, samples)
    yield from _about_rows(samples)
    if found.unknown > UNKNOWN:
        yield (
            f"{found.unknown:.0%} of the tokens are unknown to the tokenizer: is the model made for this language? "
            "Give another --model"
        )
    if found.truncated > TRUNCATED:
        yield (
            f"{found.truncated:.0%} of the texts are longer than {max_length} tokens and are cut, which loses "
            f"{found.cut:.0%} of all tokens: raise --max-length, or split the texts"
        )
    if found.steps < STEPS:
        yield (
            f"{found.steps} optimizer steps in all teach little: raise --num-train-epochs, or lower "
            "--per-device-train-batch-size"
        )
    if len(samples.test) < TEST:
        yield (
            f"{len(samples.test)} test samples measure little: the intervals will be wide. Give more with --test-data "
            "or a larger --test-fraction"
        )


def _about_classes(found: Overview, samples: Samples) -> Iterator[str]:
    sizes, tested = ({n: c for n, c in side.items() if n not in MISSING} for side in (found.train, found.test))
    missing = [name for name in found.train if name in MISSING]
    if missing:
        yield f"{_named(missing)} is a class now: where it stands for a missing label, leave it out with --skip-empty"
    largest = max(found.train, key=lambda name: found.train[name])
    share = found.train[largest] / len(samples.train)
    if share > LARGEST and samples.task == CLASSIFICATION:
        yield (
            f"{share:.1%} of the training samples are {largest!r}: a model that always answers so is right as often. "
            "Read F1, not accuracy; take fewer of that class, or more of the others"
        )
    few = [name for name, size in sizes.items() if size < FEW]
    if few:
        yield f"fewer than {FEW} training samples: {_named(few)}. Collect more, or join such classes with others"
    untested = [name for name, size in tested.items() if size == 0]
    if untested:
        yield f"no test samples: {_named(untested)}. How well these are told apart is not measured"
    if samples.task == MULTI_LABEL and share > LARGEST:
        yield f"{share:.1%} of the training samples are in {largest!r}: it tells little. Leave it out"


def _about_rows(samples: Samples) -> Iterator[str]:
    out = samples.left_out
    rows = len(samples.train) + len(samples.test) + out.repeated
    if out.contradicting > CONTRADICTING * rows:
        yield (
            f"{out.contradicting:,} rows repeat a text with another label, and the first is kept: find out which is "
            "right"
        )
    if out.repeated > REPEATED * rows:
        yield f"{out.repeated:,} rows repeat a text, and are left out: is --text-column the right one?"


def _named(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(map(repr, names[:NAMED])) + (f" and {more} more" if more > 0 else "")


def spread(samples: Sequence[Sample]) -> str:
    """Describe numbers: least, greatest, mean and deviation."""
    numbers = [float(cast("float", sample.label)) for sample in samples]
    mean, deviation = statistics.fmean(numbers), statistics.pstdev(numbers)
    return f"{min(numbers):g} to {max(numbers):g}, mean {mean:.3g}, deviation {deviation:.3g}"
