"""Two gloo processes, half of the batch each, against one process in float64."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv.methods.carry_buffer import CarryBuffer
from tests.bert import text, tiny_bert
from tests.distributed import workers
from tests.support import assert_gradients, batch, clear, gradients, same_bits

pytestmark = workers.MARKS
TOLERANCE = 1e-6
start = functools.partial(workers.start, workers.run)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start("ddp", tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start("fsdp", tmp_path_factory.mktemp("fsdp"))


def outcome(folder: Path, case: str) -> dict[str, Tensor]:
    """What both processes found, the same to the bit."""
    ranks = workers.by_rank(folder, case)
    for name, value in ranks[0].items():
        assert same_bits(value, ranks[1][name]), f"{name} differs between the processes"
    found: dict[str, Tensor] = ranks[0]
    return found


def one(model: nn.Module, name: str, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """One process, the unwrapped model: the gradients of a step on `data` by itself."""
    make, options = workers.METHODS[name]
    kept = [p.grad for p in model.parameters()]
    clear(model)
    adv = make(model, embedding="word_embeddings", **options)
    workers.step(adv, model, data)
    adv.close()
    found = gradients(model)
    for p, grad in zip(model.parameters(), kept, strict=True):
        p.grad = grad
    return found


def halves(name: str, seed: int = 1, form: str = "plain") -> dict[str, Tensor]:
    """The mean over the two halves, each with its own perturbation: what data parallelism computes in any scope."""
    found = [one(workers.build(form), name, workers.half(rank, seed)) for rank in range(workers.WORLD)]
    return {key: (found[0][key] + found[1][key]) / 2 for key in found[0]}


@pytest.mark.parametrize("on", ["wrapper", "model"])
@pytest.mark.parametrize("name", workers.METHODS)
def test_ddp(ddp: Path, name: str, on: str) -> None:
    found = outcome(ddp, f"{name}-{on}")
    assert_gradients(found, halves(name), TOLERANCE)
    if "table" not in name:  # a sample's perturbation does not depend on who else is in the batch
        assert_gradients(found, one(workers.build(), name, batch()), TOLERANCE)


@pytest.mark.parametrize("form", [form for form in workers.DDP_FORMS if form != "plain"])
@pytest.mark.parametrize("name", workers.SAMPLE)
def test_forms_of_ddp(ddp: Path, name: str, form: str) -> None:
    found = outcome(ddp, f"{name}-{form}")
    assert_gradients(found, one(workers.build(form), name, batch()), TOLERANCE)


@pytest.mark.parametrize("form", workers.DDP_FORMS)
@pytest.mark.parametrize("name", workers.SAMPLE)
def test_several_steps(ddp: Path, name: str, form: str) -> None:
    model = workers.build(form)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    make, options = workers.METHODS[name]
    adv = make(model, embedding="word_embeddings", **options)
    for seed in range(3):
        workers.step(adv, model, batch(seed=seed))
        optimizer.step()
        optimizer.zero_grad()
    want = {name: p.detach() for name, p in model.named_parameters()}
    assert_gradients(outcome(ddp, f"training-{name}-{form}"), want, TOLERANCE)


@pytest.mark.parametrize("name", workers.METHODS)
def test_gradient_accumulation(ddp: Path, name: str) -> None:
    """Two micro-batches, the first in `no_sync`: the sum of both, each with the direction of its own."""
    parts = [halves(name, seed) for seed in range(2)]
    want = {key: parts[0][key] + parts[1][key] for key in parts[0]}
    assert_gradients(outcome(ddp, f"accumulation-{name}"), want, TOLERANCE)


@pytest.mark.parametrize(("name", "index"), workers.FAULTS)
def test_a_fault_on_every_process(ddp: Path, name: str, index: int) -> None:
    assert_gradients(outcome(ddp, f"fault-{name}-{index}"), one(workers.build(), name, batch()), TOLERANCE)


@pytest.mark.parametrize("name", workers.SAMPLE)
def test_gradients_are_reduced_where_they_are_needed(ddp: Path, name: str) -> None:
    """In the passes whose sum is not complete they are not; PGD's clean pass, alike."""
    found = outcome(ddp, f"reductions-{name}")
    assert int(found["step"]) == int(found["plain"]) > 0


