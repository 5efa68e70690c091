"""SIGKILL the command at random times and inside saves, go on until it is done, and compare with nobody's kills."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from tests.train.conftest import save_encoder, texts, write_csv

if TYPE_CHECKING:
    from typing_extensions import Self

Command = Literal["train", "compare", "sweep"]
ROOT = Path(__file__).parents[2]
TRIES = 6  # kills in a chain, at most
IN_SAVES = 0.6  # of the kills of `train`
METHODS = ["fgm", "freeat --replays 3", "bregmanproximal", "vat", "awp", "freelb", "pgd --probe-dtype bfloat16"]
SMALL = (
    "--num-train-epochs 3 --per-device-train-batch-size 8 --learning-rate 1e-3 --radii 0.1,0.2 --attack-steps 2 "
    "--attack-samples 8 --logging-steps 2"
)
# What appears while something is saved: the kill comes up to so many seconds later.
SAVES = {
    "run/*/unfinished/*": 0.06,
    "run/*/unfinished/*/*.safetensors": 0.02,
    "run/*/checkpoint-*": 0.01,
    "run/*/config.json": 0.02,
    "run/*/.*.tmp": 0.005,
    "run/*.json": 0.02,
    "run/.*.tmp": 0.005,
}
TIMES = {"seconds_per_step", "peak_memory", "conditions", "finished", "command"}


@dataclass
class Found:
    """What a campaign counted."""

    kills: int = 0
    chains: int = 0
    not_resumable: int = 0
    differ: int = 0
    lines: list[str] = field(default_factory=list)


class Server:
    """The process that jobs are forked from."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.campaigns.kill_server"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, folder: Path, arguments: list[str], **when: Any) -> dict[str, Any]:
        """Run a job to its end, or to its kill."""
        assert self._process.stdin is not None and self._process.stdout is not None
        job = {"folder": str(folder), "arguments": arguments, "output": str(folder / "output.txt"), **when}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def kills(command: Command, count: int, seed: int) -> dict[str, Any]:
    """Kill small jobs of a command `count` times, in chains; each goes on until it is done.

    Returns: `kills`, `chains`, `not_resumable` and `differ` (chains), and `lines` on those.
    """
    found, draw, whole = Found(), random.Random(f"{command} {seed}"), {}
    with tempfile.TemporaryDirectory() as place, Server() as server:
        root = Path(place)
        (root / "encoder").mkdir()
        save_encoder(root / "encoder")
        write_csv(root / "texts.csv", texts(60))
        while found.kills < count:
            arguments = _arguments(command, root, draw)
            key = " ".join(arguments)
            if key not in whole:
                whole[key] = _undisturbed(server, root / f"whole-{len(whole)}", arguments)
            _chain(server, root / "broken", arguments, whole[key], draw, found, count - found.kills)
    return asdict(found)


def _arguments(command: Command, root: Path, draw: random.Random) -> list[str]:
    """One of the jobs, in the folder `run`."""
    common = [
        "--model",
        str(root / "encoder"),
        "--data",
        str(root / "texts.csv"),
        "--output-dir",
        "run",
        *SMALL.split(),
    ]
    if command == "train":
        return ["train", *common, "--method", *draw.choice(METHODS).split()]
    if command == "sweep":
        return ["sweep", *common, "--try", "fgm epsilon=0.1,0.2", "--try", "freeat", "--seeds", "0,1"]
    return ["compare", *common, "--methods", "fgm,freeat", "--seeds", "0,1"]


def _undisturbed(server: Server, folder: Path, arguments: list[str]) -> tuple[dict[str, Any], float]:
    """What a run leaves that nobody kills, and how long it takes."""
    folder.mkdir()
    ended = server.run(folder, arguments)
    assert ended["code"] == 0, (folder / "output.txt").read_text()
    return _left(folder / "run"), ended["seconds"]


def _chain(
    server: Server,
    folder: Path,
    arguments: list[str],
    whole: tuple[dict[str, Any], float],
    draw: random.Random,
    found: Found,
    most: int,
) -> None:
    """Start a job, kill it and go on, several times; then let it end."""
    folder.mkdir()
    found.chains += 1
    history = []
    for _ in range(min(TRIES, most)):
        when = _when(arguments[0], whole[1], draw)
        ended = server.run(folder, _going_on(folder, arguments), **when)
        history.append(f"{when} -> {ended['code']} after {ended['seconds']:.2f} s")
        found.kills += ended["killed"]
        if not ended["killed"]:
            break
    else:
        ended = server.run(folder, _going_on(folder, arguments))
    if ended["code"] != 0:
        found.not_resumable += 1
        last = "\n".join((folder / "output.txt").read_text().splitlines()[-5:])
        found.lines.append(f"cannot go on: {' '.join(arguments)}; {'; '.join(history)}\n{last}")
    else:
        different = _different(_left(folder / "run"), whole[0])
        if different:
            found.differ += 1
            found.lines.append(f"differs in {', '.join(different)}: {' '.join(arguments)}; {'; '.join(history)}")
    shutil.rmtree(folder)


def _going_on(folder: Path, arguments: list[str]) -> list[str]:
    """The command that goes on: --resume of a training that has begun, else the same again."""
    begun = arguments[0] == "train" and (folder / "run/settings.json").exists()
    return ["train", "--resume", "--output-dir", "run"] if begun else arguments


def _when(command: str, seconds: float, draw: random.Random) -> dict[str, Any]:
    if command == "train" and draw.random() < IN_SAVES:
        pattern = draw.choice(list(SAVES))
        return {"seen": pattern, "after": draw.uniform(0, SAVES[pattern])}
    if command != "train" and draw.random() < 0.3:
        return {"seen": "run/*", "after": draw.uniform(0, 0.01)}
    return {"after": draw.uniform(0, 0.8 * seconds)}


def _left(run: Path) -> dict[str, Any]:
    """What a run leaves that must be the same: its files' names, every byte of the models, and figures but times."""
    left: dict[str, Any] = {str(path.relative_to(run)): "" for path in run.rglob("*")}
    for path in run.rglob("*.safetensors"):
        left[str(path.relative_to(run))] = path.read_bytes()
    for path in run.glob("*.json"):
        left[path.name] = _without_times(json.loads(path.read_text()))
    return left


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_times(one) for name, one in value.items() if name not in TIMES}
    return [_without_times(one) for one in value] if isinstance(value, list) else value


def _different(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
