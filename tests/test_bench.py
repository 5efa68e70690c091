"""The benchmarks' own parts, and a tiny run of all of them, so that they cannot rot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import machine, race, report
from bench.workloads import zipf
from fastadv import native

ROOT = Path(__file__).parent.parent
GROUP = "attack step, table scope, V 500, projected"
MEMORY = "peak memory, PGD-3, V 500"


def run_of(heap: str, medians: dict[str, float], **overrides: Any) -> dict[str, Any]:
    """One of pytest-benchmark's files, as far as the report reads it."""
    found: dict[str, Any] = {
        "processor": "a processor",
        "cores": 2,
        "threads": 2,
        "torch": "2.13.0",
        "python": "3.11.0",
        "libc": "glibc 2.36",
        "size": "minilm",
        "heap": heap,
        "copy_bandwidth": 2e10,
        **overrides,
    }
    benchmarks = [
        {
            "group": GROUP,
            "stats": {"median": seconds, "iqr": seconds / 10, "rounds": 7},
            "extra_info": {**found, "contestant": name},
        }
        for name, seconds in medians.items()
    ]
    return {"datetime": "2026-01-01T00:00:00", "commit_info": {"id": "0123456789abcdef"}, "benchmarks": benchmarks}


def memory_bench(run: dict[str, Any]) -> dict[str, Any]:
    bench: dict[str, Any] = json.loads(json.dumps(run["benchmarks"][0]))
    bench["group"] = MEMORY
    bench["extra_info"].update(peak_mib=1024.5, over_plain_mib=6.0, over_plain_perturbations=2.0)
    return bench


MEDIANS = {"classic script": 0.08, "plain PyTorch": 0.003, "fastadv": 0.001, "physical limit": 0.0008}


@pytest.fixture
def runs() -> list[dict[str, Any]]:
    found = [run_of("users", MEDIANS), run_of("retained", {name: 2 * value for name, value in MEDIANS.items()})]
    found[0]["benchmarks"].append(memory_bench(found[0]))
    return found


def test_report_has_ratios_and_the_fraction_of_the_limit(runs: list[dict[str, Any]]) -> None:
    condensed = report.condense(runs)
    row = condensed["groups"][GROUP]["users"]["plain PyTorch"]
    assert row["over_fastadv"] == pytest.approx(3)
    assert row["of_limit"] == pytest.approx(0.8 / 3)
    assert row["copy_bandwidth"] == 2e10
    text = report.markdown(condensed)
    assert "| plain PyTorch | 3 ms (0.3) | 3.00 | 27% | 6 ms (0.6) | 3.00 | 27% |" in text
    assert "| **fastadv** | 1 ms (0.1) | 1.00 | 80% | 2 ms (0.2) | 1.00 | 80% |" in text
    assert "| classic script | 1,024.5 | 6.0 | 2.0 |" in text
    assert "20.0 GB/s" in text and "commit 0123456789" in text


def test_report_of_one_heap_without_fastadv() -> None:
    text = report.markdown(report.condense([run_of("users", {"plain PyTorch": 1.5})]))
    assert "| plain PyTorch | 1.5 s (0.15) |  |" in text


def test_report_refuses_files_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match="different machines"):
        report.condense([run_of("users", MEDIANS), run_of("retained", MEDIANS, threads=8)])
    with pytest.raises(ValueError, match="no benchmarks"):
        report.condense([{"benchmarks": []}])


def test_report_writes_results_page_and_picture(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "docs/results").mkdir(parents=True)
    (tmp_path / "bench").mkdir()
    page = tmp_path / "docs/benchmarks.md"
    page.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    condensed = report.condense(runs)
    report.write(condensed, tmp_path)
    once = page.read_text()
    report.write(condensed, tmp_path)
    assert page.read_text() == once
    assert once.startswith("above\n") and once.endswith("below\n") and "old" not in once and GROUP[1:] in once
    assert json.loads((tmp_path / "bench/results/cpu.json").read_text()) == condensed
    assert "<svg" in (tmp_path / "docs/results/benchmarks.svg").read_text()


def test_a_run_of_some_groups_leaves_the_others_as_they_were(runs: list[dict[str, Any]]) -> None:
    """Each group says when it was measured; another machine's figures are never beside it."""
    kept = report.condense(runs)
    new = json.loads(json.dumps(kept))
    new["runs"][0].update(date="2026-02-02", groups=[GROUP])
    new["groups"] = {GROUP: {"users": {"fastadv": {"median": 0.5, "iqr": 0.1, "rounds": 3}}}}
    both = report.merged(kept, new)
    assert both["groups"] == {MEMORY: kept["groups"][MEMORY], **new["groups"]}
    assert [(run["date"][:10], run["groups"]) for run in both["runs"]] == [
        ("2026-01-01", [MEMORY]), ("2026-02-02", [GROUP]),
    ]  # fmt: skip
    assert f"- 2026-02-02, commit 0123456789: {GROUP}" in report.markdown(both)
    assert report.merged(kept, {**new, "machine": {"cores": 4}}) == {**new, "machine": {"cores": 4}}


def test_report_keeps_no_partial_run(tmp_path: Path) -> None:
    for partial in ([run_of("users", MEDIANS)], [run_of(heap, MEDIANS, size="tiny") for heap in report.HEAPS]):
        with pytest.raises(ValueError, match="not kept"):
            report.write(report.condense(partial), tmp_path)
    with pytest.raises(ValueError, match="no markers"):
        report.between_markers("a page", "text")


def test_the_page_shows_the_committed_run() -> None:
    results = ROOT / "bench/results/cpu.json"
    page = (ROOT / "docs/benchmarks.md").read_text()
    if not results.exists():
        assert "No run is kept yet." in page
        return
    assert report.markdown(json.loads(results.read_text())) in page


def test_a_race_takes_turns_and_starts_every_round_with_the_next() -> None:
    order: list[str] = []
    entries = {name: race.Entry(lambda: None, lambda name=name: order.append(name)) for name in "abc"}
    result = race.race(entries, 3, race.Copy(16))
    assert "".join(order[race.WARMUP * 3 :]) == "abcbcacab"
    assert [len(seconds) for seconds in result.seconds.values()] == [3, 3, 3]
    assert len(result.copy) == 9 and result.bandwidth > 0
    limit = result.with_limit(64).seconds[race.LIMIT]
    assert limit == pytest.approx([seconds / 2 for seconds in result.copy])  # the copy reads and writes 64 bytes each


def test_the_environment_has_the_heap_that_was_asked_for() -> None:
    shell = {"PATH": "/bin", "MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": "x", "OMP_NUM_THREADS": "7"}
    assert machine.environment("users", 2, shell) == {"PATH": "/bin", "OMP_NUM_THREADS": "2"}
    retained = machine.environment("retained", 2, shell)
    assert machine.environment("retained", 2, retained) == retained
    assert retained["MALLOC_MMAP_MAX_"] == "0" and "GLIBC_TUNABLES" not in retained
    assert machine.environment("users", 2, retained) == {"PATH": "/bin", "OMP_NUM_THREADS": "2"}


def test_zipf_ids_repeat_and_avoid_padding() -> None:
    ids = zipf(16, 128, 30_522)
    assert ids.shape == (16, 128) and int(ids.min()) == 1 and int(ids.max()) < 30_522
    assert 500 < len(ids.unique()) < 1_000
    assert (ids == zipf(16, 128, 30_522)).all()


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="the contestant fastadv needs the C++ ops")
def test_every_benchmark_runs() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "-q",
        "--size",
        "tiny",
        "--threads",
        "1",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, "--benchmark-disable"], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout
