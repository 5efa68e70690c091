"""Which method pays in pretraining: plain training of several lengths beside methods of the same cost, by seeds.

The default job of `fastadv pretrain`, and with `--size larger` a model five times as large on twice the text. A method
is compared with plain training of equal steps, and of equal time: as many steps more as its passes cost. Numbers go to
docs/results/pretrain_methods.json, tables and picture to docs/pretraining-methods.md.

    python examples/pretrain_methods.py run FOLDER [--size larger] [--seeds 0,1,2] [--try plain,freelb]
    python examples/pretrain_methods.py keep FOLDER     # what is there so far; run goes on where it was stopped
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
RESULT, PICTURE = DOCS / "results/pretrain_methods.json", DOCS / "results/pretrain_methods.svg"
PAGE = DOCS / "pretraining-methods.md"
BEGIN, END = "<!-- from here on by examples/pretrain_methods.py -->", "<!-- to here -->"
LARGER = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Try:
    """One training: a method, its options, and what a step costs in plain steps (docs/pretraining.md has the units)."""

    method: str
    cost: float
    extra: tuple[str, ...] = ()
    longer: float = 1.0  # plain training of so many times the steps


PGD = ("--clean_weight", "0", "--adv_weight", "1", "--random_start", "0.1")
TRIES = {
    "plain": Try("plain", 1),
    "plain, 1.25 times as long": Try("plain", 1, longer=1.25),
    "plain, 2 times as long": Try("plain", 1, longer=2),
    "plain, 2.67 times as long": Try("plain", 1, longer=8 / 3),
    "NEFTune": Try("neftune", 1),
    "FreeLB, every 4th step": Try("freelb", 1.25, ("--every", "4")),
    "FreeLB": Try("freelb", 2),
    "PGD, adversarial pass alone": Try("pgd", 7 / 3, PGD),
    "PGD, adversarial pass alone, probes in bfloat16": Try("pgd", 7 / 3, (*PGD, "--probe_dtype", "bfloat16")),
    "YOPO": Try("yopo", 7 / 3),
    "SMART": Try("smart", 8 / 3),
}


def folder_of(name: str) -> str:
    """What a training's folder is called."""
    return name.replace(" ", "_").replace(",", "")


def settings_of(name: str, size: str, seed: int, folder: Path) -> Any:
    """The job of one training."""
    from fastadv.pretrain.settings import Settings

    tried = TRIES[name]
    settings = Settings(seed=seed, method=tried.method, extra=tried.extra)
    if size == "larger":
        config = folder / "larger.json"
        config.write_text(json.dumps(LARGER))
        settings = replace(settings, model=str(config), max_steps=2 * settings.max_steps, learning_rate=3e-3)
    return replace(settings, max_steps=round(tried.longer * settings.max_steps))


def run(folder: Path, size: str, seeds: Sequence[int], names: Sequence[str]) -> None:
    """Run what the folder does not have yet: seed by seed, so that a stopped run has whole seeds."""
    from fastadv.pretrain import data, phases
    from fastadv.pretrain.measured import measured_texts
    from fastadv.pretrain.processes import started

    with started() as processes:
        for seed in seeds:
            place = folder / f"{size}-{seed}"
            place.mkdir(parents=True, exist_ok=True)
            for name in names:
                settings = settings_of(name, size, seed, folder)
                read = data.prepare(settings, place)
                phase = folder_of(name)
                record = phases.trained(settings, place, phase, read, processes)
                phases.measured(settings, place, phase, record, measured_texts(read), processes)


def collect(folder: Path) -> list[dict[str, Any]]:
    """Keep of every training what the tables are made of."""
    found = []
    for size in ("small", "larger"):
        for name in TRIES:
            for place in sorted(folder.glob(f"{size}-*")):
                file = place / folder_of(name) / "phase.json"
                record = json.loads(file.read_text()) if file.exists() else {}
                if "measured" not in record:
                    continue
                cells = [{key: cell[key] for key in ("kind", "size", "perplexity")} for cell in record["measured"]]
                cost = {key: record["cost"][key] for key in ("steps", "tokens", "seconds", "attack_share")}
                seed = int(place.name.rpartition("-")[2])
                one = {"size": size, "try": name, "seed": seed, "measured": cells, "cost": cost}
                found.append({**one, "parameters": record["model"]["parameters"]})
    return found


