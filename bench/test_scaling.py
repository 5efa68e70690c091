"""How cost grows: with the vocabulary, the tokens, the embeddings' width and the number of steps."""

from __future__ import annotations

from typing import Any

import pytest

from bench import training
from bench.attack_steps import Ball
from bench.contest import Field
from bench.test_table_step import attack_step as table_field
from bench.workloads import SIZES, Shape, Size, classifier, inputs, loss_closure

pytestmark = [pytest.mark.steps, pytest.mark.once]
BALL = Ball(0.3, 0.2)
ATTACK = ("reference", "torch", "fused")
SMALL = 2  # layers of the network whose whole steps are timed: its table is what grows


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Points along each axis follow from the size."""
    size, name = SIZES[metafunc.config.getoption("--size")], metafunc.function.__name__
    axis = name.removeprefix("test_").replace("_", " ")
    metafunc.parametrize("value", size.growth[axis])


def along(axis: str, value: int, field: Field) -> Field:
    """What the report needs for its lines."""
    return field._replace(extra={"axis": axis, "value": value})


def attack(shape: Shape, device: str) -> Field:
    """Table scope, without what is compiled: a graph for every size takes longer than the size says.

    The script's r is what its table has moved by, and so has the table's rounding: the more rows share the step, the
    shorter each one's part of it.
    """
    field = table_field(shape, BALL, device)
    entries = {name: entry for name, entry in field.entries.items() if name in ATTACK}
    return field._replace(entries=entries, tolerance=5e-4)


@pytest.mark.parametrize("contestant", ATTACK)
def test_vocabulary(contest: Any, size: Size, device: str, value: int, contestant: str) -> None:
    """Table scope should not notice: a batch touches no more rows than it has positions."""
    shape = size.shapes["BERT-base"]._replace(vocabulary=value)
    make = lambda: along("vocabulary", value, attack(shape, device))  # noqa: E731
    contest(f"attack step, vocabulary {value:,}", contestant, make, rounds=15, budget=2)


@pytest.mark.parametrize("contestant", ATTACK)
def test_tokens(contest: Any, size: Size, device: str, value: int, contestant: str) -> None:
    """Linear."""
    base = size.shapes["BERT-base"]
    shape = base._replace(batch=value // base.length)
    make = lambda: along("tokens", value, attack(shape, device))  # noqa: E731
    contest(f"attack step, {value:,} tokens", contestant, make, rounds=15, budget=2)


@pytest.mark.parametrize("contestant", ATTACK)
def test_dimension(contest: Any, size: Size, device: str, value: int, contestant: str) -> None:
    """Linear."""
    shape = size.shapes["BERT-base"]._replace(dimension=value)
    make = lambda: along("dimension", value, attack(shape, device))  # noqa: E731
    contest(f"attack step, D {value:,}", contestant, make, rounds=15, budget=2)


def steps_field(size: Size, device: str, vocabulary: int, steps: int) -> Field:
    """PGD-K on the network's first layers."""
    hidden, _, heads, inner = size.network
    model = classifier((hidden, SMALL, heads, inner), vocabulary, device)
    closure = loss_closure(model, inputs(*size.small, vocabulary, device))
    made = {
        name: training.step(name, f"PGD-{steps}", model, closure) for name in ("plain", "reference", "torch", "fused")
    }
    return training.field(model, made, (*size.small, vocabulary, hidden), tolerance=1e-3)


@pytest.mark.parametrize("contestant", ["plain", *ATTACK])
def test_steps(contest: Any, size: Size, device: str, value: int, contestant: str) -> None:
    """Of PGD: a full pass more for the script, a probe more for the others."""
    make = lambda: along("steps", value, steps_field(size, device, size.vocabularies[0], value))  # noqa: E731
    contest(f"training step, PGD-{value}", contestant, make, rounds=5, warmup=0)


@pytest.mark.parametrize("contestant", ["plain", *ATTACK])
def test_whole_step(contest: Any, size: Size, device: str, value: int, contestant: str) -> None:
    """PGD-3 by vocabulary: what grows is the table's gradient, which nobody can do without, and the script's attack."""
    make = lambda: along("whole step", value, steps_field(size, device, value, 3))  # noqa: E731
    contest(f"training step, PGD-3, small network, V {value:,}", contestant, make, rounds=5, warmup=0)
