# mypy: disable-error-code="no-untyped-call"
"""Read and check all parts of a run before anything is trained or written."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import set_seed

from fastadv.jobs import method_options
from fastadv.jobs.errors import UserError
from fastadv.jobs.surroundings import quiet
from fastadv.methods import Method
from fastadv.methods.radius_losses import scaled
from fastadv.train import data, model, options, overview
from fastadv.train.data import DataSettings, Sample, Samples
from fastadv.train.labels import REGRESSION, Scale
from fastadv.train.modeling_mean_pool import MeanPoolClassifier
from fastadv.train.overview import Overview
from fastadv.train.tokens import Tokens

METHOD = "fgm"
TRAIN_SAMPLES = 3200  # of the default data: two trainings and their evaluations then fit into ten minutes on two cores
RADII = (0.1, 0.2)


@dataclass(frozen=True)
class Settings:
    """Hold the options of `fastadv train`. Their names are the keys of settings.json, and stay."""

    model: str = model.DEFAULT
    data: DataSettings = field(default_factory=DataSettings)
    method: str = METHOD
    max_length: int = 128
    head_dropout: float = 0.1
    attack_radii: tuple[float, ...] = RADII
    attack_steps: int = 10
    attack_samples: int = 500
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """Hold settings with everything they name, read and checked."""

    settings: Settings
    model_path: str
    samples: Samples
    tokenizer: Any
    train: Tokens
    test: Tokens
    method: type[Method]
    method_arguments: dict[str, Any]
    training: dict[str, str | None]
    overview: Overview
    scale: Scale | None = None  # of regression: the numbers of `train` are standardised by it

    def arguments(self, folder: Path, **fixed: Any) -> Any:
        """Make the TrainingArguments of one training."""
        return training_arguments(self.training, folder, **fixed)

    def build(self, seed: int) -> MeanPoolClassifier:
        """Build the classifier at the start of training: the same for the same seed."""
        set_seed(seed)
        return model.build(self.model_path, self.samples.labels, self.settings.head_dropout, self.samples.task)

    @property
    def adversary(self) -> tuple[type[Method], dict[str, Any]]:
        """Method and arguments, as `AdversarialTrainer` takes them."""
        return self.method, self.method_arguments

    def check_adversary(self, seed: int) -> None:
        """Make the method once around the model that will be trained.

        Raises:
            UserError: the method refuses its arguments.
        """
        given = self.method_arguments
        sized = scaled(given, options.usual_radius(self.method)) if given.get("epsilon") == options.AUTO else given
        try:
            self.method(self.build(seed), **sized).close()
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"{self.method.__name__}: {error}") from None

    def description(self) -> dict[str, Any]:
        """Lay out the settings for result.json and the report."""
        settings = asdict(self.settings)
        settings.pop("extra")
        return {
            **settings,
            "data": self.samples.description(),
            "task": self.samples.task,
            "overview": self.overview.as_dict(),
            "method": self.method.__name__,
            "method_arguments": self.method_arguments,
            "training_arguments": {**options.TRAINING, **self.training},
        }


def training_arguments(training: dict[str, str | None], folder: Path, **fixed: Any) -> Any:
    """Make the TrainingArguments of one process on one device."""
    given = {name: value for name, value in training.items() if name not in fixed}
    if not torch.accelerator.is_available():
        given.setdefault("use_cpu", "True")  # else bf16 is refused
        given.setdefault("dataloader_pin_memory", "False")  # else every epoch warns
    args = options.training_arguments(given, output_dir=folder, disable_tqdm=True, **fixed)
    # One process trains on one device; nn.DataParallel would run the embedding in several threads at once.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def prepare(settings: Settings) -> Job:
    """Read and check everything; write nothing.

    Raises:
        UserError: see `data.load`, `model.encoder_config`, `options.split`; and numbers out of range.
    """
    _check(settings)
    quiet(offline=_is_local(settings))
    method = method_options.method_class(settings.method)
    extra = options.split(settings.extra, method)
    folder = model.resolve(settings.model)
    model.encoder_config(folder)
    if settings.data.data == data.DEFAULT and settings.data.train_samples is None:
        settings = replace(settings, data=replace(settings.data, train_samples=TRAIN_SAMPLES))
    samples = data.load(settings.data)
    scale, to_learn = standardised(samples)
    tokenizer = model.tokenizer_of(folder)
    tokenizer.model_max_length = settings.max_length  # saved with the models: who loads them truncates as training did
    train, test = (Tokens(some, tokenizer, settings.max_length) for some in (to_learn, samples.test))
    args = training_arguments(extra.training, Path("unused"))
    job = Job(
        settings,
        folder,
        samples,
        tokenizer,
        train,
        test,
        method,
        options.arguments(method, extra.method, options.AUTO),
        extra.training,
        overview.of(samples, train, tokenizer, args, settings.max_length),
        scale,
    )
    job.check_adversary(args.seed)
    return job


def standardised(samples: Samples) -> tuple[Scale | None, list[Sample]]:
    """Standardise the numbers of a regression's training samples; classes stay as they are."""
    if samples.task != REGRESSION:
        return None, samples.train
    numbers = [(sample, float(cast("float", sample.label))) for sample in samples.train]
    scale = Scale.of([number for _, number in numbers])
    return scale, [replace(sample, label=scale.standardised(number)) for sample, number in numbers]


def _check(settings: Settings) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "this command runs in one process; to train in several, use "
            "fastadv.integrations.transformers.AdversarialTrainer in a script of your own"
        )
    for name, value in (("attack-steps", settings.attack_steps), ("attack-samples", settings.attack_samples)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    if not settings.attack_radii or min(settings.attack_radii) <= 0:
        raise UserError("--radii must be one or more numbers above 0, such as 0.1,0.2")
    if settings.max_length < 3:
        raise UserError(f"--max-length must be at least 3, not {settings.max_length}")
    if not 0 <= settings.head_dropout < 1:
        raise UserError(f"--head-dropout must be at least 0 and below 1, not {settings.head_dropout}")
    if settings.data.train_samples is not None and settings.data.train_samples < 2:
        raise UserError(f"--train-samples must be at least 2, not {settings.data.train_samples}")


def _is_local(settings: Settings) -> bool:
    local_data = settings.data.data == data.DEFAULT or Path(settings.data.data).exists()
    return local_data and (settings.model == model.DEFAULT or Path(settings.model).expanduser().exists())
