"""Measure how OpenMP's threads wait: the time of a step by itself, and beside processes that want the same cores.

Processes that differ in the runtime's settings alone take the same step of FGM, on the default job's model with batches
of 32, in turns: `default` as the runtime waits by itself, `passive` as `fastadv train` has it wait. What else the
machine does meets both. Prints medians over the rounds, and the ratio to `default` within a round with its quartiles.
`--output` keeps the numbers as JSON, beside those of an earlier run.

    python examples/threads.py                               # 20 rounds beside nothing, 4 beside eight busy processes
    python examples/threads.py --also GOMP_SPINCOUNT=1000
    chrt -f 10 python examples/threads.py --busy-rounds 0    # before all other work of the machine
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fastadv.jobs.threads import PASSIVE, SETTINGS

BATCH = 32
PAUSE = 0.3  # seconds, until the threads of the one before have stopped spinning


def work() -> None:
    """Take a step for every line that arrives, and answer with its seconds."""
    import torch

    import fastadv
    from fastadv.jobs.surroundings import quiet
    from fastadv.train.model import DEFAULT, build, resolve, tokenizer_of
    from fastadv.train.sources import default_rows

    quiet(offline=True)
    torch.manual_seed(0)
    folder = resolve(DEFAULT)
    model, tokenizer = build(folder, ["fresh", "rotten"], 0.1), tokenizer_of(folder)
    labels = torch.arange(BATCH) % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    adv = fastadv.FGM(model, epsilon=0.1, scope="sample")
    texts = [row.text for row in default_rows()]
    print("ready", flush=True)
    for line in sys.stdin:
        start = int(line) * BATCH % (len(texts) - BATCH)
        batch = dict(tokenizer(texts[start : start + BATCH], padding=True, return_tensors="pt"))
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        begun = time.perf_counter()
        adv.backward(lambda batch=batch: model(**batch, labels=labels).loss, mask=batch["attention_mask"])
        optimizer.step()
        optimizer.zero_grad()
        print(time.perf_counter() - begun, flush=True)


class Worker:
    """A process with its own settings."""

    def __init__(self, settings: dict[str, str], threads: int) -> None:
        left = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        left["OMP_NUM_THREADS"] = str(threads)
        command = [sys.executable, __file__, "--worker"]
        self.process = subprocess.Popen(  # noqa: S603 - this file
            command, env={**left, **settings}, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._read()

    def step(self, index: int) -> float:
        assert self.process.stdin is not None
        print(index, file=self.process.stdin, flush=True)
        return float(self._read())

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a worker has died: its error is above")
        return line


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Processes that want a core each, and do nothing with it."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()


def in_turns(workers: dict[str, Worker], rounds: int, first: int) -> dict[str, list[float]]:
    """Seconds of each worker's steps; every second round goes backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for index in range(first, first + rounds):
        for name in list(workers) if index % 2 else reversed(workers):
            seconds[name].append(workers[name].step(index))
            time.sleep(PAUSE)
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Medians, and the quartiles of the ratio to `default` within a round."""
    found = {}
    for name, values in seconds.items():
        ratios = [one / other for one, other in zip(values, seconds["default"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        ends = {"ratio": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}
        found[name] = {"seconds": round(statistics.median(values), 4), **ends}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--busy-rounds", type=int, default=4)
    parser.add_argument("--busy", type=int, default=8)
    parser.add_argument("--also", action="append", default=[], metavar="NAME=VALUE", help="a setting to try besides")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work()
        return
    settings = {"default": {}, "passive": PASSIVE, **{one: dict([one.split("=")]) for one in given.also}}
    workers = {name: Worker(chosen, given.threads) for name, chosen in settings.items()}
    in_turns(workers, 2, 0)  # the first steps are not like the rest
    result = json.loads(given.output.read_text()) if given.output and given.output.exists() else {}
    for count, rounds in ((0, given.rounds), (given.busy, given.busy_rounds)):
        if rounds:
            with busy(count):
                rows = summary(in_turns(workers, rounds, 2))
            load = round(os.getloadavg()[0], 1)
            first = os.sched_getscheduler(0) != os.SCHED_OTHER
            place = {"threads": given.threads, "cores": len(os.sched_getaffinity(0)), "before all others": first}
            result[f"beside {count} busy processes"] = {**place, "load": load, "rounds": rounds, **rows}
            print(f"beside {count} busy processes, load {load}, {rounds} rounds")
            for name, row in rows.items():
                print(f"  {name:24}{row['seconds']:8.3f} s  x {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")
    for worker in workers.values():
        worker.process.kill()
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
