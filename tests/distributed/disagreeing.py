"""What each of two processes runs where one of them fails and goes on: five steps, the second of which is the faulty.

Every case has process groups of its own, which give up after two seconds.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import fastadv
from tests.distributed import workers
from tests.models import TinyModel
from tests.support import batch

TIMEOUT = 2
STEPS = 4
FAULTY = 1
METHODS: dict[str, tuple[Callable[..., fastadv.Method], dict[str, Any]]] = {
    **{name: workers.METHODS[name] for name in ("fgm-table", "pgd-sample", "freelb-sample", "yopo-sample", "smart")},
    "held-freelb": (
        lambda model, **options: fastadv.BregmanProximal(model, decay=0.5, method=fastadv.FreeLB(model, **options)),
        workers.LB,
    ),
    "freeat": (fastadv.FreeAT, {**workers.FREEAT, "carry": False, "replays": 1}),
    "plain": (fastadv.FGM, {"start_step": 100}),
    "awp": (fastadv.AWP, {"gamma": 0.05}),
}


class PlannedError(Exception):
    """What the closure of rank 1 raises."""


class Buffered(TinyModel):
    """Has a buffer, which DDP broadcasts in the first forward after each reduction."""

    def __init__(self) -> None:
        super().__init__("tfm")
        self.register_buffer("share", torch.ones(3))


def model_of(seed: int = 0) -> TinyModel:
    torch.manual_seed(seed)
    return Buffered().double()


def made(name: str, model: nn.Module) -> fastadv.Method:
    make, options = METHODS[name]
    places = {} if name == "awp" else {"embedding": "word_embeddings"}
    return make(model, **places, **options)


class Trap:
    """A closure that fails in one pass, before the forward, after it or in its backward."""

    def __init__(self, model: nn.Module, data: dict[str, Tensor], index: int | None, place: str = "before") -> None:
        self.model, self.data, self.index, self.place = model, data, index, place
        self.passes = 0

    def __call__(self) -> Any:
        now = self.passes == self.index
        self.passes += 1
        if now and self.place == "before":
            raise PlannedError
        output = self.model(**self.data)
        if now and self.place == "after":
            raise PlannedError
        if now:
            output.logits.register_hook(self.fail)
        return output

    def fail(self, _: Tensor) -> None:
        raise PlannedError


class Run:
    """Steps of one process, what they raised, and how long they took."""

    def __init__(self, model: nn.Module, adv: fastadv.Method, bare: nn.Module) -> None:
        self.model, self.adv, self.bare = model, adv, bare
        self.optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
        if hasattr(adv, "attach"):
            adv.attach(self.optimizer)
        self.errors: dict[int, str] = {}
        self.longest = 0.0

    def step(self, number: int, call: Callable[[], Any]) -> None:
        began = time.monotonic()
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - a user who catches everything and goes on
            self.errors[number] = f"{type(error).__name__}: {error}"
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.longest = max(self.longest, time.monotonic() - began)

    def outcome(self) -> dict[str, Any]:
        values = {name: workers.whole(p.detach()) for name, p in self.bare.named_parameters()} if not self.lost else {}
        return {"errors": self.errors, "longest": self.longest, "values": values}

    @property
    def lost(self) -> bool:
        """Whether the processes cannot gather sharded weights any more."""
        return any("come apart" in error for error in self.errors.values())


def wrapped(name: str, on: str = "wrapper") -> Run:
    bare = model_of()
    ddp = DistributedDataParallel(bare)
    return Run(ddp, made(name, ddp if on == "wrapper" else bare), bare)


def closure_fails(rank: int, name: str, index: int, place: str, on: str = "wrapper") -> dict[str, Any]:
    run = wrapped(name, on)
    for number in range(STEPS):
        data = workers.half(rank, number)
        trap = Trap(run.model, data, index if (rank, number) == (1, FAULTY) else None, place)
        run.step(number, lambda trap=trap, data=data: run.adv.backward(trap, mask=data["attention_mask"]))
    return run.outcome()


def first_step_fails(rank: int, on: str) -> dict[str, Any]:
    run = wrapped("pgd-sample", on)
    for number in range(STEPS):
        data = workers.half(rank, number)
        trap = Trap(run.model, data, 0 if (rank, number) == (1, 0) else None)
        run.step(number, lambda trap=trap, data=data: run.adv.backward(trap, mask=data["attention_mask"]))
    return run.outcome()


def mask_is_wrong(rank: int) -> dict[str, Any]:
    """Of another shape, on rank 1 alone."""
    run = wrapped("pgd-sample")
    for number in range(STEPS):
        data = workers.half(rank, number)
        mask = data["attention_mask"][:, :2] if (rank, number) == (1, FAULTY) else data["attention_mask"]
        run.step(number, lambda mask=mask, data=data: run.adv.backward(Trap(run.model, data, None), mask=mask))
    return run.outcome()


def fails_when_all_is_reduced(rank: int) -> dict[str, Any]:
    """In FreeAT's own ascent, which comes after the only backward."""
    run = wrapped("freeat")
    search = run.adv.search

    def fail(_: Any) -> None:
        raise PlannedError

    for number in range(STEPS):
        data = workers.half(rank, number)
        run.adv.search = fail if (rank, number) == (1, FAULTY) else search
        run.step(number, lambda data=data: run.adv.backward(Trap(run.model, data, None), mask=data["attention_mask"]))
    return run.outcome()


