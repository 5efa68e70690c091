"""Take a method's parameters and TrainingArguments as options, by their own names."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

from fastadv.jobs import names, signatures
from fastadv.jobs.errors import UserError
from fastadv.jobs.method_options import literal, parameters, signature_of

if TYPE_CHECKING:  # torch comes with a method, and not before
    from fastadv.methods import Method

IN_A_SCRIPT = "leave it out, or write a script with AdversarialTrainer"
TAKEN = dict.fromkeys((
    "resume_from_checkpoint", "restore_callback_states_from_checkpoint", "disable_tqdm", "local_rank", "deepspeed",
    "do_train", "do_eval", "do_predict", "eval_strategy", "eval_on_start", "load_best_model_at_end",
    "metric_for_best_model", "push_to_hub", "remove_unused_columns", "label_names",
), IN_A_SCRIPT)  # fmt: skip
# By commands that train several times.
TAKEN_BY_SEVERAL = {"seed": "give --seeds, with commas between", "save_strategy": "it keeps no models"}

AUTO = "auto"  # the epsilon that suggest_radius finds

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


def arguments(method: type[Method], given: Mapping[str, Any], radius: float | str | None = None) -> dict[str, Any]:
    """Complete a method's arguments by this job's defaults. `radius`: the epsilon where none is given.

    Steps and starts that are not given keep their proportion to the radius, and with `auto` are fractions of it.

    Raises:
        UserError: `auto` for a method without a radius, or beside a step or a start.
    """
    from fastadv.methods.radius_losses import SCALED, has_radius, is_number

    found = {**METHOD_DEFAULTS.get(method.__name__.lower(), {}), **given}
    if not has_radius(method):
        return found
    if radius is not None:
        found["epsilon"] = given.get("epsilon", radius)
    epsilon, usual = found.get("epsilon"), usual_radius(method)
    both = [names.option(name) for name in SCALED if name in given]
    if epsilon == AUTO and both:
        raise UserError(f"--epsilon {AUTO} sets {' and '.join(both)} too: leave it out, or give a number for --epsilon")
    part = 1.0 if epsilon == AUTO else epsilon
    mine = [name for name in SCALED if name not in given and is_number(found.get(name)) and is_number(part)]
    return {**found, **{name: round(part * found[name] / usual, 12) for name in mine}}


def usual_radius(method: type[Method]) -> Any:
    """Return the epsilon of this job for a method, found for MiniLM."""
    return {**parameters(method), **METHOD_DEFAULTS.get(method.__name__.lower(), {})}["epsilon"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Hold the options beyond those of the job itself."""

    method: dict[str, Any]
    training: dict[str, str | None]


def split(arguments: Sequence[str], method: type[Method] | str | None, own: Sequence[str] = ()) -> Options:
    """Sort options into the method's parameters and TrainingArguments.

    Args:
        arguments: as the command line has them.
        method: the class or its name; None for a command that trains with several, whose options are TrainingArguments
            alone.
        own: the names of the options that the command declares itself, to suggest one of them.

    Raises:
        UserError: an option that is neither; the message names the nearest one.
    """
    accepted = {} if method is None else parameters(method)
    fields = signatures.training_fields()
    taken = TAKEN if method is not None else {**TAKEN, **TAKEN_BY_SEVERAL}
    found = Options({}, {})
    for name, value in names.pairs(arguments).items():
        plain = name.removeprefix("no_") if name not in fields else name
        if name in accepted:
            found.method[name] = literal(value)
        elif plain in taken:
            raise UserError(f"{names.option(name)} is decided by this command: {taken[plain]}")
        elif plain in fields:
            found.training[name] = value
        else:
            _refuse_parameter(name, method, own)
            names.refuse(name, [*own, *accepted], [one for one in fields if one not in taken])
    return found


def _refuse_parameter(name: str, method: type[Method] | str | None, own: Sequence[str]) -> None:
    """Refuse the parameter of another method, and say whose it is."""
    owners = [other.name for other in signatures.methods().values() if name in parameters(other.name)]
    if not owners and not (name == "method" and method is None):
        return
    near = names.related(name, own)
    hint = f"; {names.suggestion(near)}" if near else ""
    if method is None:
        raise UserError(
            f'{names.option(name)} belongs to one method: give it in a --try, such as --try "pgd steps=3"{hint}'
        )
    mine = ", ".join(names.option(one) for one in parameters(method))
    who = signature_of(method).name if isinstance(method, str) else method.__name__
    raise UserError(f"{names.option(name)} is no parameter of {who} (of {', '.join(owners)}); it takes {mine}{hint}")


def training_arguments(given: Mapping[str, str | None], **fixed: Any) -> Any:
    """Make TrainingArguments of the job's defaults, the command line (`given`) and the values that are `fixed`.

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
    _check_numbers(parsed)
    return parsed


def _check_numbers(parsed: Any) -> None:
    """Refuse numbers that TrainingArguments takes, and that no training can be planned with."""
    whole = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "seed": 0}
    for name, least in whole.items():
        value = getattr(parsed, name)
        if not least <= value < 2**32:
            raise UserError(f"{names.option(name)} must be from {least} to {2**32 - 1}, not {value}")
    if parsed.data_seed is not None and not 0 <= parsed.data_seed < 2**32:
        raise UserError(f"--data-seed must be from 0 to {2**32 - 1}, not {parsed.data_seed}")
    for name in ("num_train_epochs", "learning_rate", "weight_decay", "max_grad_norm"):
        value = getattr(parsed, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"{names.option(name)} must be a number, 0 or above, not {value}")


def listing() -> str:
    """List methods, parameters and defaults for `fastadv train --help`."""
    lines = ["Parameters of the methods, with their defaults in this job:"]
    for name in signatures.methods():
        defaults = dict(parameters(name))
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
