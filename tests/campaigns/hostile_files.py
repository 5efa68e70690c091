"""Damaged and hostile data files, run folders, checkpoints and arguments: one line, or the work; never a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastadv.cli import main
from fastadv.jobs.errors import UserError
from fastadv.jobs.log import read_log
from fastadv.train import compare, data, kept, run_files
from fastadv.train.data import DataSettings
from fastadv.train.job import Settings
from fastadv.train.model import build
from fastadv.train.predict import Predictor
from tests.train.conftest import save_encoder, texts

SUBPROCESS = 100  # of so many cases one is run as the command, in a process of its own
MOVES = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
ODD = [
    "",
    " ",
    "\x1b[2J\x1b]0;x\x07",
    "\u202egnp",
    "\x9b31m",
    "\r\nerror: fake",
    "[/x]",
    "[link=http://x]y[/link]",
    "$\\frac{$",
    "<script>alert(1)</script>",
    "a|b",
    "nan",
    "-1",
    "1e400",
    "9" * 5000,
    "\u0663",
    "\ud800",
    "x" * 5000,
    "../../x",
    "-",
    "--",
    "\x00",
    "\ufeff",
    "e\u0301" * 30,
    "\U0001f468\u200d\U0001f469",
]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    10**30,
    10**400,
    1e308,
    -1e308,
    5e-324,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    *ODD,
]
TRAINS = ["--data", "t.csv", "--model", "encoder", "--output-dir", "out", "--max-steps", "1"]
COMMANDS = {
    "train": [*TRAINS, "--attack-samples", "2"],
    "evaluate": ["model", "--data", "t.csv", "--attack-samples", "2", "--attack-steps", "1", "--radii", "0.1"],
    "predict": ["model", "a fine film"],
    "sweep": [*TRAINS, "--try", "fgm epsilon=0"],
    "compare": [*TRAINS, "--methods", "fgm"],
}
# None says how much work to do: a large number there is no defect, but hours.
OPTIONS = [
    "--radii",
    "--seeds",
    "--max-length",
    "--data",
    "--text-column",
    "--label-column",
    "--output-dir",
    "--output",
    "--model",
    "--try",
    "--methods",
    "--seed",
    "--task",
    "--label-separator",
    "--test-fraction",
    "--train-samples",
    "--learning-rate",
    "--epsilon",
    "--method",
    "--nothing",
    "--test-data",
    "--group-column",
    "--head-dropout",
]


def hostile_files(count: int, seed: int) -> dict[str, Any]:
    """Run `count` cases that follow from `seed`: how they ended, and what is wrong with which."""
    found: dict[str, Any] = {"cases": 0, "outcomes": Counter(), "wrong": Counter(), "details": []}
    kinds = [_data_file, _run_folder, _trainings, _checkpoint, _arguments]
    with _place():
        for index in range(count):
            draw = random.Random(f"{seed} {index}")
            case = _command if index % SUBPROCESS == SUBPROCESS - 1 else kinds[index % len(kinds)]
            outcome, printed = _ended(case, draw)
            moves = MOVES.search(printed)
            if moves is not None and outcome != "traceback":
                outcome = "terminal moved"
            found["cases"] += 1
            if outcome in ("traceback", "terminal moved"):
                found["wrong"][outcome] += 1
                found["details"].append(f"{outcome}, seed {seed}, case {index}, {case.__name__}: {printed[-1500:]!r}")
            else:
                found["outcomes"][outcome] += 1
    return found


def _ended(case: Callable[[random.Random], str], draw: random.Random) -> tuple[str, str]:
    """How a case ended, and all that was printed meanwhile."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ended = case(draw)
    except UserError as error:
        return "refused", str(error)
    except Exception:  # noqa: BLE001 - whatever it is, it is a finding
        return "traceback", traceback.format_exc()
    return ended, out.buffer.getvalue().decode("utf-8", "replace")


@contextlib.contextmanager
def _place() -> Iterator[None]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            Path("encoder").mkdir()
            save_encoder(Path("encoder"))
            for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
                if Path("encoder", name).exists():
                    Path("sound").mkdir(exist_ok=True)
                    shutil.copy(Path("encoder", name), "sound")
            build("encoder", ["bad", "good"], 0.1).save_pretrained("sound")
            yield
        finally:
            os.chdir(before)


def _bytes(draw: random.Random, content: bytes) -> bytes:
    """Truncate, flip bits, or put something between."""
    kind, at = draw.randrange(5), draw.randrange(len(content) + 1)
    if kind == 0:
        return content[:at]
    if kind == 1:
        changed = bytearray(content)
        for _ in range(draw.choice([1, 8, 64])):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if kind == 2:
        return content[:at] + draw.randbytes(draw.randrange(40)) + content[at:]
    if kind == 3:
        return content[:at] + b"[" * draw.choice([10, 100_000]) + content[at:]
    return content[:at] + draw.choice(ODD).encode("utf-8", "surrogatepass") + content[at:]


def _changed(draw: random.Random, value: Any) -> Any:
    """Swap, add or remove a value somewhere in a tree of JSON."""
    if draw.random() < 0.25 or not isinstance(value, (dict, list)) or not value:
        return draw.choice(VALUES)
    if isinstance(value, list):
        at = draw.randrange(len(value))
        return [_changed(draw, one) if index == at else one for index, one in enumerate(value)]
    key = draw.choice(list(value))
    left = {name: one for name, one in value.items() if name != key}
    if draw.random() < 0.2:
        return left
    return {**value, draw.choice(ODD): 1} if draw.random() < 0.1 else {**left, key: _changed(draw, value[key])}


