"""Wrappers that come late, shard or are passed by, and what is sent: two gloo processes against one in float64."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from tests.distributed import sharding, workers, wrapping
from tests.distributed.test_distributed import TOLERANCE, halves, outcome
from tests.support import assert_gradients, batch, gradients, seeded

pytestmark = workers.MARKS
SLOW = pytest.mark.slow
SUITES = {
    "fast": {**sharding.FAST, **wrapping.FAST},
    "slow": {**sharding.SLOW, **wrapping.SLOW},
}
ALL = SUITES["fast"].keys() | SUITES["slow"].keys()
COUNTS = (sharding.GATHER, sharding.SCATTER)
# Of four units in a step: gathered, reduced.
SENT = {
    "fgm-sample": {"each": (16, 8), "last": (16, 4), "keep": (4, 4)},
    "pgd-sample": {"each": (32, 8), "last": (32, 4), "keep": (4, 4)},
    "freelb-sample": {"each": (24, 12), "last": (24, 4), "keep": (4, 4)},
    "pgd-last": {"each": (32, 4), "last": (32, 4), "keep": (4, 4)},
    "yopo-sample": {"each": (56, 12), "last": (56, 4), "keep": (4, 4)},
    "smart": {"each": (29, 4), "last": (29, 4), "keep": (5, 4)},
    "vat": {"each": (32, 8), "last": (32, 4), "keep": (4, 4)},
    "neftune": {"each": (8, 4), "last": (8, 4), "keep": (8, 4)},
}
PLAIN = (8, 4)


def run(rank: int, suite: str, folder: str) -> None:
    """One suite, in one of the processes."""
    workers.run_cases(rank, SUITES[suite], folder)


start = functools.partial(workers.start, run)


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start("fast", tmp_path_factory.mktemp("fast"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start("slow", tmp_path_factory.mktemp("slow"))


@pytest.fixture
def found(request: pytest.FixtureRequest) -> Any:
    """What both processes found in a test's case."""
    folder = request.getfixturevalue("slow" if request.node.get_closest_marker("slow") else "fast")
    return functools.partial(outcome, folder)


def those(*prefixes: str) -> list[Any]:
    """The cases whose names begin so; those of the slow suite are marked."""
    names = sorted(name for name in ALL if name.startswith(prefixes))
    return [pytest.param(name, marks=SLOW if name in SUITES["slow"] else ()) for name in names]


def arguments(case: str) -> tuple[Any, ...]:
    return {**SUITES["fast"], **SUITES["slow"]}[case][1]


