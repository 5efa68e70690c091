"""Draws accuracy.svg, the picture of README and home: accuracy with and without an attack, from a committed run."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent
RUNS = DOCS / "results/compare/compare.json"
METHODS = {
    "plain": ("plain training", "#6b7280"),
    "fgm": ("FGM", "#2563eb"),
    "pgd": ("PGD", "#ea580c"),
    "yopo": ("YOPO", "#16a34a"),
}


def columns(runs: list[dict[str, Any]], method: str) -> tuple[list[float], list[float]]:
    """Accuracy at each radius in %: mean and standard deviation over the seeds."""
    by_seed = [[100 * point["accuracy"] for point in run["accuracy"]] for run in runs if run["method"] == method]
    by_radius = list(zip(*by_seed, strict=True))
    return [mean(values) for values in by_radius], [stdev(values) for values in by_radius]


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "fastadv"  # the same picture, the same file
    runs = json.loads(RUNS.read_text())["runs"]
    radii = [point["radius"] for point in runs[0]["accuracy"]]
    shown = {method: columns(runs, method) for method in METHODS}
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    for place, (method, (name, colour)) in enumerate(METHODS.items()):
        means, spread = shown[method]
        left = [group + 0.2 * (place - 1.5) for group in range(len(radii))]
        bars = axes.bar(left, means, 0.18, yerr=spread, color=colour, ecolor="#1f2937", capsize=2, label=name)
        axes.bar_label(bars, [f"{value:.0f}" for value in means], padding=2, fontsize=8.5)
    axes.set_xticks(range(len(radii)), ["not attacked", *(f"PGD-10, l2 radius {radius:g}" for radius in radii[1:])])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=4, loc="upper right")
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None, "Description": json.dumps(shown)})
    plt.close(figure)


if __name__ == "__main__":
    main()
