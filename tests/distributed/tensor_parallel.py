"""What each of two gloo processes runs under tensor and sequence parallelism."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadv
from tests.distributed import workers
from tests.models import CLASSES, D, V
from tests.support import batch, seeded

PGD = {"epsilon": 0.4, "step_size": 0.3, "steps": 3, "clean_weight": 0.5}
LENGTH = 8  # of which two ranks have as much each


class Stack(nn.Module):
    """Words, a norm, two layers, the mean over positions."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(V, D, padding_idx=padding_idx), nn.LayerNorm(D)
        self.first, self.second, self.head = nn.Linear(D, 24), nn.Linear(24, D), nn.Linear(D, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        h = self.second(torch.tanh(self.first(self.norm(self.words(input_ids)))))
        mask = attention_mask.unsqueeze(-1)
        return F.cross_entropy(self.head((torch.tanh(h) * mask).sum(1) / mask.sum(1)), labels)


def plan(kind: str) -> dict[str, Any]:
    """What `parallelize_module` is given."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        PrepareModuleOutput,
        RowwiseParallel,
        SequenceParallel,
    )

    ids, layers = Replicate(), {"first": ColwiseParallel(), "second": RowwiseParallel()}
    shards = {"norm": SequenceParallel(), "first": ColwiseParallel(input_layouts=Shard(1)), "second": RowwiseParallel()}

    def whole(layout: Any) -> Any:
        return PrepareModuleInput(input_layouts=layout, desired_input_layouts=Replicate(), use_local_output=True)

    def sharded(**options: Any) -> Any:
        return RowwiseParallel(input_layouts=ids, output_layouts=Shard(1), **options)

    to_shards = PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1))
    return {
        "rowwise": {"words": RowwiseParallel(input_layouts=ids), **layers},
        "rowwise-dtensor": {
            "words": RowwiseParallel(input_layouts=ids, use_local_output=False),
            "norm": whole(Replicate()),
            **layers,
        },
        "colwise": {"words": ColwiseParallel(output_layouts=Replicate()), **layers},
        "colwise-dtensor": {"words": ColwiseParallel(use_local_output=False), "norm": whole(Shard(-1)), **layers},
        "sequence": {"words": sharded(), **shards},
        "sequence-dtensor": {"words": sharded(use_local_output=False), **shards},
        "prepared": {"words": to_shards, **shards},
        "prepared-norm": {"norm": to_shards, "first": whole(Shard(1))},
    }[kind]


def waves(rank: int | None, parts: bool) -> Callable[[tuple[int, ...], Tensor], Tensor]:
    """A start that is the same wherever a position lies."""

    def start(shape: tuple[int, ...], mask: Tensor) -> Tensor:
        del mask
        whole = 0.1 * torch.sin(torch.arange(4 * LENGTH * D)).view(4, LENGTH, D)
        return whole[:, (rank or 0) * LENGTH // 2 :][:, : shape[1]] if parts else whole

    return start


METHODS: dict[str, tuple[Callable[..., fastadv.Method], dict[str, Any]]] = {
    "pgd-sample": (fastadv.PGD, {**PGD, "scope": "sample"}),
    "pgd-token": (fastadv.PGD, {**PGD, "scope": "token"}),
    "pgd-linf": (fastadv.PGD, {**PGD, "scope": "sample", "norm": "linf"}),
    "pgd-table": (fastadv.PGD, {**PGD, "scope": "table", "relative": True}),
    "freelb-batch": (fastadv.FreeLB, {"epsilon": 0.3, "scope": "batch", "random_start": waves}),
    "yopo-sample": (fastadv.YOPO, {"steps": 2, "split": "first", "random_start": waves}),
    "neftune": (fastadv.NEFTune, {}),
    "freelb-random": (fastadv.FreeLB, {"epsilon": 0.3}),
}
ONCE = ("freelb-batch", "freelb-random", "yopo-sample", "neftune")
EXACT = ("rowwise", "rowwise-dtensor", "colwise", "colwise-dtensor", "sequence", "sequence-dtensor", "prepared")


def step(
    rank: int | None,
    kind: str,
    name: str,
    perturbed: str = "words",
    first: str = "plan",
    parts: bool = False,
    twice: bool = False,
) -> dict[str, Tensor]:
    """One step of a model under a plan (rank None: of one process): what `full_tensor` has of its gradients.

    Args:
        rank: of this process.
        kind: of plan.
        name: of the method.
        perturbed: which module is.
        first: what is made first, the "plan" or the "method".
        parts: whether each rank is told of its part, by process_group=.
        twice: whether a step goes before.
    """
    model, data = seeded(Stack), batch(length=LENGTH)
    make, options = METHODS[name]
    options = {**options, "embedding": perturbed}
    cut = rank is not None and (parts or perturbed == "norm")  # what is perturbed
    if options.get("random_start") is waves:
        options["random_start"] = waves(rank, cut)
    mask = data["attention_mask"].chunk(workers.WORLD, dim=1)[rank] if cut else data["attention_mask"]
    if rank is not None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import parallelize_module

        mesh = init_device_mesh("cpu", (workers.WORLD,), mesh_dim_names=("tp",))
        adv = make(model, **options) if first == "method" else None
        parallelize_module(model, mesh, plan(kind))
        if parts:
            options["process_group"] = mesh["tp"]
        adv = adv or make(model, **options)
    else:
        adv = make(model, **options)
    torch.manual_seed(3)
    if twice:  # the second step is lent what the first one has left
        with contextlib.suppress(ValueError):
            adv.backward(lambda: model(**data), mask=mask)
    adv.backward(lambda: model(**data), mask=mask)
    found = {key: workers.whole(p.grad) for key, p in model.named_parameters()}
    return {**found, "norm": adv.perturbation_norm, "skipped": adv.skipped}


def told(rank: int, act: Callable[..., Any], arguments: tuple[Any, ...], part: str) -> dict[str, Tensor]:
    """Whether it is refused, in these words."""
    try:
        act(rank, *arguments)
    except ValueError as error:
        return {"told": torch.tensor(part in str(error))}
    return {"told": torch.tensor(False)}


def moved_weights(rank: int) -> None:
    """AWP under a plan."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    del rank
    model = seeded(Stack)
    parallelize_module(model, init_device_mesh("cpu", (workers.WORLD,)), plan("rowwise"))
    fastadv.AWP(model)


def unlike_seeds(rank: int) -> None:
    """A random start that every rank draws for itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    model, data = seeded(Stack), batch(length=LENGTH)
    parallelize_module(model, init_device_mesh("cpu", (workers.WORLD,)), plan("rowwise"))
    adv = fastadv.FreeLB(model, embedding="words")
    torch.manual_seed(rank)
    adv.backward(lambda: model(**data), mask=data["attention_mask"])


def unmasked(rank: int) -> None:
    """A shard of an embedding that knows its padding, without a mask."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    del rank
    model, data = seeded(lambda: Stack(padding_idx=0)), batch(length=LENGTH)
    mesh = init_device_mesh("cpu", (workers.WORLD,), mesh_dim_names=("tp",))
    parallelize_module(model, mesh, plan("sequence"))
    fastadv.PGD(model, embedding="words", scope="sample", process_group=mesh["tp"]).backward(lambda: model(**data))


STEPS: dict[str, tuple[Any, ...]] = {
    **{f"{kind}-{name}": (kind, name) for kind in EXACT for name in ("pgd-sample", "pgd-token", "pgd-table")},
    **{
        f"{kind}-{name}-before": (kind, name, "words", "method")
        for kind in EXACT
        for name in ("pgd-sample", "pgd-table")
    },
    **{f"{kind}-{name}": (kind, name) for kind in ("rowwise", "sequence") for name in ONCE},
    **{
        f"{kind}-{name}-parts": (kind, name, "words", "plan", True)
        for kind in ("sequence", "sequence-dtensor")
        for name in ("pgd-sample", "pgd-token", "pgd-linf", "freelb-batch", "yopo-sample")
    },
    **{
        f"{kind}-norm-{name}": (kind, name, "norm")
        for kind in ("sequence", "prepared-norm")
        for name in ("pgd-token", "pgd-linf")
    },
    **{
        f"{kind}-norm-{name}-parts": (kind, name, "norm", "plan", True)
        for kind in ("sequence", "prepared-norm")
        for name in ("pgd-sample", "freelb-batch")
    },
}
REFUSED: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "norm-sample": (step, ("sequence", "pgd-sample", "norm"), "give process_group="),
    "norm-batch": (step, ("sequence", "freelb-batch", "norm"), "give process_group="),
    "norm-start": (step, ("sequence", "neftune", "norm"), "give process_group="),
    "norm-start-again": (step, ("sequence", "neftune", "norm", "plan", False, True), "give process_group="),
    "prepared-norm": (step, ("prepared-norm", "pgd-sample", "norm"), "give process_group="),
    "same-everywhere": (step, ("rowwise-dtensor", "pgd-sample", "words", "plan", True), "leave process_group out"),
    "table": (step, ("sequence", "pgd-table", "words", "plan", True), "use scope='sample'"),
    "awp": (moved_weights, (), "parameters="),
    "seeds": (unlike_seeds, (), "with the same number"),
    "padding": (unmasked, (), "give mask="),
}
SUITE: dict[str, tuple[Callable[..., dict[str, Tensor]], tuple[Any, ...]]] = {
    **{name: (step, arguments) for name, arguments in STEPS.items()},
    **{f"refused-{name}": (told, one) for name, one in REFUSED.items()},
}


def run(rank: int, suite: str, folder: str) -> None:
    """All cases in one pair of processes."""
    workers.SUITES[suite] = SUITE
    gc.freeze()  # a bare model's first step looks for its DDP among all objects: among fewer, here
    workers.run(rank, suite, folder)
