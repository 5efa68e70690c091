"""What each of two gloo processes runs where a model is cut in two stages; one process runs both for comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadv
from fastadv.integrations.pipeline import Pipeline
from tests.distributed import workers
from tests.support import seeded

V, D, T, BATCH, MICRO = 20, 8, 5, 8, 4
Found = dict[str, Tensor]
L2: dict[str, Any] = {"epsilon": 0.5, "scope": "sample"}
METHODS: dict[str, tuple[Callable[..., fastadv.Method], dict[str, Any]]] = {
    "fgm-table": (fastadv.FGM, {"epsilon": 0.5}),
    "fgm-sample": (fastadv.FGM, L2),
    "pgd-sample": (fastadv.PGD, L2),
    "pgd-row": (fastadv.PGD, {**L2, "scope": "row"}),
    "pgd-batch": (fastadv.PGD, {**L2, "scope": "batch", "norm": "linf"}),
    "pgd-last": (fastadv.PGD, {**L2, "clean_weight": 0, "random_start": True}),
    "pgd-weighted": (fastadv.PGD, {**L2, "clean_weight": 0.3, "adv_weight": 0.7, "relative": True}),
    "freelb": (fastadv.FreeLB, {"step_size": 0.3, "random_start": 0.2}),
    "fgsm": (fastadv.FGSM, {"epsilon": 0.1}),
    "freeat": (fastadv.FreeAT, {"epsilon": 0.1, "replays": 2}),
    "neftune": (fastadv.NEFTune, {}),
    "every": (fastadv.PGD, {**L2, "every": 2, "start_step": 1}),
}
REFUSED: dict[str, Callable[..., fastadv.Method]] = {
    "SMART": fastadv.SMART,
    "VAT": fastadv.VAT,
    "LLR": fastadv.LLR,
    "YOPO": lambda model: fastadv.YOPO(model, split="mix"),
    "AWP": fastadv.AWP,
    "BregmanProximal": fastadv.BregmanProximal,
    "tied": lambda model: fastadv.PGD(model, tied="both"),
    "owner": lambda model: fastadv.PGD(model, backward=lambda loss: loss.backward()),
}


class First(nn.Module):
    """Words, and something that mixes positions."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(V, D)
        self.mix = nn.Linear(T, T)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.mix(self.words(ids).mT).mT.contiguous()))


class Last(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner, self.head, self.dropout = nn.Linear(D, D), nn.Linear(D, V), nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(self.dropout(torch.tanh(self.inner(hidden))))


def stages(dropout: float = 0.0) -> nn.Sequential:
    return seeded(lambda: nn.Sequential(First(dropout), Last(dropout)))


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """A micro-batch's share of the batch's mean over tokens."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (BATCH * T)


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and mask."""
    ids, labels = torch.randint(V, (2, BATCH, T), generator=torch.Generator().manual_seed(seed)).unbind()
    return ids, labels, torch.arange(T) < T - torch.arange(BATCH)[:, None] % 3


def pipeline_of(rank: int, schedule: str, model: nn.Sequential) -> Pipeline:
    from torch.distributed import pipelining

    stage = pipelining.PipelineStage(model[rank], rank, workers.WORLD, torch.device("cpu"))
    return Pipeline(getattr(pipelining, schedule)(stage, MICRO, loss_fn=loss_of, scale_grads=False))


def step(pipeline: Pipeline, adv: fastadv.Method | None, seed: int) -> fastadv.StepResult | None:
    """One rank's part."""
    ids, labels, mask = batch(seed)
    torch.manual_seed(seed)
    return pipeline.follow(target=labels) if adv is None else pipeline.backward(adv, ids, mask=mask)


def alone(adv: fastadv.Method, model: nn.Module, seed: int) -> fastadv.StepResult:
    """The same micro-batches in one forward of one process."""
    ids, labels, mask = (one.chunk(MICRO) for one in batch(seed))
    torch.manual_seed(seed)
    return adv.backward(lambda: sum(loss_of(model(i), l) for i, l in zip(ids, labels, strict=True)), mask=list(mask))


def seen(adv: fastadv.Method, result: fastadv.StepResult, index: int) -> Found:
    """Losses, norm and perturbations after a step."""
    found = {"loss": result.loss, "norm": adv.perturbation_norm}
    if result.adv_loss is not None:
        found["adv_loss"] = result.adv_loss
    for number, lookup in enumerate(adv._engine.last.lookups.items):
        moved = lookup.added()
        if moved is not None:
            found[f"delta {number}"] = moved.detach().clone()
    return {f"step {index} {name}": value.double() for name, value in found.items()}


def trained(rank: int, schedule: str, name: str) -> Found:
    """Three optimizer steps of one stage; on the first rank, what the method tells."""
    model = stages()
    pipeline, optimizer = pipeline_of(rank, schedule, model), torch.optim.SGD(model[rank].parameters(), lr=0.5)
    make, options = METHODS[name]
    adv, found = make(model[0], **options) if rank == 0 else None, {}
    for index in range(3):
        result = step(pipeline, adv, index)
        found |= {f"{index} {rank}.{key}": p.grad.clone() for key, p in model[rank].named_parameters()}
        if result is not None:
            found |= seen(adv, result, index)
        optimizer.step()
        optimizer.zero_grad()
    return found


def expected(name: str) -> Found:
    model = stages()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    make, options = METHODS[name]
    adv, found = make(model, **options), {}
    for index in range(3):
        result = alone(adv, model, index)
        found |= {f"{index} {key}": p.grad.clone() for key, p in model.named_parameters()}
        found |= seen(adv, result, index)
        optimizer.step()
        optimizer.zero_grad()
    return found


def masks(rank: int, mode: str) -> Found:
    """Passes at one place: their losses differ by dropout's masks alone, which both stages draw."""
    model = stages(0.5)
    adv = fastadv.FreeLB(model[0], step_size=0.0, random_start=False, dropout=mode) if rank == 0 else None
    result = step(pipeline_of(rank, "Schedule1F1B", model), adv, 0)
    modes = torch.tensor([part.training for part in model[rank].modules()])
    return {"modes": modes} | ({} if result is None else {"losses": torch.stack([result.loss, result.adv_loss])})


def failed(rank: int) -> Found:
    """The first rank fails between two passes; gradients are what they were, and the next step is right."""
    model = stages()
    pipeline, told = pipeline_of(rank, "Schedule1F1B", model), []
    adv = fastadv.PGD(model[0], **L2) if rank == 0 else None
    step(pipeline, adv, 0)
    before = [p.grad.clone() for p in model[rank].parameters()]
    ascend = None if adv is None else adv._engine.new_perturbation

    def failing(lookups: Any) -> Any:
        perturbation = ascend(lookups)
        perturbation.ascend = lambda rule: 1 // 0
        return perturbation

    if adv is not None:
        adv._engine.new_perturbation = failing
    try:
        step(pipeline, adv, 1)
    except (ZeroDivisionError, RuntimeError) as error:
        told.append("first stage's rank failed" in str(error) or isinstance(error, ZeroDivisionError))
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model[rank].parameters(), before, strict=True))
    if adv is not None:
        adv._engine.new_perturbation = ascend
    model.zero_grad()
    step(pipeline, adv, 0)
    again = [torch.equal(p.grad, grad) for p, grad in zip(model[rank].parameters(), before, strict=True)]
    return {"told": torch.tensor(told), "again": torch.tensor(again)}


