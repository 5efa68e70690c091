"""The pages' code runs, their lines wrap, and their figures are the committed ones."""

from __future__ import annotations

import csv
import functools
import html
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from transformers import AutoModel, BertConfig, BertForSequenceClassification, TrainingArguments

import fastadv
from fastadv.train.model import DEFAULT, build, resolve, tokenizer_of
from tests.train.conftest import save_encoder

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(page for page in DOCS if "results" not in page.parts)]
GENERATED = "<!-- results"  # what bench/report has written
CODE = re.compile(r"^```(python|diff)\n(.*?)^```", re.DOTALL | re.MULTILINE)
RUN = "runs/DATE-TIME/adversarial"
RUNNABLE = [page for page in PAGES if CODE.search(page.read_text())]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, as a reader would paste it, on a BERT of two layers."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.chdir(tmp_path)
    if RUN in page.read_text():
        save_run(Path(RUN))
    names = surroundings(tmp_path)
    for language, block in CODE.findall(page.read_text()):
        if language == "diff":
            block = "".join(line[1:] for line in block.splitlines(keepends=True) if not line.startswith("-"))
        if "adv.capture(" in block and not torch.cuda.is_available():
            compile(block, page.name, "exec")
        else:
            exec(compile(block, page.name, "exec"), names)


def save_run(folder: Path) -> None:
    """A model as `fastadv train` leaves it."""
    encoder = save_encoder(Path())
    build(str(encoder), ["bad", "good"], 0.1).save_pretrained(folder)
    tokenizer_of(str(encoder)).save_pretrained(folder)


def surroundings(folder: Path) -> dict[str, Any]:
    """What the pages take as given."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    model = BertForSequenceClassification(config)
    ids = torch.randint(1, 50, (4, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 0, 1])}

    def losses(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(**batch).logits, batch["labels"], reduction="none")

    return {
        "fastadv": fastadv,
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "loader": [batch, batch],
        "batch": batch,
        "labelled": batch,
        "unlabelled": {key: value for key, value in batch.items() if key != "labels"},
        "losses": losses,
        "args": TrainingArguments(str(folder), max_steps=2, use_cpu=True, report_to="none", save_strategy="no"),
        "data": [{key: value[row] for key, value in batch.items()} for row in range(4)],
        "accelerator": type("Accelerator", (), {"backward": staticmethod(torch.Tensor.backward)}),
    }


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


def prose(page: Path) -> Iterator[str]:
    """Lines outside of code."""
    text, _, _ = page.read_text().partition(GENERATED)
    yield from re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE).splitlines()


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


def test_the_mean_row_norm_of_minilm() -> None:
    """What a relative radius is measured in."""
    norm = float(AutoModel.from_pretrained(resolve(DEFAULT)).get_input_embeddings().weight.detach().norm(dim=1).mean())
    text = " ".join((ROOT / "docs/concepts.md").read_text().split())
    assert f"MiniLM's mean is {norm:.2f}, so this is a radius of {0.1 * norm:.3f} there" in text
