"""What each of two gloo processes runs; the results go to files that the tests read."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastadv
from tests.bert import text, tiny_bert
from tests.models import TinyModel, TwoCalls
from tests.support import assert_unchanged, batch, gradients, seeded, snapshot

WORLD = 2
MARKS = [pytest.mark.dist, pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")]
PGD: dict[str, Any] = {"epsilon": 0.5, "step_size": 0.3, "steps": 3}
LB: dict[str, Any] = {"epsilon": 0.5, "step_size": 0.3, "steps": 3, "random_start": False}
FREEAT: dict[str, Any] = {"epsilon": 0.1, "step_size": 0.06, "replays": 3}
DDP_FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bucket-views": {"gradient_as_bucket_view": True},
    "find-unused": {"find_unused_parameters": True},
}


def waves(shape: tuple[int, ...], mask: Tensor) -> Tensor:
    """A start that does not depend on who else is in the batch."""
    del mask
    return 0.1 * torch.sin(torch.arange(shape[1] * shape[2])).view(shape[1:]).expand(shape)


def held(model: nn.Module, **options: Any) -> fastadv.Method:
    """SMART near a teacher that is somewhere else."""
    adv = fastadv.BregmanProximal(model, 2.0, 0.5, method=fastadv.SMART(model, **options))
    for tensor in adv.teacher.values():
        tensor.mul_(0.9)
    return adv


METHODS: dict[str, tuple[Callable[..., fastadv.Method], dict[str, Any]]] = {
    "fgm-table": (fastadv.FGM, {"epsilon": 0.5}),
    "fgm-sample": (fastadv.FGM, {"epsilon": 0.5, "scope": "sample"}),
    "pgd-table": (fastadv.PGD, PGD),
    "pgd-sample": (fastadv.PGD, {**PGD, "scope": "sample"}),
    "pgd-last": (fastadv.PGD, {**PGD, "scope": "sample", "clean_weight": 0}),
    "freelb-sample": (fastadv.FreeLB, LB),
    "freelb-table": (fastadv.FreeLB, {**LB, "scope": "table", "norm": "linf"}),
    "yopo-sample": (fastadv.YOPO, {**LB, "split": "bert.embeddings"}),
    "yopo-table": (fastadv.YOPO, {**LB, "split": "bert.embeddings", "scope": "table"}),
    "smart": (fastadv.SMART, {"epsilon": 0.1, "steps": 2, "random_start": waves}),
    "vat": (fastadv.VAT, {"epsilon": 0.5, "steps": 2, "random_start": waves}),
    "llr": (fastadv.LLR, {"epsilon": 0.1, "steps": 2, "random_start": waves}),
    "neftune": (fastadv.NEFTune, {"random_start": waves}),
    "held-smart": (held, {"epsilon": 0.1, "random_start": waves}),
}

SHARDED = [name for name in METHODS if name not in ("llr", "held-smart")]  # FSDP2 is not for these
SAMPLE = ["pgd-sample", "freelb-sample", "yopo-sample"]
FAULTS = [("pgd-sample", index) for index in range(4)] + [("yopo-sample", index) for index in range(7)]


UNITS: dict[str, Callable[[Any], list[nn.Module]]] = {
    "layers": lambda model: list(model.bert.encoder.layer),
    "encoder": lambda model: [model.bert],
}
SPLITS = {"first": None, "embeddings": "bert.embeddings"}


class Unused(TinyModel):
    """Has a head that the loss never sees."""

    def __init__(self) -> None:
        super().__init__("tfm")
        self.spare = nn.Linear(3, 3)


def build(form: str = "plain") -> TinyModel:
    return seeded(Unused if form == "find-unused" else lambda: TinyModel("tfm"))


def half(rank: int, seed: int = 1) -> dict[str, Tensor]:
    """This process's half of a batch of four."""
    return {name: value[2 * rank : 2 * rank + 2] for name, value in batch(seed=seed).items()}