def tables(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table of each size: perplexities, the mean over the seeds and their spread, over plain training's."""
    for size in dict.fromkeys(one["size"] for one in found):
        mine = [one for one in found if one["size"] == size]
        seeds = sorted({one["seed"] for one in mine})
        steps = min(one["cost"]["steps"] for one in mine)
        what = f"{mine[0]['parameters']:,} parameters, {steps:,} steps, seeds {', '.join(map(str, seeds))}"
        yield f"## {'The default job' if size == 'small' else 'One size above'}"
        yield ""
        yield f"{what}. Perplexities, the mean over the seeds, lowest and highest in brackets:"
        yield ""
        heads = [_heading(cell) for cell in mine[0]["measured"]]
        yield f"| training | costs | {' | '.join(heads)} |"
        yield "|---" * (2 + len(heads)) + "|"
        for name in dict.fromkeys(one["try"] for one in mine):
            runs = [one for one in mine if one["try"] == name]
            cells = [_spread([one["measured"][index]["perplexity"] for one in runs]) for index in range(len(heads))]
            yield f"| {name} | {TRIES[name].cost * TRIES[name].longer:.3g} | {' | '.join(cells)} |"
        yield ""
        yield from _bullets(sentences(mine))
        yield ""


def sentences(mine: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Compare each method with plain training of its time, seed by seed."""
    by_try = {name: {one["seed"]: one for one in mine if one["try"] == name} for name in TRIES}
    for name, tried in TRIES.items():
        if tried.method == "plain" or not by_try[name]:
            continue
        plain, length = _of_equal_time(tried.cost, by_try)
        said = []
        for index, cell in enumerate(next(iter(by_try[name].values()))["measured"]):
            ratios = [
                one["measured"][index]["perplexity"] / plain[seed]["measured"][index]["perplexity"]
                for seed, one in by_try[name].items()
                if seed in plain
            ]
            if ratios:
                said.append(f"{_heading(cell)} x {statistics.geometric_mean(ratios):.3f} ({_sides(ratios)})")
        if said:
            yield (
                f"{name} (costs {tried.cost:.3g}) over plain training of {length:.3g} times the steps: "
                + ", ".join(said)
                + "."
            )


def _of_equal_time(cost: float, by_try: Mapping[str, Mapping[int, Any]]) -> tuple[Mapping[int, Any], float]:
    """The plain training whose length is nearest to a cost, from above where none is equal."""
    plain = sorted((tried.longer, name) for name, tried in TRIES.items() if tried.method == "plain" and by_try[name])
    longer, name = next((one for one in plain if one[0] >= cost - 1e-9), plain[-1])
    return by_try[name], longer


def _sides(ratios: Sequence[float]) -> str:
    """On which side of 1 the seeds are."""
    below = sum(one < 1 for one in ratios)
    return f"lower in {below} of {len(ratios)} seeds"


def _heading(cell: Mapping[str, Any]) -> str:
    kind, size = cell["kind"], cell["size"]
    return {"clean": "clean", "attack": f"PGD {size:g}", "noise": f"{100 * size:g} % misspelt"}[kind]


def _spread(values: Sequence[float]) -> str:
    mean = math.exp(statistics.fmean(math.log(one) for one in values))
    shown = f"{mean:.1f}" if mean < 1000 else f"{mean:,.0f}"
    if len(values) == 1:
        return shown
    low, high = (f"{one:.1f}" if one < 1000 else f"{one:,.0f}" for one in (min(values), max(values)))
    return f"{shown} [{low}, {high}]"


def _bullets(said: Iterator[str]) -> Iterator[str]:
    for sentence in said:
        yield from textwrap.wrap(sentence, 120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def picture(found: Sequence[Mapping[str, Any]]) -> str:
    """Perplexity against cost: the line of plain training, and the methods as points, a panel for each measure."""
    from matplotlib.figure import Figure

    from fastadv.jobs.drawing import COLOURS, svg

    mine = [one for one in found if one["size"] == "small"]
    cells = mine[0]["measured"]

    def draw(figure: Figure) -> None:
        for index, axes in enumerate(figure.subplots(1, len(cells))):
            points = {name: _mean(mine, name, index) for name in TRIES if any(one["try"] == name for one in mine)}
            plain = sorted((TRIES[n].longer, value) for n, value in points.items() if TRIES[n].method == "plain")
            axes.plot(*zip(*plain, strict=True), color=COLOURS["plain"], marker="o", ms=3, lw=1.4, label="plain")
            for number, (name, value) in enumerate((n, v) for n, v in points.items() if TRIES[n].method != "plain"):
                axes.plot(TRIES[name].cost, value, "osD^v<>X"[number % 8], color=f"C{number}", ms=6, label=name)
            axes.set(title=_heading(cells[index]), xlabel="cost, plain trainings", yscale="log")
            axes.tick_params(axis="y", which="both", labelsize=7)
            axes.set_ylabel("perplexity" if index == 0 else "")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)

    return svg(draw, "pretrain methods", (11.0, 4.0), opaque=True)


def _mean(mine: Sequence[Mapping[str, Any]], name: str, index: int) -> float:
    values = [one["measured"][index]["perplexity"] for one in mine if one["try"] == name]
    return math.exp(statistics.fmean(map(math.log, values)))


def section(found: Sequence[Mapping[str, Any]]) -> str:
    """The part of the page that follows from the numbers."""
    shown = "![Perplexity against cost, for each measure](results/pretrain_methods.svg)"
    return "\n".join([BEGIN, "", shown, "", *tables(found), END])


def keep(folder: Path) -> None:
    """Write the numbers, the picture and the page's part."""
    found = collect(folder)
    RESULT.write_text("[\n" + ",\n".join(json.dumps(one) for one in found) + "\n]\n")
    PICTURE.write_text(picture(found))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + section(found) + rest.partition(END)[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "keep"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=["small", "larger"], default="small")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--try", dest="names", action="append", choices=list(TRIES), help="default: all")
    given = parser.parse_args()
    if given.what == "keep":
        keep(given.folder)
    else:
        run(given.folder, given.size, [int(one) for one in given.seeds.split(",")], given.names or list(TRIES))


if __name__ == "__main__":
    main()
