"""Write report.html: one page that needs no other file."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastadv.train import plots, tables
from fastadv.train.memory import WHAT

CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #111827;
  background: #fff; max-width: 64rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p { margin: .5rem 0; max-width: 48rem; } .quiet { color: #4b5563; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .75rem; border-bottom: 1px solid #e5e7eb; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; }
thead th { border-bottom: 2px solid #9ca3af; font-weight: 600; }
tbody th { font-weight: 400; }
.wide { overflow-x: auto; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1.5rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } figcaption { color: #4b5563; font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: 0; font-size: .93rem; }
dt { color: #4b5563; } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: #f3f4f6; padding: .75rem 1rem; overflow-x: auto; border-radius: 4px; font-size: .88rem; }
@media print { body { margin: 0; } }
"""


def write(result: Mapping[str, Any], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the page of a comparison. `rows`: of its log."""
    path.write_text(page(result, rows), encoding="utf-8")


def page(result: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Compose the page."""
    settings, models = result["settings"], result["models"]
    method = settings["method"]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>fastadv: {_text(method)} against plain training</title><style>{CSS}</style></head><body>",
        f"<h1>{_text(method)} against plain training</h1>",
        f'<p class="quiet">{_text(_introduction(result))}</p>',
        "<h2>Result</h2>",
        _table(["", "plain", method, "difference"], tables.lines(dict(result))),
        f'<p class="quiet">{_text(_explanation(result))}</p>',
        "<h2>Curves</h2>",
        '<div class="figures">',
        _figure(plots.losses(rows, method), "Loss during training, the mean over each logging interval."),
        _figure(
            plots.radii(
                {"plain": models["plain"]["accuracy"], method: models["adversarial"]["accuracy"]},
                settings["attack_steps"],
            ),
            "Accuracy against the radius of the attack. Radius 0 is no attack. Bars: 95 % intervals.",
        ),
        "</div>",
        "<h2>Configuration</h2>",
        _list(_configuration(result)),
        "<h2>Command</h2>",
        f"<pre>{_text(result['command'])}</pre>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _introduction(result: Mapping[str, Any]) -> str:
    data = result["settings"]["data"]
    return (
        f"One classifier, trained twice from the same start on the same {data['train_samples']:,} samples of "
        f"{data['settings']['data']}: plainly, and with {tables.method_label(result['settings'])}. "
        f"Finished {result['finished'].replace('T', ' ').replace('+00:00', ' UTC')}."
    )


def _explanation(result: Mapping[str, Any]) -> str:
    settings = result["settings"]
    kind = "cuda" if result["models"]["plain"]["cost"]["device"].startswith("cuda") else "cpu"
    return (
        f"Brackets: 95 % intervals (Wilson). The attack is PGD-{settings['attack_steps']} on the word embeddings of "
        "each test sample, inside an l2 ball around the whole sample, with steps of a quarter of the radius; a sample "
        "that a smaller radius turned counts as turned at the larger ones. Accuracy under it says how steep the model "
        f"is around its inputs, not how it fares against attacks that change words. Peak memory: {WHAT[kind]}."
    )


def _configuration(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings = result["settings"]
    data = settings["data"]
    return [
        ("method", tables.method_label(settings)),
        ("model", f"{settings['model']}, masked mean pooling, dropout {settings['head_dropout']:g}, linear head"),
        ("labels", ", ".join(data["labels"])),
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


def _table(headings: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(heading)}</th>" for heading in headings)
    body = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"


def _list(entries: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in entries) + "</dl>"


def _text(value: Any) -> str:
    return html.escape(value if isinstance(value, str) else json.dumps(value))
