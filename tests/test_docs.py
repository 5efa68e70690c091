"""What the documentation shows runs, and what it links to exists."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from fastadv.jobs.method_options import methods
from fastadv.train import compare

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md")), ROOT / "tests/goldens/README.md"]
LOSSES = ("toward", "away", "kl_to_base", "ipo", "dpo", "retain")
EXAMPLES = [method.__module__ for method in methods().values()]
EXAMPLES += [
    "fastadv.classic",
    "fastadv.integrations.transformers",
    "fastadv.methods.repeat",
    *(f"fastadv.llm.{part}" for part in ("targets", "scores", "cutoff", "base_model", *LOSSES)),
    "fastadv.ops.grads",
    "fastadv.ops.rows",
    "fastadv.pretrain.keyed",
    "fastadv.pretrain.rows",
    "fastadv.jobs.hub",
    "fastadv.pretrain.source",
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring_examples(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted >= 1
    assert results.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    missing = [page for page in pages if page.parts[0] != "results" and str(page) not in navigation]
    assert not missing


def test_every_op_and_method_has_its_page_and_test() -> None:
    for method_name, method in methods().items():
        name = method_name.removeprefix("bregman")  # BregmanProximal: proximal.py
        assert Path(inspect.getfile(method)).stem == name, "one file per method, with its name"
        assert (ROOT / f"docs/methods/{name}.md").exists()
        assert (ROOT / f"fastadv/reference/{name}.py").exists()
        assert (ROOT / f"tests/methods/test_{name}.py").exists()
    for source in (ROOT / "fastadv/ops").glob("[!_]*.py"):
        assert (ROOT / f"tests/ops/test_{source.stem}.py").exists()


def test_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/plain_loop.py"), run_name="__main__")
    printed = capsys.readouterr().out
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[-1] < losses[0]
    assert "attacked 300 steps; groups skipped for a non-finite gradient: 0" in printed
    assert float(re.search(r"accuracy ([\d.]+),", printed)[1]) > 0.8


def test_classic_script(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/classic_script.py"), run_name="__main__")
    printed = capsys.readouterr().out
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    page = (ROOT / "docs/classic.md").read_text()
    assert "-from fgm import FGM\n+from fastadv import FGM" in page


def test_batch_coupling_repeats_what_the_docs_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["batch_coupling.py", "--output", str(tmp_path / "out.json")])
    runpy.run_path(str(ROOT / "examples/batch_coupling.py"), run_name="__main__")
    measured = json.loads((tmp_path / "out.json").read_text())
    assert measured == json.loads((ROOT / "docs/results/batch_coupling.json").read_text())
    page = (ROOT / "docs/concepts.md").read_text()
    for scope, row in measured.items():
        assert f'`scope="{scope}"` | ' + " | ".join(f"{value:.3f}" for value in row.values()) in page


def test_the_goldens_readme_lists_every_golden() -> None:
    text = (ROOT / "tests/goldens/README.md").read_text()
    listed = {name for pattern in re.findall(r"`([\w{},.-]+)`", text) for name in expanded(pattern)}
    assert {path.stem for path in (ROOT / "tests/goldens").glob("*.npz")} <= listed


def expanded(pattern: str) -> list[str]:
    """As a shell has it: a{b,c} is ab and ac."""
    before, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    choices, _, after = rest.partition("}")
    return [name for choice in choices.split(",") for name in expanded(before + choice + after)]


def test_the_methods_are_shown_as_they_were_measured() -> None:
    page = (ROOT / "docs/training.md").read_text()
    runs, timed = (
        json.loads((ROOT / f"docs/results/{name}.json").read_text())["runs"]
        for name in ("compare/compare", "compare_time/sweep")
    )
    seconds = {run["method"]: run["seconds_per_step"] for run in timed}
    rows = compare.summary(runs)
    assert [row.setting for row in rows] == ["plain", *sorted(methods())]
    for row in rows:
        assert row.seeds == [0, 1, 2]
        line = next(line for line in page.splitlines() if line.startswith(f"| {row.setting} | "))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        shown = compare.cells(row)
        assert [*cells[2:6], cells[8]] == [*shown[2:6], shown[7]]
        assert cells[6] == f"{seconds[row.setting]:.2f}"


def test_the_page_of_freeat_shows_what_was_measured() -> None:
    page = (ROOT / "docs/methods/freeat.md").read_text()
    means = json.loads((ROOT / "docs/results/freeat_carry.json").read_text())["means"]
    for replay, row in means.items():
        rises = [abs(round(row[name], 4)) for name in ("what lies there", "in random order", "one step of its own")]
        cells = [*(f"{value:.4f}" for value in rises), f"{100 * row['signs that agree']:.1f} %"]
        line = next(line for line in page.splitlines() if line.startswith(f"| replay {replay}"))
        assert line.endswith(f"| {' | '.join(cells)} |")


def test_the_page_of_benchmarks_shows_the_profile() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text()
    profile = json.loads((ROOT / "docs/results/profile.json").read_text())
    for part in profile["cases"][0]["parts"]:
        rows = [case["parts"][part] for case in profile["cases"]]
        assert " | ".join(f"{row['percent']:.2f} ({row['ms']:,.1f})" for row in rows) in page, part
    assert all(case["exclusive"]["percent"] < 1 for case in profile["cases"][:2])
    for case in profile["oversubscribed"]:
        step, rest = f"{case['profiled']['ms'] / 1e3:.2f}", f"{case['exclusive']['ms']:.1f}"
        assert f"| {case['threads']} | {step} | {case['parts']['attack']['ms']:.1f} | {rest} |" in page


def test_files_stay_short() -> None:
    sources = [*(ROOT / "fastadv").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "csrc").glob("*.*")]
    long = {source.name: count for source in sources if (count := len(source.read_text().splitlines())) > 300}
    assert not long


def test_the_readme_shows_what_the_committed_run_measured() -> None:
    readme = (ROOT / "README.md").read_text()
    models = json.loads((ROOT / "docs/results/train.json").read_text())["models"]
    plain, adversarial = (models[phase]["accuracy"] for phase in ("plain", "adversarial"))
    for one, other in zip(plain, adversarial, strict=True):
        cells = [f"{100 * a['accuracy']:.1f} [{100 * a['low']:.1f}, {100 * a['high']:.1f}]" for a in (one, other)]
        difference = 100 * (other["accuracy"] - one["accuracy"])
        assert f"| {cells[0]} | {cells[1]} | {difference:+.1f} points |" in readme


def test_the_sweep_table_shows_what_the_committed_sweep_measured() -> None:
    _, _, page = (ROOT / "docs/training.md").read_text().partition("## The sweep")
    settings: dict[str, list[list[float]]] = {}
    for run in json.loads((ROOT / "docs/results/sweep.json").read_text())["runs"]:
        values = " ".join(f"{name}={value}" for name, value in run["arguments"].items())
        name = f"{run['method']} {values}".strip()
        settings.setdefault(name, []).append([100 * a["accuracy"] for a in run["accuracy"]])
    for name, runs in settings.items():
        row = next(
            line for line in page.splitlines() if line.startswith("|") and line.split("|")[1].strip(" *`") == name
        )
        for column in zip(*runs, strict=True):
            assert f"| {sum(column) / len(column):.1f} |" in row, (name, row)


def test_the_page_of_the_engine_shows_what_was_measured() -> None:
    page = (ROOT / "docs/engine.md").read_text()
    kept = json.loads((ROOT / "docs/results/probe_dtype.json").read_text())
    pgd, seconds = kept["pgd"], kept["seconds"]
    rows = [
        [f"{pgd[f'perturbation, cosine, {of}']:.5f}" for of in ("mean over samples", "least sample")],
        [f"{pgd[f'{of}, cosine, least batch']:.7f}" for of in ("parameter gradient", "its adversarial part")],
        [f"{pgd[f'rise of the loss, ratio, {of}']:.4f}" for of in ("mean", "least batch")],
    ]
    for row in rows:
        assert f"| {', '.join(row)} |" in page
    mine, plain, ratio = seconds["bfloat16 probes"], seconds["float32 probes"], list(seconds.values())[2]
    assert f"| {mine:.2f}, and {plain:.2f} in float32: x {ratio:.2f} |" in page
    for name, row in kept["others"].items():
        cells = [f"{value:.3f}" for value in row.values()]
        assert f"| {name} | {cells[1]}, {cells[0]} | {cells[3]}, {cells[2]} |" in page


def test_the_page_of_the_kernels_shows_what_was_compiled() -> None:
    pytest.importorskip("triton")
    from bench.gpu import occupancy

    found, before = (occupancy.read(ROOT / f"docs/results/{name}.json") for name in ("occupancy", "occupancy_before"))
    assert found.keys() == occupancy.GPUS.keys()
    rows = occupancy.table(found["sm_90"], before["sm_90"]).splitlines()
    page = (ROOT / "docs/kernels.md").read_text().splitlines()
    shown = [line for line in page if "_kernel` | " in line]
    assert len(shown) > 10
    assert set(shown) <= set(rows)


def test_the_page_of_the_kernels_shows_the_hosts_time() -> None:
    page = (ROOT / "docs/kernels.md").read_text()
    kept = json.loads((ROOT / "docs/results/host_time.json").read_text())["cases"]
    found = {(one["scope"], one["case"]): one for one in kept}
    columns = [found[scope, case] for case in ("ops do nothing", "a GPU's path") for scope in ("table", "sample")]
    for part in (*columns[-1]["parts"], None):
        of = [one["beside"] if part is None else one["parts"].get(part) for one in columns]
        cells = ["" if one is None else f"{one['us']:,.0f} ({one['iqr_us']:,.0f})" for one in of]
        assert f"| {part or '**the step minus its passes by hand**'} | {' | '.join(cells)} |" in page


def test_the_page_of_the_job_shows_how_threads_wait() -> None:
    page = (ROOT / "docs/training.md").read_text()
    measured = json.loads((ROOT / "docs/results/threads.json").read_text())
    for count, place in ((0, "nothing else"), (8, "eight busy processes")):
        rows = measured[f"beside {count} busy processes"]
        cells = [f"{rows[name]['seconds']:.1f}" for name in ("OMP_NUM_THREADS=1", "default", "passive")]
        passive = rows["passive"]
        ratio = f"x {passive['ratio']:.2f} [{passive['low']:.2f}, {passive['high']:.2f}]"
        assert f"| {place} | {' | '.join(cells)} | {ratio} |" in page