def step(adv: fastadv.Method, model: nn.Module, data: dict[str, Tensor], number: int | None = None) -> None:
    def closure() -> dict[str, Tensor]:
        output = model(**data)
        losses = F.cross_entropy(output.logits, data["labels"], reduction="none")
        return {"loss": output.loss, "logits": output.logits, "losses": losses}

    adv.backward(closure, mask=data["attention_mask"], step=number)


def gradient(rank: int, form: str, name: str, on: str) -> dict[str, Tensor]:
    """One step; the method made on the wrapper, or on the model inside it."""
    model = build(form)
    ddp = DistributedDataParallel(model, **DDP_FORMS[form])
    make, options = METHODS[name]
    adv = make(ddp if on == "wrapper" else model, embedding="word_embeddings", **options)
    step(adv, ddp, half(rank))
    return gradients(model)


def training(rank: int, form: str, name: str) -> dict[str, Tensor]:
    """Three optimizer steps, so that what a step leaves in the reducer is seen by the next."""
    model = build(form)
    ddp = DistributedDataParallel(model, **DDP_FORMS[form])
    make, options = METHODS[name]
    adv = make(ddp, embedding="word_embeddings", **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for seed in range(3):
        step(adv, ddp, half(rank, seed))
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def replays(rank: int, wrapped: str) -> dict[str, Tensor]:
    """FreeAT: two batches, three replays each, an optimizer step after every one; each process has its own slots."""
    model = build()
    if wrapped == "ddp":
        run: nn.Module = DistributedDataParallel(model)
    else:
        run = shard(model)
    adv = fastadv.FreeAT(run, embedding="word_embeddings", **FREEAT)
    optimizer = torch.optim.SGD(run.parameters(), lr=0.5)
    for data in fastadv.repeat([half(rank, seed) for seed in range(2)], adv.replays):
        step(adv, run, data)
        optimizer.step()
        optimizer.zero_grad()
    return {name: whole(p.detach()) for name, p in model.named_parameters()}


def resumed(rank: int) -> dict[str, Tensor]:
    """FreeAT, stopped between two replays and gone on from torch.distributed.checkpoint: nobody can tell."""
    import torch.distributed.checkpoint as dcp

    place = [tempfile.mkdtemp()]
    dist.broadcast_object_list(place)
    model, adv, optimizer = training_by_replays()
    data = list(fastadv.repeat([half(rank, seed) for seed in range(2)], adv.replays))
    for number, one in enumerate(data):
        if number == 2:
            state: dict[str, Any] = {"model": model.state_dict(), "adv": adv.state_dict()}
            dcp.save(state, checkpoint_id=place[0])
            adv.close()
            model, adv, optimizer = training_by_replays()
            saved = dcp.FileSystemReader(place[0]).read_metadata().state_dict_metadata
            kept = {name.removeprefix("adv."): entry for name, entry in saved.items() if name.startswith("adv.")}
            room = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in kept.items()}
            state = {"model": model.state_dict(), "adv": room}
            dcp.load(state, checkpoint_id=place[0])
            adv.load_state_dict(state["adv"])
        step(adv, model, one)
        optimizer.step()
        optimizer.zero_grad()
    want = replays(rank, "ddp")
    assert all(torch.equal(p.detach(), want[name]) for name, p in model.module.named_parameters())
    return want


def training_by_replays() -> tuple[Any, fastadv.Method, torch.optim.Optimizer]:
    run = DistributedDataParallel(build())
    return run, fastadv.FreeAT(run, embedding="word_embeddings", **FREEAT), torch.optim.SGD(run.parameters(), lr=0.5)


