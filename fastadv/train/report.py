"""Write report.html: what a comparison found, on one page that needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastadv.integrations import files
from fastadv.jobs import page
from fastadv.jobs.folders import ADVERSARIAL, PLAIN
from fastadv.jobs.memory import WHAT
from fastadv.train import cells, plots, radius, report_examples, tables, verdict


def write(result: Mapping[str, Any], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the page of a comparison. `rows`: of its log."""
    files.write(path, compose(result, rows))


def compose(result: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Compose the page: what it means first, then the numbers, the pictures, the examples and the configuration."""
    method = result["settings"]["method"]
    title = f"{method} against plain training"
    parts = [
        f"<h1>{page.text(title)}</h1>",
        page.paragraph(_introduction(result), "quiet"),
        page.box(_warnings(result), "warnings"),
        page.box(verdict.sentences(result), "verdict"),
        "<h2>Result</h2>",
        page.table(["", "plain", method, tables.difference_heading(result)], tables.lines(result)),
        page.paragraph(_explanation(result), "quiet"),
        "<h2>Curves</h2>",
        f'<div class="figures">{_curves(result, rows)}</div>',
        report_examples.section(result),
        "<h2>Configuration</h2>",
        page.entries(_configuration(result)),
        "<h2>Command</h2>",
        f"<pre>{page.text(result['command'])}</pre>",
    ]
    return page.page(f"fastadv: {title}", parts)


def _warnings(result: Mapping[str, Any]) -> list[str]:
    found = (result.get("radius") or {}).get("warning")
    return [*(result.get("warnings") or []), *([found] if found else [])]


def _curves(result: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    settings, models = result["settings"], result["models"]
    measured = {"plain": models[PLAIN]["accuracy"], settings["method"]: models[ADVERSARIAL]["accuracy"]}
    what = cells.name(measured["plain"][0])
    return page.figure(
        plots.losses(rows, settings["method"]), "Loss during training, the mean over each logging interval."
    ) + page.figure(
        plots.radii(measured, settings["attack_steps"]),
        f"{what[0].upper()}{what[1:]} against the radius of the attack. Radius 0 is no attack. Bars: 95 % intervals.",
    )


def _introduction(result: Mapping[str, Any]) -> str:
    data = result["settings"]["data"]
    return (
        f"One model, trained twice from the same start on the same {data['train_samples']:,} samples of "
        f"{data['settings']['data']}: plainly, and with {tables.method_label(result['settings'])}. "
        f"Finished {result['finished'].replace('T', ' ').replace('+00:00', ' UTC')}."
    )


def _explanation(result: Mapping[str, Any]) -> str:
    settings, models = result["settings"], result["models"]
    kind = "cuda" if models[PLAIN]["cost"]["device"].startswith("cuda") else "cpu"
    first, second = (models[name]["accuracy"][0] for name in (PLAIN, ADVERSARIAL))
    return (
        f"Brackets: 95 % intervals, {tables.intervals(first, second)}. They say what other test samples would change; "
        f"another --seed is another training. The attack is PGD-{settings['attack_steps']} on the word embeddings of "
        "each test sample, inside an l2 ball around the whole sample, with steps of a quarter of the radius; a sample "
        "that a smaller radius turned counts as turned at the larger ones. What a model keeps under it says how steep "
        "it is around its inputs, not how it fares against attacks that change words. "
        f"Peak memory: {WHAT[kind]}."
    )


def _configuration(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings = result["settings"]
    data = settings["data"]
    found = result.get("radius")
    return [
        ("method", tables.method_label(settings)),
        *([("radius", radius.describe(found))] if found else []),
        ("model", f"{settings['model']}, masked mean pooling, dropout {settings['head_dropout']:g}, linear head"),
        ("labels", ", ".join(map(str, data["labels"]))),
        ("samples", f"{data['train_samples']:,} training, {data['test_samples']:,} test"),
        ("data", _pairs(data["settings"])),
        ("training arguments", _pairs(settings["training_arguments"])),
        ("steps", " and ".join(f"{model['cost']['steps']:,} {name}" for name, model in result["models"].items())),
        ("longest text", f"{settings['max_length']} tokens"),
        ("hardware", result["hardware"]),
        ("versions", _pairs(result["versions"])),
    ]


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
