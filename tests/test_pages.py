"""The pages' code runs, their lines wrap, and their figures are the committed ones."""

from __future__ import annotations

import csv
import functools
import html
import itertools
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from transformers import AutoModel

import fastadv
from fastadv.train.model import DEFAULT, resolve
from tests.campaigns import table
from tests.campaigns.catalogue import CAMPAIGNS
from tests.pages import PAGES, ROOT, RUNNABLE, name, run


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, as a reader would paste it, on a BERT of two layers."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.chdir(tmp_path)
    run(page, tmp_path)


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    page = (ROOT / "docs/api.md").read_text()
    names = set(fastadv.__all__) - {"__version__"}
    assert not {public for public in names if f"::: fastadv.{public}\n" not in page}
    assert "::: fastadv.integrations.transformers.AdversarialTrainer\n" in page


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_prose_wraps(page: Path) -> None:
    long = [line for line in prose(page) if len(line) > 120 and not line.startswith("|")]
    assert not long


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_have_headers(page: Path) -> None:
    lines = list(prose(page))
    headers = [above for above, line in itertools.pairwise(lines) if re.fullmatch(r"[| :-]*---[| :-]*", line)]
    assert all(cell.strip() for header in headers for cell in header.strip("|").split("|"))


GENERATED = "<!-- results"  # what bench/report has written


def prose(page: Path) -> Iterator[str]:
    """Lines outside of code."""
    text, _, _ = page.read_text().partition(GENERATED)
    yield from re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE).splitlines()


def test_the_evidence_of_the_suggested_radius() -> None:
    evidence = runpy.run_path(str(ROOT / "examples/radius_evidence.py"))
    found = json.loads((ROOT / "docs/results/radius.json").read_text())
    table = [evidence["HEAD"], *evidence["table"](found)]
    assert "\n".join(table) in (ROOT / "docs/concepts.md").read_text()
    for runs in found.values():
        assert sorted(run["seed"] for run in runs) == [0, 0, 1, 1, 2, 2]
        assert evidence["difference"](runs, 0)[2] > -1 < 0 < evidence["difference"](runs, 1)[2]


SIZES = ("30,522", "250,002")  # of the vocabulary


def accuracies(method: str) -> list[list[float]]:
    """In %, by radius and then by seed."""
    runs = json.loads((ROOT / "docs/results/compare/compare.json").read_text())["runs"]
    by_seed = [[100 * point["accuracy"] for point in run["accuracy"]] for run in runs if run["method"] == method]
    return [list(values) for values in zip(*by_seed, strict=True)]


def test_the_picture_shows_the_committed_accuracies() -> None:
    picture = (ROOT / "docs/pictures/accuracy.svg").read_text()
    shown = json.loads(html.unescape(re.search(r"<dc:description>(.*?)</dc:description>", picture)[1]))
    for method, (means, spread) in shown.items():
        by_radius = accuracies(method)
        assert means == pytest.approx([mean(values) for values in by_radius])
        assert spread == pytest.approx([stdev(values) for values in by_radius])


def test_the_first_screen_shows_what_was_measured() -> None:
    text, home = (" ".join((ROOT / page).read_text().split()) for page in ("README.md", "docs/index.md"))
    plain, fgm = ([mean(values) for values in accuracies(method)] for method in ("plain", "fgm"))
    gain, clean = fgm[1] - plain[1], fgm[0] - plain[0]
    assert f"**{gain:+.1f} points of accuracy under attack, {clean:+.1f} clean**" in text
    assert f"FGM gains {gain:.1f} points under attack" in home

    link = re.search(r"\[committed run\]\(([^)\s]+)\)", text)[1]
    with (ROOT / link).open() as file:
        rows = {(row["group"], row["contestant"]): row for row in csv.DictReader(file) if row["heap"] == "users"}
    small, large = (float(rows[f"training step, PGD-3, V {size}", "reference"]["over_fused"]) for size in SIZES)
    assert f"**{large:.2f} times as fast as the classic script**" in text
    assert f"{small:.2f} times with 30,522" in text

    memory = {
        contestant: float(rows["peak memory, PGD-3, V 250,002", contestant]["peak_mib"])
        for contestant in ("plain", "reference", "fused")
    }
    assert f"**{memory['plain'] - memory['fused']:.0f} MiB less memory than plain training**" in text
    assert f"the script takes {memory['reference'] - memory['plain']:,.0f} MiB more" in text


def test_the_readme_shows_what_make_train_cost() -> None:
    models = json.loads((ROOT / "docs/results/train.json").read_text())["models"]
    plain, adversarial = (models[phase]["cost"] for phase in ("plain", "adversarial"))
    seconds, memory = ([cost[key] for cost in (plain, adversarial)] for key in ("seconds_per_step", "peak_memory"))
    text = (ROOT / "README.md").read_text()
    assert f"| {seconds[0]:.3f} | {seconds[1]:.2f} | x {seconds[1] / seconds[0]:.2f} |" in text
    assert f"| {memory[0] / 1e9:.2f} GB | {memory[1] / 1e9:.2f} GB | x {memory[1] / memory[0]:.2f} |" in text


def test_the_campaigns_table_is_the_committed_one() -> None:
    results = json.loads((ROOT / "docs/results/reliability.json").read_text())
    text = (ROOT / "docs/reliability.md").read_text()
    assert table.section(results) in text
    share = results["share"]
    assert {row["name"]: row["title"] for row in results["rows"]} == {
        name: campaign.title for name, campaign in CAMPAIGNS.items()
    }
    for row in results["rows"]:
        assert row["cases"] >= round(share * CAMPAIGNS[row["name"]].total), row["name"]
        assert bool(row["details"]) == bool(row["wrong"]), row["name"]


def test_the_readme_promises_what_the_campaign_shows() -> None:
    """Each figure of the claim, and nothing wrong behind it."""
    rows = {row["name"]: row for row in json.loads((ROOT / "docs/results/reliability.json").read_text())["rows"]}
    text = " ".join((ROOT / "README.md").read_text().split())
    faults = sum(rows[name]["cases"] for name in ("operations", "calls"))
    signals = sum(rows[name]["cases"] for name in ("signals", "sigints", "storms"))
    assert f"{faults:,} faults and {signals:,} interrupts" in text
    assert not any(rows[name]["wrong"] for name in ("operations", "calls", "signals", "sigints", "storms"))


def test_every_line_of_the_tables_of_stacks_names_a_test() -> None:
    for section in (ROOT / "docs/stacks.md").read_text().split("\n## ")[1:]:
        folder = re.findall(r"In `(tests/\w+)`", section)[0]
        lines = [line for line in section.splitlines() if line.startswith("|")][2:]
        for line in lines:
            named = re.findall(r"`(\w+\.py)::(\w+)`", line)
            assert named, line
            for file, test in named:
                assert f"def {test}(" in (ROOT / folder / file).read_text(), line


def test_the_mean_row_norm_of_minilm() -> None:
    """What a relative radius is measured in."""
    norm = float(AutoModel.from_pretrained(resolve(DEFAULT)).get_input_embeddings().weight.detach().norm(dim=1).mean())
    text = " ".join((ROOT / "docs/concepts.md").read_text().split())
    assert f"MiniLM's mean is {norm:.2f}, so this is a radius of {0.1 * norm:.3f} there" in text