def whole(tensor: Tensor) -> Tensor:
    """Of a sharded one, all parts."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def accumulation(rank: int, name: str) -> dict[str, Tensor]:
    """Two micro-batches, the first in no_sync as gradient accumulation has it."""
    model = build()
    ddp = DistributedDataParallel(model)
    make, options = METHODS[name]
    adv = make(ddp, embedding="word_embeddings", **options)
    for micro in range(2):
        with ddp.no_sync() if micro == 0 else contextlib.nullcontext():
            step(adv, ddp, half(rank, micro))
    return gradients(model)


def fault(rank: int, name: str, index: int) -> dict[str, Tensor]:
    """A closure fails in pass `index` on every process; nothing is left of it, and the next step is right."""
    model = build()
    ddp = DistributedDataParallel(model)
    make, options = METHODS[name]
    adv = make(ddp, embedding="word_embeddings", **options)
    data, passes = half(rank), []

    def closure() -> Tensor:
        passes.append(1)
        if len(passes) == index + 1:
            raise ZeroDivisionError
        return ddp(**data).loss

    before = snapshot(model)
    with contextlib.suppress(ZeroDivisionError):
        adv.backward(closure)
    assert_unchanged(model, before)
    assert len(passes) == index + 1
    step(adv, ddp, data)
    return gradients(model)


def moved_weights(rank: int, clean_weight: float) -> dict[str, Tensor]:
    """AWP: every process moves the weights by the gradient of all."""
    model = build()
    ddp = DistributedDataParallel(model)
    step(fastadv.AWP(ddp, gamma=0.05, clean_weight=clean_weight), ddp, half(rank))
    return gradients(model)


def reductions(rank: int, name: str) -> dict[str, Tensor]:
    """How many buckets are reduced in a plain backward and in a step."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    model, data = build(), half(rank)
    ddp = DistributedDataParallel(model)
    buckets: list[int] = []

    def counted(state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations, and these would be strings
        buckets.append(bucket.index())
        return allreduce_hook(state, bucket)

    ddp.register_comm_hook(None, counted)
    ddp(**data).loss.backward()
    plain = len(buckets)
    make, options = METHODS[name]
    step(make(ddp, embedding="word_embeddings", **options), ddp, data)
    return {"plain": torch.tensor(plain), "step": torch.tensor(len(buckets) - plain)}


def shard(model: TinyModel) -> nn.Module:
    """FSDP2: every layer with parameters by itself, then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model.bert, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def sharded(rank: int, name: str, micro_batches: int) -> dict[str, Tensor]:
    """One step, or several micro-batches, of a sharded model, whose weights stay."""
    model = build()
    shard(model)
    make, options = METHODS[name]
    adv = make(model, embedding="word_embeddings", **options)
    before = {key: p.full_tensor().clone() for key, p in model.named_parameters()}
    for micro in range(micro_batches):
        step(adv, model, half(rank, micro if micro_batches > 1 else 1))
    for key, p in model.named_parameters():
        assert torch.equal(p.full_tensor(), before[key]), key
    return {key: p.grad.full_tensor() for key, p in model.named_parameters() if p.grad is not None}


def by_layers(rank: int, unit: str, split: str) -> dict[str, Tensor]:
    """A BERT sharded by layer, or with its encoder in one piece, and gathered anew for every backward; YOPO twice."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, data, mesh = tiny_bert(), text(), init_device_mesh("cpu", (WORLD,))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for part in UNITS[unit](model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    mine = {name: value[2 * rank : 2 * rank + 2] for name, value in data.items()}
    adv, ends = fastadv.YOPO(model, split=SPLITS[split], **LB), []
    model.classifier.register_forward_hook(lambda *_: ends.append("ran"))
    for _ in range(2):
        model.zero_grad()
        step(adv, model, mine)
    assert len(ends) == 2 * 7, "sharded modules must see the end of what they began"
    return {name: whole(p.grad) for name, p in model.named_parameters()}


def told(rank: int) -> dict[str, Tensor]:
    """A split before the embedding's last call is refused here too, where partial passes run whole forwards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = seeded(TwoCalls)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    ids, labels = half(rank)["input_ids"], half(rank)["labels"]
    adv = fastadv.YOPO(model, split="encode", **LB)
    try:
        adv.backward(lambda: model(ids, ids[:, :3], labels).loss)
    except RuntimeError as error:
        return {"told": torch.tensor("before the embedding's call 2" in str(error))}
    return {}


def refused(rank: int) -> dict[str, Tensor]:
    """What FSDP2 does not let a method do."""
    del rank
    model = build()
    shard(model)
    found = {}
    for name, make in {"awp": fastadv.AWP, "bregman": fastadv.BregmanProximal, "llr": fastadv.LLR}.items():
        try:
            make(model)
        except ValueError as error:
            found[name] = torch.tensor("FSDP" in str(error))
    return found


def suggested(rank: int) -> dict[str, Tensor]:
    """The radius that a process finds on its own batch and all other processes' losses."""
    found = fastadv.suggest_radius(
        build(),
        [(half(rank),)],
        closure=lambda model, data: model(**data[0]).loss,
        mask=lambda data: data[0]["attention_mask"],
        embedding="word_embeddings",
        rise=0.1,
    )
    return {name: torch.tensor(getattr(found, name)) for name in ("real", "loss", "adv_loss")}


DDP_CASES: dict[str, tuple[Callable[..., dict[str, Tensor]], tuple[Any, ...]]] = {
    **{f"{name}-{on}": (gradient, ("plain", name, on)) for name in METHODS for on in ("wrapper", "model")},
    **{
        f"{name}-{form}": (gradient, (form, name, "wrapper"))
        for name in SAMPLE
        for form in DDP_FORMS
        if form != "plain"
    },
    **{f"training-{name}-{form}": (training, (form, name)) for name in SAMPLE for form in DDP_FORMS},
    **{f"accumulation-{name}": (accumulation, (name,)) for name in METHODS},
    **{f"fault-{name}-{index}": (fault, (name, index)) for name, index in FAULTS},
    **{f"reductions-{name}": (reductions, (name,)) for name in SAMPLE},
    "replays": (replays, ("ddp",)),
    "resumed": (resumed, ()),
    "awp": (moved_weights, (1.0,)),
    "suggested": (suggested, ()),
}
FSDP_CASES: dict[str, tuple[Callable[..., dict[str, Tensor]], tuple[Any, ...]]] = {
    **{f"sharded-{name}": (sharded, (name, 1)) for name in SHARDED},
    **{f"sharded-accumulation-{name}": (sharded, (name, 2)) for name in SAMPLE},
    **{f"layers-{unit}-{split}": (by_layers, (unit, split)) for unit in UNITS for split in SPLITS},
    "told": (told, ()),
    "refused": (refused, ()),
    "sharded-replays": (replays, ("fsdp",)),
}
SUITES = {"ddp": DDP_CASES, "fsdp": FSDP_CASES}


def start(run: Callable[[int, str, str], None], suite: str, folder: Path) -> Path:
    """Run a suite's cases in as many processes as there are ranks; what they find is in the folder."""
    mp.spawn(_to_the_end, (run, suite, str(folder)), nprocs=WORLD)
    return folder


def by_rank(folder: Path, case: str) -> list[Any]:
    """What each process found in a case; the test fails where one of them raised."""
    ranks: list[Any] = [torch.load(folder / f"{case}-{rank}.pt") for rank in range(WORLD)]
    for found in ranks:
        if isinstance(found, str):
            pytest.fail(found)
    return ranks


def _to_the_end(rank: int, run: Callable[[int, str, str], None], suite: str, folder: str) -> None:
    """And no further: torch may abort in the interpreter's own end, where FSDP2's models still hold gloo's threads."""
    run(rank, suite, folder)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(rank: int, suite: str, folder: str) -> None:
    """All cases of a suite in one pair of processes."""
    run_cases(rank, SUITES[suite], folder)


def run_cases(rank: int, cases: dict[str, Any], folder: str) -> None:
    """One after the other: starting processes is what takes the time."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=WORLD,
        timeout=dt.timedelta(seconds=60),
    )
    for name, (case, arguments) in cases.items():
        try:
            outcome: Any = case(rank, *arguments)
        except Exception:  # noqa: BLE001 - the test that asks for this case shows it
            outcome = traceback.format_exc()
        torch.save(outcome, Path(folder) / f"{name}-{rank}.pt")
    dist.destroy_process_group()
