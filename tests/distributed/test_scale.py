"""docs/scale.md counts as FSDP2 does: two gloo processes train a small Llama, and examples/scale.py predicts them."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import scale_runs, workers
from tests.pages import ROOT

pytestmark = [*workers.MARKS, pytest.mark.slow]
SCALE: dict[str, Any] = runpy.run_path(str(ROOT / "examples/scale.py"))
METHODS = {method.name: method for method in SCALE["METHODS"]}
EACH_METHOD = [("plain", "each"), *((name, choice) for name in scale_runs.METHODS for choice in SCALE["CHOICES"])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workers.start(scale_runs.run, "all", tmp_path_factory.mktemp("scale"))


def decoder(tied: bool) -> Any:
    return SCALE["Decoder"]("small", **scale_runs.SHAPE, tied=tied)


def predicted(model: Any, total: Any, replicas: bool) -> tuple[list[int], list[int]]:
    """All-gathers, reduce-scatters and all-reduces: how many, and the bytes of their results."""
    reductions, gradients = total.reductions * (model.layers + 1), SCALE["reduced"](model, total) // workers.WORLD
    return (
        [SCALE["gathers"](model, total), reductions, reductions * replicas],
        [SCALE["gathered"](model, total), gradients, gradients * replicas],
    )


@pytest.mark.parametrize("mesh", scale_runs.MESHES)
def test_the_shape_has_as_many_parameters(folder: Path, mesh: str) -> None:
    found = workers.by_rank(folder, mesh)[0]
    assert int(found["parameters"]) == decoder(mesh == "replicas").parameters


@pytest.mark.parametrize(("name", "choice"), EACH_METHOD)
def test_what_a_step_sends(folder: Path, name: str, choice: str) -> None:
    assert_sent(folder, "full", name, choice)


@pytest.mark.parametrize("name", ["plain", *scale_runs.METHODS])
def test_what_a_step_computes(folder: Path, name: str) -> None:
    """Products with weights; attention's are counted by the counter as a whole square, and left out."""
    batch, length = scale_runs.TOKENS
    flops = METHODS[name].total().products(decoder(tied=False), batch * length)
    for found in workers.by_rank(folder, "full"):
        assert int(found[f"{name} flops"]) == flops


@pytest.mark.parametrize("choice", SCALE["CHOICES"])
@pytest.mark.parametrize("name", ["PGD-3", "SMART"])
def test_what_a_step_sends_on_a_hybrid_mesh(folder: Path, name: str, choice: str) -> None:
    assert_sent(folder, "replicas", name, choice)


def assert_sent(folder: Path, mesh: str, name: str, choice: str) -> None:
    replicas = mesh == "replicas"
    for found in workers.by_rank(folder, mesh):
        counts, sizes = predicted(decoder(replicas), METHODS[name].total(choice), replicas)
        assert found[f"{name} {choice} counts"].tolist() == counts
        assert found[f"{name} {choice} bytes"].tolist() == sizes


@pytest.mark.parametrize("choice", SCALE["CHOICES"])
def test_what_is_held_between_passes(folder: Path, choice: str) -> None:
    """Whole gradients from the first full pass on, in float32; with "keep" whole weights too, in bf16."""
    model, pgd = decoder(tied=False), METHODS["PGD-3"]
    weights = SCALE["WEIGHT"] * model.parameters if choice == "keep" else 0
    for found in workers.by_rank(folder, f"held-{choice}"):
        between = found["between"]
        assert len(between) == len(pgd.passes) - 1
        assert between[:, 0].tolist() == [weights] * len(between)
        assert between.sum(1).tolist() == [SCALE["held"](model, pgd, choice)] * len(between)
        batch, length = scale_runs.TOKENS
        assert found["delta"].unique().tolist() == [SCALE["delta"](model, pgd, batch * length)]