def _write(draw: random.Random, path: Path, value: Any) -> None:
    """Write JSON that is changed as a tree, or as bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if draw.random() < 0.7:
        with contextlib.suppress(ValueError):  # a number of too many digits cannot be written either
            path.write_text(json.dumps(_changed(draw, value)))
            return
    path.write_bytes(_bytes(draw, json.dumps(value).encode()))


def _data_file(draw: random.Random) -> str:
    rows: list[dict[str, Any]] = [{"text": text, "label": label} for text, label in texts(20, draw.randrange(9))]
    for _ in range(draw.randrange(4)):
        rows[draw.randrange(20)][draw.choice(["text", "label", draw.choice(ODD)])] = draw.choice(VALUES)
    ending = draw.choice([".csv", ".tsv", ".jsonl", ".json"])
    path = Path("data" + ending)
    if ending.startswith(".json"):
        content = json.dumps(rows) if ending == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    else:
        between = "," if ending == ".csv" else "\t"
        table = [["text", "label"], *([_spelled(row["text"]), _spelled(row["label"])] for row in rows)]
        content = "".join(between.join(row) + "\n" for row in table)
    raw = content.encode("utf-8", "surrogatepass")
    path.write_bytes(_bytes(draw, raw) if draw.random() < 0.6 else raw)
    task = draw.choice(["auto", "classification", "multi-label", "regression"])
    given = DataSettings(data=str(path), task=task, skip_empty=draw.random() < 0.5)
    data.load(given).description()
    return "worked"


def _spelled(value: Any) -> str:
    try:
        return str(value)
    except ValueError:
        return "1" * 5000


def _run_folder(draw: random.Random) -> str:
    settings = asdict(Settings(data=DataSettings(data="t.csv"), extra=("--max-steps", "1")))
    begun = {"command": "fastadv train", "settings": settings, "data": {"test_fingerprint": "0"}}
    cost = {"steps": 1, "seconds_per_step": 1.0, "peak_memory": 1, "device": "cpu"}
    folder = Path("run")
    _write(draw, folder / "settings.json", begun)
    _write(draw, folder / "radius.json", {"method_arguments": {"epsilon": 0.1}, "radius": None})
    _write(draw, folder / "phase.json", {"phase": "plain", "cost": cost, "warnings": []})
    _write(draw, folder / "log.jsonl", {"phase": "plain", "step": 1, "loss": 1.0, "step_seconds": [0.1]})
    outcome = "worked"
    for read in (
        lambda: run_files.begun(folder / "settings.json"),
        lambda: run_files.checked(folder / "radius.json", run_files.Chosen),
        lambda: run_files.checked(folder / "phase.json", run_files.Phase),
        lambda: read_log(folder / "log.jsonl", "plain"),
    ):
        try:
            read()
        except UserError:
            outcome = "refused"
    return outcome


def _trainings(draw: random.Random) -> str:
    cell = {"radius": 0.0, "accuracy": 0.5, "low": 0.1, "high": 0.9, "total": 2, "correct": 1, "metric": "accuracy"}
    one = {
        "arguments": {},
        "seed": 0,
        "seconds_per_step": 1.0,
        "peak_memory": 1,
        "accuracy": [cell, {**cell, "radius": 0.1}],
    }
    runs = [{"method": "plain", **one}, {"method": "fgm", **one, "arguments": {"scope": draw.choice(ODD)}}]
    path = Path("compared/compare.json")
    _write(draw, path, {"command": "fastadv compare", "job": {}, "runs": runs})
    kept.check(path)
    result = kept.Kept(path, "fastadv compare", {}).read()
    if result["runs"] and draw.random() < 0.3:
        compare.write(result, path.parent)
    elif result["runs"]:
        compare.markdown(compare.summary(result["runs"]))
    return "worked"


def _checkpoint(draw: random.Random) -> str:
    shutil.rmtree("model", ignore_errors=True)
    shutil.copytree("sound", "model")
    files = [path for path in sorted(Path("model").iterdir()) if path.suffix in (".json", ".safetensors")]
    path = draw.choice(files)
    if path.suffix == ".json":
        _write(draw, path, json.loads(path.read_text()))
    else:
        path.write_bytes(_bytes(draw, path.read_bytes()))
    list(Predictor(Path("model"))(["a fine film"]))
    return "worked"


def _arguments(draw: random.Random) -> str:
    with contextlib.suppress(SystemExit):
        main(_drawn(draw))
    return "answered"


def _drawn(draw: random.Random) -> list[str]:
    _sound_place()
    name = draw.choice(list(COMMANDS))
    arguments = list(COMMANDS[name])
    for _ in range(draw.choice([1, 1, 2])):
        value = draw.choice(ODD).replace("\x00", "")
        if draw.random() < 0.3:
            arguments.insert(draw.randrange(len(arguments) + 1), value)
        else:
            arguments += [draw.choice(OPTIONS), value]
    return [name, *arguments]


def _sound_place() -> None:
    for folder in ("model", "out", "runs"):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree("sound", "model")
    Path("t.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in texts(24)))


def _command(draw: random.Random) -> str:
    """The command itself, in a process of its own."""
    given = [one.encode("utf-8", "surrogatepass") for one in _drawn(draw)]
    command: list[Any] = [sys.executable, "-m", "fastadv", *given]
    root = str(Path(__file__).parents[2])
    ended = subprocess.run(
        command,
        capture_output=True,
        timeout=300,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": root},
    )
    printed = (ended.stdout + ended.stderr).decode("utf-8", "replace")
    print(printed)
    if "Traceback" in printed or ended.returncode not in (0, 1, 2):
        raise AssertionError(f"exit code {ended.returncode}: {printed}")
    return "command answered"
