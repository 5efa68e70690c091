"""Options that are not written down here: a method's parameters and TrainingArguments, by their own names."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch

import fastadv
from fastadv.methods import EmbeddingMethod, Method
from fastadv.methods.options import options_of
from fastadv.train.errors import UserError

# What the job decides itself, or what only a program can give.
INTERNAL = {"self", "model", "method", "parameters", "backward", "scaler", "atomic"}
TAKEN = {
    "resume_from_checkpoint", "restore_callback_states_from_checkpoint", "disable_tqdm", "local_rank", "deepspeed",
    "do_train", "do_eval", "do_predict", "eval_strategy", "eval_on_start", "load_best_model_at_end",
    "metric_for_best_model", "push_to_hub", "remove_unused_columns", "label_names",
}  # fmt: skip

# Parameters of a method where this job wants others than the method's own: a ball around each sample, so that the
# strength does not depend on the batch, and the radius and steps that the sweep in docs/training.md chose.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "fgm": {"epsilon": 0.1, "scope": "sample"},
    "pgd": {"epsilon": 0.1, "step_size": 0.05, "steps": 3, "scope": "sample"},
    "freeat": {"replays": 2},
    "freelb": {"epsilon": 0.1, "step_size": 0.05, "random_start": 0.05},
    "yopo": {"epsilon": 0.1, "step_size": 0.02, "random_start": 0.03},
    "vat": {"epsilon": 0.3},
    "awp": {"gamma": 0.001},
    "bregmanproximal": {"decay": 0.99},
}

# TrainingArguments of this job where it wants other defaults than transformers.
TRAINING = {
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-4,
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "logging_steps": 5,
    "train_sampling_strategy": "group_by_length",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "report_to": "none",
    "seed": 42,
}


def methods() -> dict[str, type[Method]]:
    """Every method that fastadv exports, by its lower-case name."""
    exported = [getattr(fastadv, name) for name in fastadv.__all__]
    classes = [one for one in exported if isinstance(one, type) and issubclass(one, Method)]
    return {one.__name__.lower(): one for one in classes if one not in (Method, EmbeddingMethod)}


def method_class(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        UserError: there is none.
    """
    known = methods()
    if name.lower() not in known:
        raise UserError(f"there is no method {name!r}: choose one of {', '.join(known)}")
    return known[name.lower()]


def parameters(method: type[Method]) -> dict[str, Any]:
    """A method's options that a command line can give, with their defaults."""
    return {name: default for name, default in options_of(method).items() if name not in INTERNAL}


def pairs(arguments: Sequence[str]) -> dict[str, str | None]:
    """`--name value`, `--name=value` and a bare `--name`, as a dict with underscores in its names."""
    found: dict[str, str | None] = {}
    name: str | None = None
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = value if equals else None
        elif name is not None and found[name] is None:
            found[name], name = argument, None
        else:
            raise UserError(f"{argument!r} belongs to no option: see `fastadv train --help`")
    return found


def literal(text: str | None) -> Any:
    """A parameter's value as it would be written in Python, more or less: none, true, 3, 0.5, l2, bfloat16."""
    if text is None:
        return True
    constants = {"none": None, "true": True, "false": False, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if text.lower() in constants:
        return constants[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line said beyond the options of the job itself."""

    method: dict[str, Any]
    training: dict[str, str | None]


def split(arguments: Sequence[str], method: type[Method], known: Iterable[str] = ()) -> Options:
    """Sort options into the method's parameters and TrainingArguments.

    Raises:
        UserError: an option that is neither; the message names the nearest one.
    """
    accepted = parameters(method)
    fields = training_fields()
    options = Options({}, {})
    for name, value in pairs(arguments).items():
        plain = name.removeprefix("no_") if name not in fields else name
        if name in accepted:
            options.method[name] = literal(value)
        elif plain in fields and plain not in TAKEN:
            options.training[name] = value
        else:
            _unknown(name, method, [*accepted, *fields, *known])
    return options


def _unknown(name: str, method: type[Method], known: Sequence[str]) -> NoReturn:
    option = "--" + name.replace("_", "-")
    if name in TAKEN:
        raise UserError(f"{option} is decided by this job: leave it out, or write a script with AdversarialTrainer")
    owners = [other.__name__ for other in methods().values() if name in parameters(other)]
    if owners:
        mine = ", ".join("--" + one.replace("_", "-") for one in parameters(method))
        raise UserError(f"{option} is no parameter of {method.__name__} (of {', '.join(owners)}); it takes {mine}")
    near = difflib.get_close_matches(name, known, n=1)
    hint = f": did you mean --{near[0].replace('_', '-')}?" if near else ": see `fastadv train --help`"
    raise UserError(f"there is no option {option}{hint}")


def training_fields() -> dict[str, Any]:
    """The fields of TrainingArguments, by name."""
    from transformers import TrainingArguments

    return {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}


def training_arguments(given: Mapping[str, str | None], **fixed: Any) -> Any:
    """TrainingArguments of the job's defaults, what the command line gave, and what is `fixed`.

    Raises:
        UserError: a value that cannot be read, or that TrainingArguments refuses.
    """
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(message)

    defaults = {name: value for name, value in TRAINING.items() if name not in given}
    arguments = []
    for name, value in {**defaults, **given, **fixed}.items():
        arguments += [f"--{name}"] if value is None else [f"--{name}", str(value)]
    try:
        parser = Parser(cast("Any", TrainingArguments), allow_abbrev=False)
        with contextlib.redirect_stderr(io.StringIO()):
            (parsed,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UserError(f"TrainingArguments: {' '.join(str(error).split())}") from None
    return parsed


def listing() -> str:
    """Methods, their parameters and the defaults, for `fastadv train --help`."""
    lines = ["Parameters of the methods, with their defaults in this job:"]
    for name, cls in methods().items():
        defaults = dict(parameters(cls))
        defaults.update(METHOD_DEFAULTS.get(name, {}))
        lines += _wrapped(f"{name}: ", defaults)
    lines += [
        "",
        "TrainingArguments of transformers by their own names (--seed, --bf16, --max-steps, ...);",
        "this job sets",
    ]
    return "\n".join(lines + _wrapped("", TRAINING))


def _wrapped(start: str, defaults: Mapping[str, Any]) -> list[str]:
    # "\xa0" keeps an option and its value on one line.
    shown = [f"--{key.replace('_', '-')}\xa0{value}" for key, value in defaults.items()]
    text = textwrap.fill(
        start + ", ".join(shown), 76, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )
    return text.replace("\xa0", " ").splitlines()
