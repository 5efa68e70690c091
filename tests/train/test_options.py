"""Options that come from a method's signature and from TrainingArguments."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import fastadv
from fastadv.jobs import method_options, signatures
from fastadv.jobs.errors import UserError
from fastadv.methods.options import options_of
from fastadv.train import options


def test_methods_are_those_that_fastadv_exports() -> None:
    assert method_options.methods()["fgm"] is fastadv.FGM
    assert method_options.methods()["pgd"] is fastadv.PGD
    assert "method" not in method_options.methods()


def test_parameters_are_the_signatures() -> None:
    pgd, fgm = method_options.parameters(fastadv.PGD), method_options.parameters(fastadv.FGM)
    assert {"epsilon", "step_size", "steps", "norm", "scope", "random_start", "clean_weight", "every"} <= set(pgd)
    assert pgd["step_size"] == 0.3
    assert not {"step_size", "steps"} & set(fgm), "FGM decides these itself"
    assert not {"model", "backward", "scaler"} & set(pgd)


@pytest.mark.parametrize(("name", "method"), method_options.methods().items())
def test_the_source_says_what_the_class_says(name: str, method: Any) -> None:
    assert list(signatures.methods()[name].options.items()) == list(options_of(method).items())


def test_every_exported_method_is_listed() -> None:
    exported = [getattr(fastadv, name) for name in fastadv.__all__]
    methods = [one for one in exported if isinstance(one, type) and issubclass(one, fastadv.Method)]
    assert list(method_options.methods().values()) == [
        one for one in methods if one not in (fastadv.Method, fastadv.EmbeddingMethod)
    ]


def test_training_arguments_are_those_of_transformers() -> None:
    assert signatures.training_fields() == [field.name for field in dataclasses.fields(TrainingArguments) if field.init]


@pytest.mark.parametrize("method", method_options.methods().values())
def test_every_method_takes_the_dtype_of_its_probes(method: type[fastadv.Method]) -> None:
    assert options.split(["--probe-dtype", "bfloat16"], method).method == {"probe_dtype": torch.bfloat16}


def test_split() -> None:
    given = [
        "--epsilon",
        "0.5",
        "--scope=token",
        "--learning-rate",
        "3e-5",
        "--bf16",
        "--random-start",
        "--max_steps",
        "4",
    ]
    found = options.split(given, fastadv.PGD)
    assert found.method == {"epsilon": 0.5, "scope": "token", "random_start": True}
    assert found.training == {"learning_rate": "3e-5", "bf16": None, "max_steps": "4"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("none", None),
        ("True", True),
        ("l2", "l2"),
        ("bfloat16", torch.bfloat16),
        (None, True),
    ],
)
def test_literal(text: str | None, value: object) -> None:
    assert method_options.literal(text) == value
    assert type(method_options.literal(text)) is type(value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--epsilom", "1"], "there is no option --epsilom: did you mean --epsilon?"),
        (
            ["--steps", "3"],
            "--steps is no parameter of FGM (of AWP, LLR, PGD, SMART, VAT, YOPO, FreeLB); it takes --epsilon",
        ),
        (["--xyzzy"], "there is no option --xyzzy: see"),
        (["--epsilon", "1", "2"], "'2' belongs to no option"),
        (["--eval-strategy", "epoch"], "--eval-strategy is decided by this command"),
        (["--backward", "x"], "there is no option --backward"),
    ],
)
def test_split_errors(given: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        options.split(given, fastadv.FGM)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--epsilon", "1"], '--epsilon belongs to one method: give it in a --try, such as --try "pgd steps=3"'),
        (["--seed", "1"], "--seed is decided by this command: give --seeds"),
        (["--save-strategy", "epoch"], "--save-strategy is decided by this command"),
    ],
)
def test_a_command_that_trains_with_several_methods_refuses_what_it_would_ignore(
    given: list[str], message: str
) -> None:
    assert options.split(["--bf16"], None).training == {"bf16": None}
    with pytest.raises(UserError) as caught:
        options.split(given, None)
    assert message in str(caught.value)


def test_training_arguments(tmp_path: Path) -> None:
    args = options.training_arguments({"num_train_epochs": "2", "use_cpu": None}, output_dir=tmp_path)
    assert (args.num_train_epochs, args.use_cpu, args.learning_rate) == (2.0, True, 1e-4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": "fast"}, "invalid float value: 'fast'"),
        ({"lr_scheduler_type": "zigzag"}, "zigzag"),
        ({"warmup_steps": "-1"}, "warmup_steps"),
        ({"learning_rate": None}, "expected one argument"),
    ],
)
def test_training_arguments_errors(tmp_path: Path, given: dict[str, str | None], message: str) -> None:
    with pytest.raises(UserError) as caught:
        options.training_arguments(given, output_dir=tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
