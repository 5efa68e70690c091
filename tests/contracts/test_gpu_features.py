"""What else has to work on a GPU: each feature against the eager ops on the CPU. With a CPU variant of every test."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastadv
from fastadv.ops.dispatch import OPS
from fastadv.ops.segment_sum import segments
from tests.contracts.precision import FULL, LOW, NUMBERS, matmuls
from tests.every import EVERY
from tests.models import TiedLM, TinyModel
from tests.support import PGD3, assert_close, assert_gradients, batch, gradients, seeded

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
TOLERANCE = 1e-4
SCRATCH = {"table_step": (10,)}  # tensors that a backend may write what it likes to
Make = Callable[..., fastadv.Method]


def held(model: nn.Module, *, fused: bool | None, **options: Any) -> fastadv.Method:
    return fastadv.BregmanProximal(model, 2.0, 0.5, method=EVERY["smart"](model, fused=fused, **options))


METHODS: dict[str, Make] = {
    "awp": lambda model, **options: fastadv.AWP(model, gamma=0.05, fused=options["fused"]),
    "bregman": held,
    "pgd, both": partial(fastadv.PGD, tied="both", **PGD3),
    "fgm, both": partial(fastadv.FGM, tied="both", epsilon=0.5),
}


def on(device: str, data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in data.items()}


def trained(make: Make, device: str, fused: bool | None, build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """The gradients and weights after three steps with an optimizer, which a teacher follows."""
    model = seeded(build, dtype=torch.float64).to(device)
    adv = make(model, embedding=model.get_submodule(TABLES[type(model)]), fused=fused)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if isinstance(adv, fastadv.BregmanProximal):
        adv.attach(optimizer)
    for seed in range(3):
        optimizer.zero_grad()
        data = on(device, batch(seed=seed))
        adv.backward(lambda: model(**data) if isinstance(model, TinyModel) else model(data["input_ids"]))  # noqa: B023
        optimizer.step()
    assert int(adv.skipped) == 0
    adv.check()
    adv.close()
    found = {**gradients(model), **{f"{name}, moved": p.detach() for name, p in model.named_parameters()}}
    return {name: one.cpu() for name, one in found.items()}


TABLES: dict[type, str] = {TinyModel: "bert.embeddings.word_embeddings", TiedLM: "embed"}


@DEVICES
@pytest.mark.parametrize("name", METHODS)
def test_weights_teachers_and_tables_that_move(name: str, device: str) -> None:
    for build in (TiedLM, partial(TinyModel, "tfm")) if "both" in name else (partial(TinyModel, "tfm"),):
        found = trained(METHODS[name], device, None, build)
        assert_gradients(found, trained(METHODS[name], "cpu", False, build), 1e-9)


@DEVICES
@pytest.mark.parametrize("scope", ["table", "sample"])
def test_a_scaler(scope: str, device: str) -> None:
    """Gradients come out scaled, `unscale_` makes them what they are without; an overflow skips the optimizer."""
    found, model, data = [], None, on(device, batch())
    for scaler in (None, torch.amp.GradScaler(device, init_scale=2.0**10)):
        model = seeded(lambda: TinyModel("tfm"), dtype=FULL).to(device)
        adv = fastadv.PGD(model, embedding="word_embeddings", scope=scope, scaler=scaler, **PGD3)
        adv.backward(lambda: model(**data), mask=data["attention_mask"])  # noqa: B023
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if scaler is not None:
            scaler.unscale_(optimizer)
        found.append(gradients(model))
    assert_gradients(found[1], found[0], 1e-5)
    assert scaler is not None and model is not None
    before = model.classifier.weight.detach().clone()
    model.classifier.weight.grad = torch.full_like(before, float("inf"))
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    scaler.scale(torch.ones((), device=device))
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.classifier.weight, before)
    assert scaler.get_scale() == 2.0**9


@DEVICES
@pytest.mark.parametrize("name", ["pgd", "yopo"])
def test_a_compiled_model(name: str, device: str) -> None:
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, data = seeded(lambda: TinyModel("tfm"), dtype=FULL).to(device), on(device, batch())
        run: Any = torch.compile(model, backend="inductor" if device == "cuda" else "eager") if compiled else model
        adv = EVERY[name](run, embedding="word_embeddings")
        for _ in range(2):
            model.zero_grad()
            adv.backward(lambda: run(**data), mask=data["attention_mask"])  # noqa: B023
        found.append(gradients(model))
    assert_gradients(found[1], found[0], TOLERANCE, floor=1e-3)


@DEVICES
@pytest.mark.parametrize("scope", ["table", "sample"])
def test_probes_in_bfloat16(scope: str, device: str) -> None:
    """They alone; and the gradient of the step points where that of float32 probes does."""
    found = []
    for dtype in (None, LOW):
        model, data = seeded(lambda: TinyModel("tfm"), dtype=FULL).to(device), on(device, batch())
        options = {**NUMBERS, "scope": scope, "probe_dtype": dtype}
        adv = fastadv.PGD(model, embedding="word_embeddings", **options)
        with matmuls(model.bert.q) as seen:
            adv.backward(lambda: model(**data), mask=data["attention_mask"])  # noqa: B023
        assert seen == [FULL, *[dtype or FULL] * 2, FULL]
        found.append(torch.cat([grad.flatten() for grad in gradients(model).values()]))
    assert not torch.equal(*found) and float(torch.cosine_similarity(*found, dim=0)) > 0.9999


def one_rank(rank: int, device: str, folder: str) -> None:
    """Gradients of the wrapped and of the bare model, accumulated over two batches."""
    torch.set_num_threads(1)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=1)
    found = []
    for wrapped in (False, True):
        model = seeded(lambda: TinyModel("tfm")).to(device)
        run: Any = DistributedDataParallel(model) if wrapped else model
        adv = fastadv.PGD(run, embedding="word_embeddings", scope="sample", **PGD3)
        for seed in range(2):
            data = on(device, batch(seed=seed))
            adv.backward(lambda: run(**data), mask=data["attention_mask"])  # noqa: B023
        found.append({name: grad.cpu() for name, grad in gradients(model).items()})
    torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])
@pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")
def test_ddp_with_one_rank(device: str, tmp_path: Path) -> None:
    mp.spawn(one_rank, (device, str(tmp_path)), nprocs=1)
    bare, wrapped = torch.load(tmp_path / "found.pt")
    assert_gradients(wrapped, bare, 1e-9)


def calls(device: str) -> dict[str, tuple[Any, ...]]:
    """Arguments for every op of torch.ops.fastadv."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape).to(device)

    ids = torch.randint(9, (2, 40), device=device)
    groups = segments(ids.flatten(), 9, fused=False).trimmed()
    weight, table, grad, rows = randn(9, 33), randn(9, 33), randn(9, 33), torch.tensor([0, 3, 8], device=device)
    grad[[2, 5]] = 0
    skipped, rule = torch.zeros((), dtype=torch.int64, device=device), (0.3, 0.2, "l2", "l2")
    pairs = [[randn(n) for n in (1, 7, 5000)] for _ in range(2)]
    count = len(groups.stops)
    return {
        "gather_perturb": (weight, ids, randn(2, 40, 33), None),
        "gather_perturb_backward": (table.clone(), [randn(80, 33)], ids.flatten(), groups.order, groups.starts, 3),
        "segments": (ids.flatten(), None, 9),
        "segment_sum": (randn(80, 33), groups.order, groups.starts, groups.stops),
        "ascend": (randn(2, 40, 33), randn(2, 40, 33), None, skipped, *rule, 1, weight, ids, None, randn(2, 40, 33)),
        "moment_step": (
            randn(2, 40, 33), randn(2, 40, 33), None, skipped, randn(2, 2, 40, 33).abs(), 0.3, 0.2, "adamw", "l2", 1, 3,
            weight, ids, None, randn(2, 40, 33),
        ),
        "table_step": (
            randn(count, 33), randn(80, 33), skipped, *rule, 0, *groups, weight, ids, randn(2, 40, 33), randn(count, 33)
        ),
        "rows_touched": (grad,),
        "rows_back_up": (table, rows),
        "rows_restore": (table.clone(), randn(3, 33), rows),
        "rows_step": (table.clone(), grad, table[rows], rows, skipped, *rule, 0),
        "grads_copy": (*pairs,),
        "grads_accumulate": (*pairs, 0.3),
        "grads_average": (*pairs, 0.9),
        "divergence": (randn(5, 300), randn(5, 300), randn(5).abs(), "symmetric_kl", True, True),
    }  # fmt: skip


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return type(value)(map(copied, value)) if type(value) in (tuple, list) else value


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [one for part in value for one in tensors(part)] if isinstance(value, (tuple, list)) else []


@DEVICES
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_torch_ops(op: Any, device: str) -> None:
    """By torch's dispatcher: what the eager version returns and writes, and all that `opcheck` asks for."""
    arguments = calls(device)
    assert arguments.keys() == {one.name for one in OPS}
    public, found = getattr(torch.ops.fastadv, op.name), []
    for run in (public, lambda *given: op.eager(*op._unpack(*given))):
        given = copied(arguments[op.name])
        found.append([one.cpu() for one in tensors([run(*given), *given])])
    for number, (one, other) in enumerate(zip(*found, strict=True)):
        if number not in SCRATCH.get(op.name, ()):
            assert_close(one, other, 1e-5 if one.is_floating_point() else 0.0, f"{op.name}, tensor {number}")
    torch.library.opcheck(public.default, copied(arguments[op.name]))
