"""Write report.html: what a run found, on one page that needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastadv.integrations import files
from fastadv.jobs import page
from fastadv.jobs.memory import WHAT
from fastadv.pretrain import plots, tables, verdict


def write(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the page of a run. `rows`: of its log."""
    files.write(path, compose(result, rows))


def compose(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Compose the page: what it means first, then the numbers, the pictures and the configuration."""
    title = _title(result)
    parts = [
        f"<h1>{page.text(title)}</h1>",
        page.paragraph(_introduction(result), "quiet"),
        page.box(verdict.doubts(result), "warnings"),
        page.box(verdict.sentences(result), "verdict"),
        "<h2>Result</h2>",
        page.paragraph(f"{tables.title(result).capitalize()}."),
        page.table(tables.headings(result), tables.lines(result)),
        page.paragraph(_explanation(result), "quiet"),
        "<h2>What it took</h2>",
        page.table(["", *tables.columns(result)], tables.costs(result)),
        page.paragraph(_costs(result), "quiet"),
        "<h2>Curves</h2>",
        f'<div class="figures">{_curves(result, rows)}</div>',
        "<h2>Configuration</h2>",
        page.entries(_configuration(result)),
        "<h2>Command</h2>",
        f"<pre>{page.text(result['command'])}</pre>",
    ]
    return page.page(f"fastadv: {title}", parts)


def _title(result: Mapping[str, Any]) -> str:
    against = " against plain" if tables.plain_ones(result) else ""
    return f"{result['settings']['method_name']}{against} pretraining"


def _introduction(result: Mapping[str, Any]) -> str:
    data, model = result["data"], result["model"]
    size = "a stream" if data["tokens"] is None else f"{data['tokens']:,} tokens"
    many = len(result["trainings"]) > 1
    return (
        f"A {model['class']} of {model['parameters']:,} parameters, from "
        f"{'the same start on the same rows in each training' if many else 'new weights'}: {size} "
        f"of {data['text']}. Finished {result['finished'].replace('T', ' ').replace('+00:00', ' UTC')}."
    )


def _curves(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    settings = result["settings"]
    method = settings["method_name"]
    return (
        page.figure(plots.losses(rows, method, "step"), "Training loss by optimizer steps: as much text.")
        + page.figure(
            plots.losses(rows, method, "seconds"),
            "The same by seconds: as much time. The loss of a method without a clean pass is the mean over its passes.",
        )
        + page.figure(
            plots.radii(result["trainings"], method, settings["attack_steps"]),
            "Held-out perplexity against the radius of the attack. Radius 0 is no attack. Bars: 95 % intervals.",
        )
    )


def _explanation(result: Mapping[str, Any]) -> str:
    settings = result["settings"]
    return (
        f"Perplexity is the exponential of the mean loss of a {settings['objective']} token, of the first "
        f"{settings['length']} tokens of each document. Brackets: 95 % intervals, by drawing the documents again "
        "(bootstrap); ratios draw them for both models together. They say what other documents would change; another "
        f"--seed is another training. The attack is PGD-{settings['attack_steps']} on the embeddings of each document, "
        "inside an l2 ball around the whole document whose unit is the mean norm of the model's own embedding rows, "
        "with steps of a quarter of the radius; of all radii up to one the highest loss counts. Misspelt text has "
        "other tokens, and more of them: its perplexity is by token of the misspelt text."
    )


def _costs(result: Mapping[str, Any]) -> str:
    first = next(iter(result["trainings"].values()))["cost"]
    kind = "cuda" if first["device"].startswith("cuda") else "cpu"
    return (
        "Time per token is that of predicted tokens, checkpoints and logs included. The share of the attack is "
        "the part of a training's time that is for passes beyond one forward and backward per batch. "
        f"Peak memory: {WHAT[kind]}."
    )


def _configuration(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings, data = result["settings"], result["data"]
    documents = "a stream" if data["documents"] is None else f"{data['documents']:,}"
    own = ("method", "method_name", "method_arguments", "extra")
    return [
        ("method", f"{settings['method_name']}({_pairs(settings['method_arguments'], '=')})"),
        ("documents", f"{documents} to train on, {data['held_out']:,} held out"),
        ("vocabulary", f"{data['vocabulary']:,} tokens"),
        ("settings", _pairs({name: value for name, value in settings.items() if name not in own})),
        ("processes", f"{result['processes']}"),
        ("hardware", result["hardware"]),
        ("versions", _pairs(result["versions"])),
    ]


def _pairs(values: Mapping[str, Any], between: str = " ") -> str:
    return ", ".join(f"{name}{between}{value}" for name, value in values.items() if value is not None)