def refused(rank: int) -> Found:
    """By method: whether an error said so, on the first rank; the other one is told."""
    found = {}
    for name, make in REFUSED.items():
        model = stages()
        pipeline = pipeline_of(rank, "ScheduleGPipe", model)
        adv = make(model[0]) if rank == 0 else None
        try:
            step(pipeline, adv, 0)
        except ValueError as error:
            found[name] = torch.tensor("pipeline" in str(error))
        except RuntimeError as error:
            found[name] = torch.tensor("first stage's rank failed" in str(error))
        assert all(p.grad is None for p in model[rank].parameters()), name
    return found


def schedules(rank: int) -> Found:
    """Which are refused, of schedules and stages."""
    from torch.distributed import pipelining

    stage, wrapped = (
        pipelining.PipelineStage(stages()[rank], rank, workers.WORLD, torch.device("cpu")) for _ in range(2)
    )
    wrapped.submod.compile()
    made = {
        "scaled": lambda: pipelining.ScheduleGPipe(stage, MICRO, loss_fn=loss_of),
        "no loss": lambda: pipelining.ScheduleGPipe(stage, MICRO, scale_grads=False),
        "compiled": lambda: pipelining.ScheduleGPipe(wrapped, MICRO, loss_fn=loss_of, scale_grads=False),
        "several": lambda: pipelining.ScheduleInterleaved1F1B([stage], MICRO, loss_fn=loss_of, scale_grads=False),
    }
    found = {}
    for name, make in made.items():
        schedule = make()
        try:
            Pipeline(schedule)
        except (TypeError, ValueError) as error:
            found[name] = torch.tensor("schedule" in str(error) or "stage" in str(error))
    return found


def in_a_closure(rank: int) -> Found:
    """A schedule that a closure runs goes back in every pass: an error that names the way."""
    from torch.distributed import pipelining

    ids, labels, _ = batch(0)
    model = stages()
    stage = pipelining.PipelineStage(model[rank], rank, workers.WORLD, torch.device("cpu"))
    schedule = pipelining.ScheduleGPipe(stage, MICRO, loss_fn=loss_of, scale_grads=False)
    if rank == 1:
        schedule.step(target=labels)
        return {}

    def closure() -> Tensor:
        schedule.step(ids)
        return torch.zeros((), dtype=torch.float64)

    try:
        fastadv.PGD(model[0]).backward(closure)
    except RuntimeError as error:
        return {"told": torch.tensor("fastadv.integrations.pipeline" in str(error))}
    return {"told": torch.tensor(False)}


Cases = dict[str, tuple[Callable[..., Found], tuple[Any, ...]]]
QUICK = ("fgm-table", "pgd-sample", "freelb", "neftune", "every")
FAST: Cases = {
    **{f"Schedule1F1B-{name}": (trained, ("Schedule1F1B", name)) for name in QUICK},
    **{f"masks-{mode}": (masks, (mode,)) for mode in ("same", "fresh", "off")},
    "failed": (failed, ()),
    "refused": (refused, ()),
    "schedules": (schedules, ()),
    "in-a-closure": (in_a_closure, ()),
}
SLOW: Cases = {
    **{f"Schedule1F1B-{name}": (trained, ("Schedule1F1B", name)) for name in METHODS if name not in QUICK},
    **{f"ScheduleGPipe-{name}": (trained, ("ScheduleGPipe", name)) for name in ("pgd-sample", "pgd-row", "freelb")},
}
SUITES = {"fast": FAST, "slow": SLOW}


def run(rank: int, suite: str, folder: str) -> None:
    """One suite, in one of the processes."""
    workers.run_cases(rank, SUITES[suite], folder)
