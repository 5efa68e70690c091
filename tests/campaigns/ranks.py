"""Two gloo processes train one model, and the closure of the same pass fails on both."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.campaigns.configurations import Configuration
from tests.campaigns.faults import KINDS
from tests.campaigns.pair import Pair, Struck
from tests.campaigns.result import Result, read
from tests.campaigns.state import State
from tests.campaigns.subject import Subject
from tests.campaigns.trials import run

WORLD = 2


class Replica(Subject):
    """One rank's part of a model that DDP trains; every rank has its own rows of the batch."""

    def __init__(self, configuration: Configuration, seed: int) -> None:
        super().__init__(configuration, seed)
        rows = slice(dist.get_rank(), None, WORLD)
        self.data = tuple(part[rows] for part in self.data)  # type: ignore[assignment]
        self.passes, self.error = -1, None
        self.closure = self._failing

    def _given(self) -> nn.Module:
        self.model = DistributedDataParallel(self.inner, find_unused_parameters=True, broadcast_buffers=False)
        return self.model

    def _failing(self) -> dict[str, Any]:
        ids, mask, labels = self.data
        logits = self.model(ids, mask)
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        self.passes -= 1
        if self.passes == -1 and self.error is not None:
            raise self.error
        return {"loss": losses.mean(), "logits": logits, "losses": losses}


class Near(Pair):
    """The two agree to rounding: after a forward without a backward DDP reduces the next one, asked to or not."""

    def _update(self) -> None:
        """Weights stay: rounding must not add up in them."""

    def _other(self, twin: State, mine: State) -> list[str]:
        found = super()._other(twin, mine)
        return [name for name in found if not _near(twin.values.get(name), mine.values.get(name))]


def _near(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and len(a) % 4 == 0):
        return False
    return torch.allclose(a.view(torch.float32), b.view(torch.float32), rtol=1e-4, atol=1e-6)


class InClosure:
    """The closure of pass `at` fails after its forward, on every rank. A negative one: passes are counted."""

    def __init__(self, subject: Callable[[], Replica], at: int, error: BaseException | None) -> None:
        self.subject, self.at, self.error = subject, at, error
        self.count = 0

    def __call__(self, action: Callable[[], None]) -> Struck:
        subject = self.subject()
        subject.passes, subject.error = self.at, self.error
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - that is what it is about
            return Struck(True, False, error)
        finally:
            self.count = self.at - subject.passes
            subject.passes, subject.error = -1, None
        return Struck(False, True, None)


def ranks(count: int, seed: int) -> Result:
    """Both ranks draw the same trials; what either of them finds counts."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (count, seed, folder), nprocs=WORLD)
        found = [read(json.loads(Path(folder, f"{rank}.json").read_text())) for rank in range(WORLD)]
    result = found[0]
    for one in found[1:]:
        result.wrong.update(one.wrong)
        result.details += one.details
    return result


def _rank(rank: int, count: int, seed: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=dt.timedelta(seconds=120))
    current: list[Pair] = []

    def pair(configuration: Configuration, seed: int) -> Pair:
        current[:] = [Near(configuration, seed, Replica)]
        return current[0]

    def subject() -> Replica:
        found = current[0].subject
        assert isinstance(found, Replica)
        return found

    def passes(of: Pair) -> float:
        watch = InClosure(subject, -1, None)
        of.undisturbed(watch)
        return watch.count

    def fault(chance: random.Random, size: float) -> InClosure:
        return InClosure(subject, chance.randrange(int(size)), chance.choice(KINDS)())

    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        result = run(count, seed, passes, fault, actions=("backward", "find", "unattacked"), pair=pair)
        Path(folder, f"{rank}.json").write_text(json.dumps(result.as_json()))
        dist.barrier()