def interrupted(rank: int) -> dict[str, Any]:
    """By a Ctrl-C that comes while the step is set up, and waits there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run = wrapped("pgd-sample")
    guard = run.adv._engine.guard
    save = guard.save

    def struck() -> Any:
        signal.raise_signal(signal.SIGINT)
        return save()

    for number in range(STEPS):
        data = workers.half(rank, number)
        guard.save = struck if (rank, number) == (1, FAULTY) else save  # type: ignore[method-assign]
        run.step(number, lambda data=data: run.adv.backward(Trap(run.model, data, None), mask=data["attention_mask"]))
    return run.outcome()


def micro_batch_fails(rank: int) -> dict[str, Any]:
    """One of two, in the user's `no_sync`; the user goes on with the next."""
    run = wrapped("pgd-sample")
    for number in range(STEPS):
        for micro in range(2):
            data = workers.half(rank, 2 * number + micro)
            trap = Trap(run.model, data, 1 if (rank, number, micro) == (1, FAULTY, 0) else None)
            if micro == 0:
                with run.model.no_sync(), contextlib.suppress(PlannedError):
                    run.adv.backward(trap, mask=data["attention_mask"])
            else:
                run.step(number, lambda trap=trap, data=data: run.adv.backward(trap, mask=data["attention_mask"]))
    return run.outcome()


def search_fails(rank: int) -> dict[str, Any]:
    """`find`, which reduces nothing: no other process need know."""
    run = wrapped("pgd-sample")
    for number in range(STEPS):
        data = workers.half(rank, number)
        if number == FAULTY:
            with contextlib.suppress(PlannedError):
                run.adv.find(Trap(run.model, data, 1 if rank else None), mask=data["attention_mask"])
        run.step(number, lambda data=data: run.adv.backward(Trap(run.model, data, None), mask=data["attention_mask"]))
    return run.outcome()


def schedules_differ(rank: int, name: str) -> dict[str, Any]:
    """Step 1 is attacked on rank 0 alone."""
    run = wrapped(name)
    for number in range(STEPS):
        data = workers.half(rank, number)
        run.adv._schedule.start_step = 2 if (rank, number) == (1, FAULTY) else 0
        run.step(number, lambda data=data: run.adv.backward(Trap(run.model, data, None), mask=data["attention_mask"]))
    return run.outcome()


def stops_early(rank: int, joined: bool) -> dict[str, Any]:
    """Rank 1 has a batch less; with torch's `Join` it shadows the others."""
    run = wrapped("pgd-sample")
    with Join([run.model]) if joined else contextlib.nullcontext():
        for number in range(STEPS - rank):
            data = workers.half(rank, number)
            run.step(number, lambda data=data: run.adv.backward(Trap(run.model, data, None), data["attention_mask"]))
    if not joined and rank:
        time.sleep(3 * TIMEOUT)  # it is there, and does not answer
    return run.outcome()


def fails_inside_join(rank: int) -> dict[str, Any]:
    run = wrapped("pgd-sample")
    with contextlib.suppress(RuntimeError), Join([run.model]):
        for number in range(STEPS):
            data = workers.half(rank, number)
            trap = Trap(run.model, data, 0 if (rank, number) == (1, FAULTY) else None)
            run.step(number, lambda trap=trap, data=data: run.adv.backward(trap, data["attention_mask"]))
            if run.errors and (rank == 0 or number > FAULTY):
                break
    return run.outcome()