def split(answer: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """The gradients, and the counts."""
    values = {name: value for name, value in answer.items() if value.dim()}
    return values, tuple(int(answer[name]) for name in COUNTS)


# What FSDP2 sends


@pytest.mark.parametrize("case", those(*(f"{choice}-{name}" for choice in sharding.CHOICES for name in SENT)))
def test_fsdp2_sends_no_more_than_it_has_to(found: Any, case: str) -> None:
    """Whatever is sent, the gradients are those of one process."""
    name, choice, _ = arguments(case)
    values, counts = split(found(case))
    assert counts == SENT[name][choice]
    assert_gradients(values, halves(name), TOLERANCE)


def test_kept_weights_cost_no_more_than_plain_training(found: Any) -> None:
    _, plain = split(found("plain"))
    assert plain == PLAIN
    for name in ("fgm-sample", "pgd-sample", "freelb-sample"):
        _, counts = split(found(f"keep-{name}"))
        assert all(one <= other for one, other in zip(counts, plain, strict=True)), name


@pytest.mark.parametrize(
    "case", those(*(f"{choice}-{mesh}" for choice in sharding.CHOICES for mesh in sharding.MESHES))
)
def test_hybrid_meshes(found: Any, case: str) -> None:
    values, counts = split(found(case))
    name, choice, mesh = arguments(case)
    assert counts == (SENT[name][choice] if mesh[1] > 1 else (0, 0))  # one shard is the whole
    assert_gradients(values, halves(name), TOLERANCE)


def test_a_search_gathers_once(found: Any) -> None:
    _, counts = split(found("searched"))
    assert counts == (4, 0)


@pytest.mark.parametrize("case", those("trained"))
def test_weights_that_were_kept_are_gathered_anew(found: Any, case: str) -> None:
    """Optimizer steps in between, and the user's own accumulation without reductions."""
    model = workers.build()
    adv = sharding.made("pgd-sample", model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for number in range(3):
        for micro in range(2):
            workers.step(adv, model, batch(seed=2 * number + micro))
        optimizer.step()
        optimizer.zero_grad()
    assert_gradients(found(case), {name: p.detach() for name, p in model.named_parameters()}, TOLERANCE)


@pytest.mark.parametrize("case", those("compiled"))
def test_units_that_are_compiled(found: Any, case: str) -> None:
    assert_gradients(found(case), halves(arguments(case)[0]), TOLERANCE)


@pytest.mark.parametrize("case", those("failed"))
def test_a_step_that_fails_leaves_nothing_gathered(found: Any, case: str) -> None:
    assert_gradients(found(case), halves("pgd-sample"), TOLERANCE)


@pytest.mark.parametrize("case", ["no-loss", "no-loss-ddp"])
def test_gradients_that_nothing_would_reduce_are_an_error(found: Any, case: str) -> None:
    assert found(case)["told"]


# Wrappers that come late, and FSDP1


@pytest.mark.parametrize(
    "case", those("late", "flat-pgd", "flat-fgm", "flat-freelb", "flat-y", "flat-s", "flat-v", "flat-n")
)
def test_sharding(found: Any, case: str) -> None:
    """FSDP2 around a method that is there already, and FSDP1 before and after."""
    assert_gradients(found(case), halves(arguments(case)[0]), TOLERANCE)


@pytest.mark.parametrize("case", those("flat-micro"))
def test_fsdp1_accumulates(found: Any, case: str) -> None:
    parts = [halves(arguments(case)[0], seed) for seed in range(2)]
    assert_gradients(found(case), {key: parts[0][key] + parts[1][key] for key in parts[0]}, TOLERANCE)


@pytest.mark.parametrize("case", those("refused"))
def test_what_sharding_does_not_allow(found: Any, case: str) -> None:
    """Whenever it happened. Relative radii are taken when the method is made, where FSDP2 gathers the rows."""
    kind, when = arguments(case)
    expected = {"awp", "bregman", "tied"}
    if kind != "units":
        expected |= {"llr"} if when == "late" else {"llr", "relative"}
    assert {name for name, told in found(case).items() if told} == expected


# DDP


@pytest.mark.parametrize("case", those("passed-by"))
def test_a_closure_that_goes_past_ddp(found: Any, case: str) -> None:
    name, joined = arguments(case)
    answer = found(case)
    assert answer.pop("told")
    if not joined:
        assert_gradients(answer, halves(name), TOLERANCE)


@pytest.mark.parametrize("case", those("inside"))
def test_a_step_inside_of_ddps_forward(found: Any, case: str) -> None:
    name = arguments(case)[0]
    model = workers.build()
    adv = sharding.made(name, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for seed in range(3):
        workers.step(adv, model, batch(seed=seed))
        optimizer.step()
        optimizer.zero_grad()
    assert_gradients(found(case), {key: p.detach() for key, p in model.named_parameters()}, TOLERANCE)


@pytest.mark.parametrize("case", wrapping.AWP)
def test_awp_accumulates(found: Any, case: str) -> None:
    """In `no_sync` too the weights move by the gradient of all."""
    model = workers.build()
    adv, attacks = wrapping.awp(model, case)
    wrapping.awp_steps(adv, model, [batch(seed=seed) for seed in range(3)], attacks)
    assert_gradients(found(f"awp-{case}"), gradients(model), TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["inside", "outside"])
def test_probes_of_a_compiled_ddp_compute_no_weights_gradient(found: Any, form: str) -> None:
    """Two full passes cost what plain ones do, two probes less, as without DDP."""
    answer, bare = found(f"products-{form}"), found("products-none")
    plain, step = int(answer.pop("plain")), int(answer.pop("step"))
    assert plain == int(bare["plain"]) > 0
    assert 2 * plain < step == int(bare["step"]) < 4 * plain
    assert_gradients(answer, halves("pgd-sample"), TOLERANCE)


def test_relative_radii_of_a_scaled_table_that_is_a_unit() -> None:
    """Its forward tells its rows; FSDP2 would take a unit that is called alone for the root."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 3.0 * super().forward(input)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(seeded(lambda: Scaled(10, 4)), seeded(lambda: nn.Linear(4, 1)))
        want = 3 * float(model[0].weight.norm(dim=1).mean())
        for unit in (model[0], model):
            fully_shard(unit)
        adv = fastadv.FGM(model, epsilon=1.0, relative=True, scope="sample")
        assert adv.rule.epsilon == pytest.approx(want, rel=1e-12)
        assert adv.backward(lambda: model(torch.arange(6).view(2, 3)).square().mean()).adv_loss is not None
    finally:
        dist.destroy_process_group()
