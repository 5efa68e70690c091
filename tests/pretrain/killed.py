"""Kill a training where it hurts, resume it, and hold its weights against those of one that nobody killed.

python -m tests.pretrain.killed            ten places, in one process and in two
"""

from __future__ import annotations

import contextlib
import datetime as dt
import multiprocessing as mp
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.pretrain import toy

STEPS, SAVES = 12, 3
PATIENCE = 120  # seconds until a rank whose neighbour was killed must have ended
PRELOADED = [
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "tests.pretrain.toy",
]
METHODS = ("freelb", "pgd", "smart", "yopo", "vat")  # with dropout in all of them


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, count: int, *, after: bool = False) -> None:
    """Die in call `count` of a function: as it begins, or as it has ended."""
    original, calls = getattr(owner, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == count and not after:
            die()
        found = original(*args, **kwargs)
        if len(calls) == count:
            die()
        return found

    setattr(owner, name, counted)


def cut_off(save: int) -> None:
    """Die when a file of the checkpoint is half written, in the thread that writes it."""
    from torch.distributed.checkpoint import filesystem

    from fastadv.pretrain import checkpoint

    begin, write = checkpoint._write, filesystem._write_item
    saves: list[int] = []
    items: list[int] = []

    def begun(*args: Any) -> Any:
        saves.append(1)
        return begin(*args)

    def half(transforms: Any, stream: Any, *rest: Any) -> Any:
        items.extend([1] * (len(saves) == save))
        if len(items) == 20:
            stream.write(b"half of it")
            stream.flush()
            die()
        return write(transforms, stream, *rest)

    checkpoint._write, filesystem._write_item = begun, half


def places(rank: int, chance: random.Random) -> dict[str, Callable[[], None]]:
    """Where the rank that is to die does: by name, what arranges it. Only the first rank gives checkpoints names."""
    from fastadv.pretrain import checkpoint, loop, metrics, step
    from fastadv.pretrain.inputs import Inputs

    in_training = chance.randrange(SAVES + 2, STEPS + 1)  # something is saved
    save = chance.randrange(2, STEPS // SAVES)  # and something is left to train
    found: dict[str, Callable[[], None]] = {
        "before a step": lambda: before(loop, "train_step", in_training),
        "in a micro-batch": lambda: before(Inputs, "closure", 2 * in_training),
        "between gradients and update": lambda: before(step, "update", in_training),
        "after an update": lambda: before(step, "update", in_training, after=True),
        "after a save's row of the log": lambda: before(metrics.Meter, "log", save, after=True),
        "in a save, before staging": lambda: before(checkpoint, "get_state_dict", save + 1),
        "in a save, staged": lambda: before(checkpoint, "_write", save, after=True),
        "in a save, half of a file": lambda: cut_off(save),
        "in a save, all written": lambda: before(checkpoint, "publish", save),
        "in a save, before its name": lambda: before(checkpoint.files, "sync_tree", save, after=True),
    }
    if rank:  # its place is then in the midst of the first rank's
        found["in a save, all written"] = lambda: before(checkpoint.Saver, "_settle", 2 * save + 1)
        found["in a save, before its name"] = lambda: before(checkpoint.Saver, "finish", save + 1)
    return found


PLACES = list(places(0, random.Random(0)))


def work(
    rank: int, world: int, folder: str, model: str, method: str, victim: int, place: str, seed: int, resume: bool
) -> None:
    """One rank of a training, to its end or to its death."""
    import torch.distributed as dist

    from fastadv.pretrain.processes import started

    torch.set_num_threads(1)
    sys.stderr = Path(folder, f"stderr-{rank}").open("a")  # noqa: SIM115 - until the process ends
    if rank == victim:
        places(rank, random.Random(seed))[place]()
    if world > 1:
        meeting = f"file://{folder}/meeting-{resume}"
        timeout = dt.timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timeout)
    with started() as processes:
        dtype = "float32" if model == "dropout" else "float64"
        wanted = toy.settings(Path(folder), model, max_steps=STEPS, save_every=SAVES, log_every=2, dtype=dtype)
        trained = toy.train(Path(folder), wanted, processes, method, resume=resume)
        weights = toy.weights(trained)
        if rank == 0:
            torch.save(weights, Path(folder, "weights.pt"))
    sys.stderr.flush()
    os._exit(0)


def started_ranks(world: int, *arguments: Any) -> list[Any]:
    """Run all ranks; returns their exit codes. Who does not end in time is ended, and counts as an error."""
    context: Any = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ranks = [context.Process(target=work, args=(rank, world, *arguments)) for rank in range(world)]
    for one in ranks:
        one.start()
    end = time.monotonic() + PATIENCE
    for one in ranks:
        one.join(max(0.0, end - time.monotonic()))
    late = [one for one in ranks if one.is_alive()]
    for one in late:
        one.kill()
        one.join()
    assert not late, "a rank did not end"
    return [one.exitcode for one in ranks]


@contextlib.contextmanager
def made(model: str) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp())
    toy.settings(place, model)
    yield place
    shutil.rmtree(place)


def uninterrupted(world: int, method: str, model: str = "dropout") -> dict[str, torch.Tensor]:
    """The weights of a training that nobody killed."""
    with made(model) as place:
        assert started_ranks(world, str(place), model, method, -1, "", 0, False) == [0] * world, errors(place)
        found: dict[str, torch.Tensor] = torch.load(place / "weights.pt")
    return found


def killed(
    world: int, method: str, place: str, seed: int, model: str = "dropout", after: int | None = None
) -> tuple[dict[str, torch.Tensor], str]:
    """The weights of a training one rank of which was killed, gone on with `after` ranks (default: as many).

    And what the first rank said when it went on.
    """
    victim = random.Random(seed + 1).randrange(world)
    with made(model) as at:
        codes = started_ranks(world, str(at), model, method, victim, place, seed, False)
        assert codes[victim] == -signal.SIGKILL, (codes, errors(at))
        assert all(codes), codes  # the others cannot go on
        again = world if after is None else after
        assert started_ranks(again, str(at), model, method, -1, "", 0, True) == [0] * again, errors(at)
        found: dict[str, torch.Tensor] = torch.load(at / "weights.pt")
        said = re.findall(r"phase: (no checkpoint|goes on|\d+ processes).*", (at / "stderr-0").read_text())
    return found, ", ".join(said)


def errors(folder: Path) -> str:
    return "\n".join(file.read_text()[-2000:] for file in sorted(folder.glob("stderr-*")))


def main() -> None:
    whole: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    failed = 0
    for world in (1, 2):
        for number, place in enumerate(PLACES):
            method = METHODS[number % len(METHODS)]
            if (world, method) not in whole:
                whole[world, method] = uninterrupted(world, method)
            found, said = killed(world, method, place, number)
            apart = toy.difference(found, whole[world, method])
            failed += apart != 0
            print(f"{world} ranks, {method}, killed {place}: {apart or 'bitwise'} ({said})", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
