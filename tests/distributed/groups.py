"""What each of two gloo processes runs with `process_group=`: halves of every sequence, or halves of the batch."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastadv
from fastadv.engine.perturb.positions import APART
from fastadv.engine.perturb.ranks import Ranks
from fastadv.engine.perturb.shared_rows import SharedRows
from fastadv.ops import segment_sum, segments
from tests.distributed import workers
from tests.models import CLASSES, D, TinyModel, V
from tests.support import assert_unchanged, batch, gradients, seeded, snapshot

ROWS, LENGTH = 3, 8


class Attend(nn.Module):
    """Attention of a shard's positions to those of all shards."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))

    def forward(self, h: Tensor, padding: Tensor, group: Any) -> Tensor:
        keys, values = (gathered(one(h), group) for one in (self.k, self.v))
        scores = (self.q(h) @ keys.transpose(1, 2) / D**0.5).masked_fill(padding[:, None], -1e9)
        return torch.tanh(h + scores.softmax(-1) @ values)


class Shards(nn.Module):
    """A tagger or a classifier, of whole sequences or of one shard of each."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(V, D), nn.Parameter(torch.randn(LENGTH, D))
        self.first, self.attend, self.head = nn.Linear(D, D), Attend(), nn.Linear(D, CLASSES)
        self.spoil: Tensor | None = None  # what the gradient at the embedding is multiplied with

    def forward(self, shard: Shard, group: Any = None, spoilt: bool = False) -> tuple[Tensor, Tensor]:
        h = self.words(shard.ids)
        if spoilt and h.requires_grad:
            h.register_hook(lambda grad: grad * self.spoil)
        h = torch.tanh(self.first(h + self.places[shard.at : shard.at + h.shape[1]]))
        h = h if shard.alone else self.attend(h, ~shard.every, group)
        if shard.pooled:
            whole, mask = gathered(h, group), shard.every.unsqueeze(-1)
            logits = self.head((whole * mask).sum(1) / mask.sum(1))
            return F.cross_entropy(logits, shard.labels[:, 0]), logits
        logits = self.head(h)
        losses = F.cross_entropy(logits.transpose(1, 2), shard.labels[:, shard.at :][:, : h.shape[1]], reduction="none")
        return (losses * shard.mask).sum() / shard.every.sum(), logits  # this rank's sum over the number of all


class Gather(torch.autograd.Function):
    """All shards of a sequence; back, the sum of what the ranks' losses ask of this one's.

    torch.distributed.nn.functional.all_gather takes a gradient with other strides for a contiguous one, on gloo.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.length = group, h.shape[1]
        every = [torch.empty_like(h, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, h.contiguous(), group)
        return torch.cat(every, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed.split(ctx.length, dim=1)[dist.get_rank(ctx.group)], None


def gathered(h: Tensor, group: Any) -> Tensor:
    """[B, T, D] of all shards, on every rank."""
    return h if group is None else Gather.apply(h, group)


class Shard(NamedTuple):
    """Some positions of every sample."""

    ids: Tensor
    mask: Tensor
    every: Tensor  # the mask of all positions
    labels: Tensor
    at: int  # the first of them
    pooled: bool
    alone: bool = False  # without attention, so that shards may have different lengths


def shard(rank: int | None, padded: bool, pooled: bool) -> Shard:
    """A process's half of three sequences, or all of them; the last has tokens in the first half alone."""
    generator = torch.Generator().manual_seed(4)
    ids, labels = (torch.randint(0, most, (ROWS, LENGTH), generator=generator) for most in (V, CLASSES))
    lengths = torch.tensor([8, 6, 3]) if padded else torch.full((ROWS,), LENGTH)
    every = torch.arange(LENGTH) < lengths.unsqueeze(1)
    own = slice(0, LENGTH) if rank is None else slice(rank * LENGTH // 2, (rank + 1) * LENGTH // 2)
    return Shard(ids[:, own], every[:, own], every, labels, own.start, pooled)


def at(rank: int | None) -> Callable[[tuple[int, ...], Tensor], Tensor]:
    """A start that is the same wherever a position lies."""

    def start(shape: tuple[int, ...], mask: Tensor) -> Tensor:
        del mask
        whole = 0.1 * torch.sin(torch.arange(ROWS * LENGTH * D)).view(ROWS, LENGTH, D)
        return whole if rank is None else whole[:, rank * LENGTH // 2 :][:, : shape[1]]

    return start


class Case(NamedTuple):
    """One method, and how its norms are."""

    name: str
    scope: str
    norm: str
    padded: bool = False
    spoilt: bool = False

    def __str__(self) -> str:
        parts = [self.name, self.scope, self.norm, "padded" * self.padded, "spoilt" * self.spoilt]
        return "-".join(part for part in parts if part)


METHODS: dict[str, tuple[Callable[..., fastadv.Method], dict[str, Any]]] = {
    "fgm": (fastadv.FGM, {"epsilon": 0.5}),
    "pgd": (fastadv.PGD, {"epsilon": 0.4, "step_size": 0.3, "steps": 3}),
    "freelb": (fastadv.FreeLB, {"epsilon": 0.2, "step_size": 0.15, "steps": 3}),
    "smart": (fastadv.SMART, {"epsilon": 0.3, "step_size": 0.2, "steps": 2}),
    "yopo": (fastadv.YOPO, {"epsilon": 0.4, "step_size": 0.3, "steps": 2, "inner_steps": 2, "split": "attend"}),
    "vat": (fastadv.VAT, {"epsilon": 0.5, "steps": 2}),
}
POOLED = ("smart", "vat")  # which compare answers: each rank has those of whole samples
CASES = [Case(*one) for one in itertools.product(METHODS, ("sample", "batch"), ("l2", "linf"), (False, True))]
CASES += [Case("freelb", "token", norm, True) for norm in ("l2", "linf")]
SPOILT = (("sample", "l2"), ("sample", "linf"), ("token", "linf"), ("batch", "l2"))
CASES += [Case("pgd", *one, padded=True, spoilt=True) for one in SPOILT]
METHODS["adamw"] = (fastadv.PGD, {"epsilon": 0.2, "step_size": 0.05, "steps": 3, "direction": "adamw"})
CASES += [Case("adamw", *one, padded=True) for one in (*SPOILT, ("token", "l2"))]
CASES += [Case("adamw", *one, padded=True, spoilt=True) for one in SPOILT]


def uneven_shards(rank: int | None, cut: int, name: str) -> dict[str, Tensor]:
    """PGD on shards of different lengths, one of them perhaps empty."""
    model, whole = seeded(Shards), shard(None, True, False)
    if cut == LENGTH // 2:  # all tokens in the first half
        every = whole.every & (torch.arange(LENGTH) < cut)
        whole = whole._replace(mask=every, every=every)
    own = slice(None) if rank is None else (slice(0, cut), slice(cut, None))[rank]
    group = None if rank is None else dist.group.WORLD
    data = whole._replace(ids=whole.ids[:, own], mask=whole.mask[:, own], at=own.start or 0, alone=True)
    scope, norm = name.split("-")
    make, options = METHODS["pgd"]
    adv = make(model, embedding="words", scope=scope, norm=norm, process_group=group, **options)
    adv.backward(lambda: model(data), mask=data.mask)
    found = {f"sum {name}": grad for name, grad in gradients(model).items()}
    return {**found, "same norm": adv.perturbation_norm}


def scaled(rank: int | None, factor: float, norm: str) -> dict[str, Tensor]:
    """PGD up gradients that are so many times as large: the direction is the same."""
    model, data = seeded(Shards), shard(rank, True, False)
    model.spoil = torch.full((ROWS, 1, 1), factor, dtype=torch.float64)
    group = None if rank is None else dist.group.WORLD
    direction = {"direction": "max", "ball": "l2"} if norm == "max" else {}
    adv = fastadv.PGD(model, embedding="words", scope="sample", process_group=group, **METHODS["pgd"][1], **direction)
    adv.backward(lambda: model(data, group), mask=data.mask, attack=lambda: model(data, group, spoilt=True))
    return {f"sum {name}": grad for name, grad in gradients(model).items()}


def sharded(rank: int | None, case: Case) -> dict[str, Tensor]:
    """One step of a rank (None: of one process with all positions): gradients, the loss and the figures."""
    model, make_options = seeded(Shards), METHODS[case.name]
    group = None if rank is None else dist.group.WORLD
    data = shard(rank, case.padded, case.name in POOLED)
    if case.spoilt:
        spoil = torch.ones(ROWS, LENGTH, 1).double()
        spoil[1, 5] = torch.nan  # in the second half
        model.spoil = spoil[:, data.at : data.at + data.ids.shape[1]]
    make, options = make_options
    start = {} if case.name == "fgm" else {"random_start": at(rank)}
    adv = make(model, embedding="words", scope=case.scope, norm=case.norm, process_group=group, **{**options, **start})
    attack = (lambda: model(data, group, spoilt=True)) if case.spoilt else None
    result = adv.backward(lambda: model(data, group), mask=data.mask if case.padded else None, attack=attack)
    found = {f"sum {name}": grad for name, grad in gradients(model).items()}
    return {
        **found,
        "sum loss": result.adv_loss.double(),
        "same norm": adv.perturbation_norm.double(),
        "same skipped": adv.skipped,
    }


SCALED = [*itertools.product((1e200, 1e-200), ("l2", "max"))]
UNEVEN = [*itertools.product((LENGTH // 2, 5, LENGTH), ("sample-l2", "sample-linf", "batch-l2"))]

# Halves of the batch

WHOLE: dict[str, tuple[Callable[..., fastadv.Method], dict[str, Any]]] = {
    f"whole-{name}-{scope}-{norm}": (make, {**options, "scope": scope, "norm": norm})
    for (name, make, options) in (
        ("pgd", fastadv.PGD, {**workers.PGD, "clean_weight": 0.5}),
        ("freelb", fastadv.FreeLB, workers.LB),
    )
    for scope in ("batch", "table", "row")
    for norm in ("l2", "linf")
}
WHOLE["whole-pgd-table-random"] = (fastadv.PGD, {**workers.PGD, "scope": "table", "random_start": 0.3})
WHOLE["whole-adam-row"] = (fastadv.PGD, {**workers.PGD, "scope": "row", "direction": "adam"})
WHOLE["whole-vat-table"] = (fastadv.VAT, {"epsilon": 0.5, "scope": "table", "steps": 2})


def of_the_batch(rank: int | None, name: str) -> dict[str, Tensor]:
    """One step under DDP, or of one process with the whole batch."""
    model = workers.build()
    run: nn.Module = model if rank is None else DistributedDataParallel(model)
    group = None if rank is None else dist.group.WORLD
    torch.manual_seed(3 + (rank or 0))  # the first rank's draws are everybody's
    make, options = WHOLE[name]
    adv = make(run, embedding="word_embeddings", process_group=group, **options)
    workers.step(adv, run, batch() if rank is None else workers.half(rank))
    return {**gradients(model), "norm": adv.perturbation_norm, "skipped": adv.skipped}


# What else there is


def lengths(rank: int) -> dict[str, Tensor]:
    """FreeLB's start is scaled by the true lengths over both shards, and the shards do not draw alike."""
    data, size = shard(rank, True, False), 0.3
    adv = fastadv.NEFTune(seeded(Shards), alpha=size, embedding="words", process_group=dist.group.WORLD)
    torch.manual_seed(5)
    (found,) = adv.find(lambda: adv.model(data, dist.group.WORLD), mask=data.mask).values
    torch.manual_seed(5)
    torch.manual_seed(int(torch.randint(2**63 - 1, ())) + rank * APART)
    drawn = (2 * torch.rand(found.shape) - 1).double()
    scale = size / (data.every.sum(1) * D).sqrt()
    return {"found": found, "want": drawn * scale.view(-1, 1, 1) * data.mask.unsqueeze(-1)}


def rows_with_room(rank: int) -> dict[str, Tensor]:
    """The rows of all ranks, where the plan has empty segments at its end, as on a GPU, and where it has none."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, V // 2, (9,), generator=generator)
    values, mask = torch.randn(9, D, generator=generator).double(), torch.arange(9) != 4
    found = {"ids": ids, "values": values, "mask": mask}
    plan = segments(ids, V, mask=mask)
    for name, own in {"room": plan, "trimmed": plan.trimmed()}.items():
        shared = SharedRows(Ranks(dist.group.WORLD).meet(), own, ids, V, values, None)
        shared.rows = shared.summed(segment_sum(values, own))
        found[name] = shared.mine()[own.slot.clamp(min=0)].masked_fill(own.slot[:, None] < 0, 0)
        found[f"{name} occupied"] = shared.occupied.sum()
    return found


def told(rank: int) -> dict[str, Tensor]:
    """Errors that all ranks raise alike, and a step after one of them."""
    group, model, found = dist.group.WORLD, workers.build(), {}
    options: dict[str, Any] = {"embedding": "word_embeddings", "process_group": group}
    wrong: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
        "llr": (lambda: fastadv.LLR(model, **options), ValueError, "another method"),
        "tied": (lambda: fastadv.FGM(model, tied="both", **options), ValueError, "tied='lookup'"),
        "lengths": (lambda: fastadv.FreeLB(model, scope="batch", **options), ValueError, "random_start=False"),
        "no group": (lambda: fastadv.FGM(model, process_group="cp"), TypeError, "DeviceMesh"),
        "uneven": (lambda: uneven(rank, model, options), ValueError, "as many rows everywhere"),
    }
    for name, (act, kind, part) in wrong.items():
        try:
            act()
        except kind as error:
            found[name] = torch.tensor(part in str(error))
    return found


def uneven(rank: int, model: TinyModel, options: dict[str, Any]) -> None:
    """Two rows here and one there: void on both, and nothing is left."""
    adv = fastadv.PGD(model, scope="sample", **options)
    before = snapshot(model)
    try:
        workers.step(adv, model, {name: value[: 2 - rank] for name, value in batch().items()})
    finally:
        assert_unchanged(model, before)
        workers.step(adv, model, batch())
        adv.close()


def failed(rank: int, index: int) -> dict[str, Tensor]:
    """Under DDP, one rank fails in pass `index`: the other is told at once, and the next step is right on both."""
    model, passes = workers.build(), []
    ddp = DistributedDataParallel(model)
    make, options = WHOLE["whole-pgd-batch-l2"]
    adv = make(ddp, embedding="word_embeddings", process_group=dist.group.WORLD, **options)
    data = workers.half(rank)

    def closure() -> Tensor:
        passes.append(1)
        if rank == 1 and len(passes) == index + 1:
            raise ZeroDivisionError
        return ddp(**data).loss

    before = snapshot(model)
    with contextlib.suppress(ZeroDivisionError) if rank else pytest.raises(RuntimeError, match="rank 1 failed"):
        adv.backward(closure, mask=data["attention_mask"])
    assert_unchanged(model, before)
    workers.step(adv, ddp, data)
    return {**gradients(model), "norm": adv.perturbation_norm, "skipped": adv.skipped}


def apart(rank: int) -> dict[str, Tensor]:
    """Where a rank has failed and goes on, all are told, and no norm is made of two batches."""
    model = workers.build()
    adv = fastadv.PGD(model, embedding="word_embeddings", scope="sample", process_group=dist.group.WORLD)
    if rank == 0:
        with contextlib.suppress(ZeroDivisionError):
            adv.backward(lambda: 1 / 0)
    before = snapshot(model)
    try:
        workers.step(adv, model, batch())
    except RuntimeError as error:
        assert_unchanged(model, before)
        return {"told": torch.tensor("different steps" in str(error))}
    return {"told": torch.tensor(False)}


def mesh_dimension(rank: int) -> dict[str, Tensor]:
    """A dimension of a mesh is a group; one of a single rank is none."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh, found = init_device_mesh("cpu", (1, workers.WORLD), mesh_dim_names=("dp", "cp")), {}
    for name in ("dp", "cp"):
        model, data = seeded(Shards), shard(rank, True, False)
        adv = fastadv.PGD(model, embedding="words", scope="sample", process_group=mesh[name], **workers.PGD)
        (delta,) = adv.find(lambda model=model, data=data: model(data, dist.group.WORLD), mask=data.mask).values
        found[name] = delta.flatten(1).norm(dim=1)
    return found


SUITE: dict[str, tuple[Callable[..., dict[str, Tensor]], tuple[Any, ...]]] = {
    **{str(case): (sharded, (case,)) for case in CASES},
    **{name: (of_the_batch, (name,)) for name in WHOLE},
    **{f"uneven-{cut}-{name}": (uneven_shards, (cut, name)) for cut, name in UNEVEN},
    **{f"scaled-{factor}-{norm}": (scaled, (factor, norm)) for factor, norm in SCALED},
    **{f"failed-{index}": (failed, (index,)) for index in range(4)},
    "rows": (rows_with_room, ()),
    "lengths": (lengths, ()),
    "told": (told, ()),
    "mesh": (mesh_dimension, ()),
    "apart": (apart, ()),
}


def run(rank: int, suite: str, folder: str) -> None:
    """All cases in one pair of processes."""
    workers.SUITES[suite] = SUITE
    gc.freeze()  # a bare model's first step looks for its DDP among all objects: among fewer, here
    workers.run(rank, suite, folder)