def empty_batch(rank: int, name: str) -> dict[str, Any]:
    """Rank 1 has no sample in one step."""
    run = wrapped(name)
    for number in range(STEPS):
        data = workers.half(rank, number)
        if (rank, number) == (1, FAULTY):
            data = {key: value[:0] for key, value in data.items()}
        run.step(number, lambda data=data: run.adv.backward(Trap(run.model, data, None), mask=data["attention_mask"]))
    return run.outcome()


def sharded_fails(rank: int, ranks: tuple[int, ...], place: str) -> dict[str, Any]:
    """FSDP2, whose collectives are inside of the forward."""
    bare = model_of()
    workers.shard(bare)
    run = Run(bare, made("pgd-sample", bare), bare)
    for number in range(STEPS):
        data = workers.half(rank, number)
        trap = Trap(bare, data, 1 if rank in ranks and number == FAULTY else None, place)
        run.step(number, lambda trap=trap, data=data: run.adv.backward(trap, mask=data["attention_mask"]))
    return run.outcome()


PASSES = [("fgm-table", 0), ("pgd-sample", 1), ("freelb-sample", 2), ("plain", 0), ("awp", 1)]
MORE_PASSES = [
    ("fgm-table", 1),
    ("pgd-sample", 0),
    ("pgd-sample", 3),
    ("held-freelb", 4),
    ("yopo-sample", 3),
    ("smart", 0),
    ("freeat", 0),
    ("awp", 0),
]
Cases = dict[str, tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]]
CASES: Cases = {
    **{f"before-{name}-{index}": (closure_fails, (name, index, "before")) for name, index in PASSES},
    "first-model": (first_step_fails, ("model",)),
    "mask": (mask_is_wrong, ()),
    "interrupted": (interrupted, ()),
    "micro": (micro_batch_fails, ()),
    "empty-pgd-sample": (empty_batch, ("pgd-sample",)),
    "both-sharded": (sharded_fails, ((0, 1), "before")),
}
SLOW: Cases = {
    **{f"before-{name}-{index}": (closure_fails, (name, index, "before")) for name, index in MORE_PASSES},
    "after": (closure_fails, ("pgd-sample", 3, "after")),
    "inner": (closure_fails, ("pgd-sample", 1, "before", "model")),
    "inner-plain": (closure_fails, ("plain", 0, "before", "model")),
    "ascent": (fails_when_all_is_reduced, ()),
    "first-wrapper": (first_step_fails, ("wrapper",)),
    "search": (search_fails, ()),
    "attacked-fgm-table": (schedules_differ, ("fgm-table",)),
    "attacked-awp": (schedules_differ, ("awp",)),
    **{f"empty-{name}": (empty_batch, (name,)) for name in ("fgm-table", "smart", "awp")},
    "joined": (stops_early, (True,)),
    "sharded-late": (sharded_fails, ((1,), "after")),
}
TIMED_OUT: Cases = {
    "backward": (closure_fails, ("pgd-sample", 3, "backward")),
    "stops": (stops_early, (False,)),
    "fails-inside-join": (fails_inside_join, ()),
    "sharded": (sharded_fails, ((1,), "before")),
}
SUITES = {"cases": CASES, "slow": {**SLOW, **TIMED_OUT}}


def run(rank: int, cases: str, folder: str) -> None:
    """All of them in one pair of processes, each with groups of its own."""
    torch.set_num_threads(1)
    for name, (case, arguments) in SUITES[cases].items():
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meeting-{name}",
            rank=rank,
            world_size=workers.WORLD,
            timeout=dt.timedelta(seconds=TIMEOUT),
        )
        try:
            outcome: Any = case(rank, *arguments)
        except Exception:  # noqa: BLE001 - the test that asks for this case shows it
            outcome = traceback.format_exc()
        files = [Path(folder) / f"{name}-{one}.pt" for one in range(workers.WORLD)]
        torch.save(outcome, files[rank])
        dist.destroy_process_group()
        while not all(file.exists() for file in files):  # one may have waited for longer than the groups' time
            time.sleep(0.01)


def alone(name: str, without: tuple[int, ...] = (FAULTY,), micro_batches: int = 1) -> dict[str, Tensor]:
    """The weights that one process ends with, on whole batches, where these steps are left out."""
    model = model_of()
    run = Run(model, made(name, model), model)
    for number in range(STEPS):
        if number in without:
            continue
        for micro in range(micro_batches):
            data = batch(seed=micro_batches * number + micro)
            call = lambda data=data: run.adv.backward(Trap(model, data, None), mask=data["attention_mask"])  # noqa: E731
            if micro + 1 < micro_batches:
                call()
            else:
                run.step(number, call)
    assert not run.errors
    return run.outcome()["values"]
