"""Print what is about to be trained on, and the warnings."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastadv.jobs.shown import visible
from fastadv.train.job import Job
from fastadv.train.labels import AUTO, MULTI_LABEL, REGRESSION
from fastadv.train.overview import Overview, spread

SHOWN = 12  # classes; the rest is one line
WIDTH = 120  # columns, where the output is no terminal


def announce(job: Job) -> None:
    """Print task, classes, tokens and steps, then the warnings on standard error."""
    console = Console()
    console = Console(width=None if console.is_terminal else WIDTH, highlight=False)
    if job.samples.task == REGRESSION:
        console.print(f"labels: training {spread(job.samples.train)}; test {spread(job.samples.test)}", markup=False)
    else:
        console.print(_classes(job.overview, len(job.samples.train), len(job.samples.test)))
    for line in _lines(job):
        console.print(visible(line), markup=False)
    for warning in job.overview.warnings:
        print(visible(f"warning: {warning}"), file=sys.stderr)


def _classes(overview: Overview, training: int, test: int) -> Table:
    """Make the table of the classes: the largest, and the others in one line."""
    table = Table(title="samples by class", title_justify="left", title_style="dim")
    for heading, justify in (("class", "left"), ("training", "right"), ("", "right"), ("test", "right"), ("", "right")):
        table.add_column(heading, justify="left" if justify == "left" else "right", no_wrap=justify == "right")
    names = sorted(overview.train, key=lambda name: -overview.train[name])
    shown = names if len(names) <= SHOWN else names[: SHOWN - 1]
    rest = names[len(shown) :]
    groups = [([name], name) for name in shown] + ([(rest, f"{len(rest)} more")] if rest else [])
    for members, title in groups:
        cells: list[str] = []
        for counts, total in ((overview.train, training), (overview.test, test)):
            count = sum(counts[name] for name in members)
            cells += [f"{count:,}", f"{count / total:.1%}"]
        table.add_row(Text(visible(title)), *cells)
    return table


def _lines(job: Job) -> Iterator[str]:
    overview, samples = job.overview, job.samples
    chosen = " (by the labels; --task says otherwise)" if samples.settings.task == AUTO else ""
    yield f"task: {samples.task}{chosen}"
    if samples.task == MULTI_LABEL:
        bare = sum(not any(sample.label) for sample in samples.train if isinstance(sample.label, tuple))
        yield f"training samples in no class: {bare:,}"
    out = samples.left_out
    parts = [f"{out.empty:,} without a text or label"] if out.empty else []
    parts += [f"{out.repeated:,} that repeat a text"] if out.repeated else []
    if parts:
        yield f"rows left out: {', '.join(parts)}"
    mean = overview.tokens / len(samples.train)
    yield (
        f"tokens: {mean:.1f} a text, {overview.unknown:.1%} of them unknown; {overview.truncated:.1%} of the texts are "
        f"cut, {overview.cut:.1%} of all tokens"
    )
    yield f"optimizer steps: {overview.steps:,} in each training"