def test_awp_moves_by_the_gradient_of_all(ddp: Path) -> None:
    model = workers.build()
    workers.step(fastadv.AWP(model, gamma=0.05), model, batch())
    assert_gradients(outcome(ddp, "awp"), gradients(model), TOLERANCE)


def test_what_fsdp2_does_not_allow(fsdp: Path) -> None:
    told = {name: bool(told) for name, told in outcome(fsdp, "refused").items()}
    assert told == {"awp": True, "bregman": True, "llr": True}


@pytest.mark.parametrize("name", workers.SHARDED)
def test_fsdp2(fsdp: Path, name: str) -> None:
    assert_gradients(outcome(fsdp, f"sharded-{name}"), halves(name), TOLERANCE)


@pytest.mark.parametrize("name", workers.SAMPLE)
def test_fsdp2_accumulates(fsdp: Path, name: str) -> None:
    parts = [halves(name, seed) for seed in range(2)]
    want = {key: parts[0][key] + parts[1][key] for key in parts[0]}
    assert_gradients(outcome(fsdp, f"sharded-accumulation-{name}"), want, TOLERANCE)


@pytest.mark.parametrize("split", workers.SPLITS)
@pytest.mark.parametrize("unit", workers.UNITS)
def test_partial_passes_of_a_sharded_bert(fsdp: Path, unit: str, split: str) -> None:
    """Whichever module's weights are gathered when, and where in it the split is."""
    model, data = tiny_bert(), text()
    workers.step(fastadv.YOPO(model, split=workers.SPLITS[split], **workers.LB), model, data)
    assert_gradients(outcome(fsdp, f"layers-{unit}-{split}"), gradients(model), TOLERANCE)


def test_a_split_too_early_is_told_under_fsdp2(fsdp: Path) -> None:
    assert outcome(fsdp, "told")["told"]


def test_all_processes_suggest_one_radius(ddp: Path) -> None:
    found, model = outcome(ddp, "suggested"), workers.build().eval()
    losses = [float(model(**workers.half(rank)).loss.detach()) for rank in range(workers.WORLD)]
    assert float(found["loss"]) == pytest.approx(sum(losses) / 2) and losses[0] != losses[1]
    assert float(found["adv_loss"] - found["loss"]) == pytest.approx(0.1, rel=0.06)


@pytest.mark.parametrize("wrapped", ["ddp", "fsdp"])
def test_replays(wrapped: str, request: pytest.FixtureRequest) -> None:
    """FreeAT on both halves: one process with the whole batch, since a sample's slot is its own."""
    model = workers.build()
    adv = fastadv.FreeAT(model, embedding="word_embeddings", **workers.FREEAT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for data in fastadv.repeat([batch(seed=seed) for seed in range(2)], adv.replays):
        workers.step(adv, model, data)
        optimizer.step()
        optimizer.zero_grad()
    want = {name: p.detach() for name, p in model.named_parameters()}
    case = "replays" if wrapped == "ddp" else "sharded-replays"
    assert_gradients(outcome(request.getfixturevalue(wrapped), case), want, TOLERANCE)


def test_replays_go_on_from_a_distributed_checkpoint(ddp: Path) -> None:
    """Each process has slots of its own, under names of its own: the same weights as without the stop, bit for bit."""
    found = outcome(ddp, "resumed")
    for name, tensor in outcome(ddp, "replays").items():
        assert same_bits(found[name], tensor), name


@pytest.mark.parametrize("form", ["slots.0.0", "slots.rank0.0.0"])
def test_slots_of_one_process_and_of_others(form: str) -> None:
    """What one process saved, without a rank, is taken by each of several; another rank's slots are not."""
    names = {"slots.0.0": 1, form: 1, "slots.rank1.0.0": 2, "slots.rank10.0.0": 3}
    buffer = CarryBuffer()
    buffer.load_state_dict({name: torch.full((1,), float(value)) for name, value in names.items()}, torch.device("cpu"))
    assert {key: value.tolist() for key, value in buffer.buffers.items()} == {(0, 0): [1.0]}
