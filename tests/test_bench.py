"""The benchmarks' own parts, and a tiny run of all of them, so that they cannot rot."""

from __future__ import annotations

import csv
import io
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import contest, machine, memory, race, workloads
from bench.cases import cases, group
from bench.report import __main__ as report
from bench.report import pictures, tables
from bench.report.condense import condense, merged
from bench.workloads import zipf
from fastadv import native

ROOT = Path(__file__).parent.parent
GROUP = "attack step, table scope, BERT-base"
MEMORY = "peak memory, PGD-3, V 500"


def run_of(heap: str, medians: dict[str, float], group: str = GROUP, **overrides: Any) -> dict[str, Any]:
    """One of pytest-benchmark's files, as far as the report reads it."""
    found: dict[str, Any] = {
        "processor": "a processor",
        "cores": 2,
        "threads": 2,
        "torch": "2.13.0",
        "python": "3.11.0",
        "libc": "glibc 2.36",
        "size": "full",
        "heap": heap,
        "copy_bandwidth": 2e10,
        **overrides,
    }
    benchmarks = [
        {
            "group": group,
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


MEDIANS = {"reference": 0.08, "torch": 0.003, "fused": 0.001, "physical limit": 0.0008}


@pytest.fixture
def runs() -> list[dict[str, Any]]:
    found = [run_of("users", MEDIANS), run_of("retained", {name: 2 * value for name, value in MEDIANS.items()})]
    found[0]["benchmarks"].append(memory_bench(found[0]))
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A repository, as far as the report writes into it."""
    (tmp_path / "docs/results").mkdir(parents=True)
    (tmp_path / "bench").mkdir()
    (tmp_path / "docs/benchmarks.md").write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    return tmp_path


def test_tables_have_ratios_and_the_fraction_of_the_limit(runs: list[dict[str, Any]]) -> None:
    condensed = condense(runs)
    row = condensed["groups"][GROUP]["users"]["torch"]
    assert row["over_fused"] == pytest.approx(3)
    assert row["of_limit"] == pytest.approx(0.8 / 3)
    assert row["copy_bandwidth"] == 2e10
    text = tables.markdown(condensed)
    assert "| torch | 3 ms (0.3) | 3.00 | 27% | 6 ms (0.6) | 3.00 | 27% |" in text
    assert "| **fused** | 1 ms (0.1) | 1.00 | 80% | 2 ms (0.2) | 1.00 | 80% |" in text
    assert "| reference | 1,024.5 | 6.0 | 2.0 |" in text
    assert "20.0 GB/s" in text and "commit 0123456789" in text


def test_a_table_of_one_heap_without_fastadv() -> None:
    text = tables.markdown(condense([run_of("users", {"torch": 1.5})]))
    assert "| torch | 1.5 s (0.15) |  |" in text


def test_csv_has_a_row_for_every_figure(runs: list[dict[str, Any]]) -> None:
    rows = list(csv.DictReader(io.StringIO(tables.comma_separated(condense(runs)))))
    assert len(rows) == 2 * len(MEDIANS) + 1
    [mine] = [row for row in rows if (row["heap"], row["contestant"], row["group"]) == ("retained", "torch", GROUP)]
    assert float(mine["median_seconds"]) == pytest.approx(0.006) and float(mine["over_fused"]) == pytest.approx(3)


def test_runs_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="different machines"):
        condense([run_of("users", MEDIANS), run_of("retained", MEDIANS, threads=8)])
    with pytest.raises(ValueError, match="no benchmarks"):
        condense([{"benchmarks": []}])


def test_a_run_is_kept_and_shown(runs: list[dict[str, Any]], place: Path) -> None:
    condensed, page = condense(runs), place / "docs/benchmarks.md"
    with pytest.raises(ValueError, match="nothing is kept"):
        report.render(place)
    file = report.keep(condensed, place)
    assert file == place / "bench/results/a-processor-2-cores.json"
    report.render(place)
    once = page.read_text()
    report.keep(condensed, place)
    report.render(place)
    assert page.read_text() == once
    assert once.startswith("above\n") and once.endswith("below\n") and "old" not in once and GROUP[1:] in once
    assert json.loads(file.read_text()) == condensed
    assert file.with_suffix(".csv").read_text() == tables.comma_separated(condensed)
    assert "<svg" in (place / "docs/results/benchmarks.svg").read_text()


def test_each_machine_has_a_file(runs: list[dict[str, Any]], place: Path) -> None:
    other = [run_of(heap, MEDIANS, processor="NVIDIA H100 80GB HBM3") for heap in ("users",)]
    names = {report.keep(condense(found), place).name for found in (runs, other)}
    assert names == {"a-processor-2-cores.json", "nvidia-h100-80gb-hbm3.json"}
    (place / "bench/results/of-gpu-check.json").write_text('{"gpu": "another"}')
    assert set(report.kept(place)) == {"a-processor-2-cores", "nvidia-h100-80gb-hbm3"}


def test_what_gpu_check_has_found_stays_beside_a_run(place: Path) -> None:
    (place / "bench/results").mkdir()
    file = place / "bench/results/nvidia-h100.json"
    file.write_text('{"gpu": "NVIDIA H100", "copy_gbps": 2900}')
    report.keep(condense([run_of("users", MEDIANS, processor="NVIDIA H100")]), place)
    found = json.loads(file.read_text())
    assert found["copy_gbps"] == 2900 and GROUP in found["groups"]


def test_pictures_of_what_grows_and_of_methods() -> None:
    points = [
        run_of(
            "users", {"reference": 0.1 * v, "fused": 0.001}, f"attack step, vocabulary {v}", axis="vocabulary", value=v
        )
        for v in (1000, 2000)
    ]
    step = run_of("users", {"plain": 1.0, "reference": 3.0, "torch": 2.5, "fused": 2.0}, "step of a method, PGD-3")
    condensed = condense([*points, step])
    users = {name: heaps["users"] for name, heaps in condensed["groups"].items()}
    assert pictures.along(users, "vocabulary")["reference"] == [(1000, 100.0), (2000, 200.0)]
    made = pictures.every(condensed)
    assert set(made) == {"benchmarks.svg", "step_time.svg", "attack_cost.svg", "scaling.svg"}
    assert all(text.startswith("<svg") for text in made.values())
    assert made == pictures.every(condensed), "equal figures give equal files"


def test_a_run_of_some_groups_leaves_the_others_as_they_were(runs: list[dict[str, Any]]) -> None:
    """Each group says when it was measured; another machine's figures are never beside it."""
    kept = condense(runs)
    new = json.loads(json.dumps(kept))
    new["runs"][0].update(date="2026-02-02", groups=[GROUP])
    new["groups"] = {GROUP: {"users": {"fused": {"median": 0.5, "iqr": 0.1, "rounds": 3}}}}
    both = merged(kept, new)
    assert both["groups"] == {MEMORY: kept["groups"][MEMORY], **new["groups"]}
    assert [(run["date"][:10], run["groups"]) for run in both["runs"]] == [
        ("2026-01-01", [MEMORY]), ("2026-02-02", [GROUP]),
    ]  # fmt: skip
    assert f"- 2026-02-02, commit 0123456789: {GROUP}" in tables.markdown(both)
    assert merged(kept, {**new, "machine": {"cores": 4}}) == {**new, "machine": {"cores": 4}}


def test_no_partial_run_is_kept(tmp_path: Path) -> None:
    for partial in ([run_of("users", MEDIANS)], [run_of(heap, MEDIANS, size="tiny") for heap in tables.HEAPS]):
        with pytest.raises(ValueError, match="not kept"):
            report.keep(condense(partial), tmp_path)
    with pytest.raises(ValueError, match="no markers"):
        report.between_markers("a page", "text")


def test_the_page_shows_the_committed_run() -> None:
    assert tables.markdown(report.shown(report.kept())) in (ROOT / "docs/benchmarks.md").read_text()
    for name, condensed in report.kept().items():
        assert (ROOT / f"bench/results/{name}.csv").read_text() == tables.comma_separated(condensed)


def test_the_readme_shows_the_committed_run() -> None:
    readme = (ROOT / "README.md").read_text()
    kept = report.shown(report.kept())
    users = {name: heaps["users"] for name, heaps in kept["groups"].items()}
    steps = [users[f"training step, PGD-3, V {vocabulary}"] for vocabulary in ("30,522", "250,002")]
    for title, name in (("the classic script", "reference"), ("the strongest plain PyTorch we could write", "torch")):
        cells = [f"{rows[name]['over_fused']:.2f}" for rows in steps]
        assert f"| {title} | {' | '.join(cells)} |" in readme
    over = [users["peak memory, PGD-3, V 250,002"][name]["over_plain_mib"] for name in ("reference", "fused")]
    assert f"{over[0]:+,.0f} MiB, {over[1]:+,.0f} MiB |" in readme
    methods = [rows for name, rows in users.items() if name.startswith(pictures.METHOD) and "torch" in rows]
    by_hand = sorted(rows["torch"]["over_fused"] for rows in methods)
    assert f"within {by_hand[0]:.2f} and {by_hand[-1]:.2f}" in readme


def test_a_race_takes_turns_and_starts_every_round_with_the_next() -> None:
    order: list[str] = []
    entries = {name: race.Entry(lambda: None, lambda name=name: order.append(name)) for name in "abc"}
    result = race.race(entries, 3, race.Copy(16))
    assert "".join(order[race.WARMUP * 3 :]) == "abcbcacab"
    assert [len(seconds) for seconds in result.seconds.values()] == [3, 3, 3]
    assert len(result.copy) == 9 and result.bandwidth > 0
    limit = result.with_limit(64).seconds[race.LIMIT]
    assert limit == pytest.approx([seconds / 2 for seconds in result.copy])  # the copy reads and writes 64 bytes each


def test_who_has_used_up_its_budget_sits_out() -> None:
    entries = {"long": race.Entry(lambda: None, lambda: sum(range(100_000))), "short": race.Entry(int, int)}
    result = race.race(entries, 9, race.Copy(16), budget=1e-3)
    assert len(result.seconds["long"]) == race.FEWEST
    assert len(result.seconds["short"]) == 9


def test_a_contest_refuses_a_wrong_answer() -> None:
    right, wrong = torch.ones(4), torch.tensor([1.0, 1, 1, 1.01])

    def entry(answer: torch.Tensor, *, compared: bool = True) -> race.Entry:
        return race.Entry(lambda: None, lambda: answer, compared=compared)

    def check(**entries: race.Entry) -> None:
        contest.check(contest.Field(entries))

    check(one=entry(right), other=entry(right.clone()))
    check(one=entry(right), scale=entry(wrong, compared=False))
    with pytest.raises(AssertionError, match="other: answer 0 is not the first"):
        check(one=entry(right), other=entry(wrong))
    with pytest.raises(AssertionError, match="gives 0 answers"):
        check(one=entry(right), other=race.Entry(race.nothing, list))


def test_how_far_answers_are_apart() -> None:
    one = torch.ones(4)
    assert contest.difference(one, one.clone()) == 0
    assert contest.difference(torch.tensor([1.0, 1, 1, 1.2]), one) == pytest.approx(0.1)
    assert contest.difference(one, torch.ones(2, 2)) == contest.difference(one, torch.zeros(4)) == float("inf")
    assert not contest.difference(torch.tensor([float("nan")]), torch.ones(1)) <= 1
    assert contest.difference(torch.full((4,), 1e-8), torch.zeros(4)) == 0, "both are rounding"
    assert contest.difference(torch.tensor([1, 3]), torch.tensor([1, 2])) > 0, "ids are exact"
    assert list(contest.tensors((one, [one, None]))) == [one, one]


def test_the_interval_holds_the_median_and_repeats() -> None:
    values = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 3.0]
    low, high = race.interval(values)
    assert 0.98 <= low <= 1.0 <= high <= 3.0 and high < 1.03
    assert race.interval(values) == (low, high)
    assert race.interval([1.5]) == (1.5, 1.5) and race.iqr([1.5]) == 0


def test_a_committed_figure_has_a_case() -> None:
    """Every group and contestant of the committed runs is in the registry, so that a new run replaces it."""
    size = workloads.SIZES["full"]
    shown = {(group(name), who) for name, case in cases(size).items() for who in case.contestants}
    shown |= {(name, who) for (name, _), who in memory.contestants(size)}
    for condensed in report.kept().values():
        kept = {(name, who) for name, heaps in condensed["groups"].items() for rows in heaps.values() for who in rows}
        assert kept <= shown


def test_inputs_rotate_and_begin_again_for_the_check() -> None:
    work = workloads.Workload(workloads.SIZES["tiny"].shapes["MiniLM"], "cpu", torch.float32)
    first, field = work.grad.clone(), work.field(0, {"one": race.nothing})
    field.entries["one"].setup()
    assert not torch.equal(work.grad, first)
    field.rewind()
    assert torch.equal(work.grad, first)


def test_the_environment_has_threads_and_an_untuned_heap() -> None:
    shell = {"PATH": "/bin", "MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": "x", "OMP_NUM_THREADS": "7"}
    wanted = machine.environment(2, shell)
    assert wanted == {"PATH": "/bin", "OMP_NUM_THREADS": "2"}
    assert machine.environment(2, wanted) == wanted


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is one heap")
def test_a_retained_heap_gives_nothing_back() -> None:
    """In a process of its own, for there is no way back."""
    code = """
import torch
from bench import machine
from bench.memory import peak, reset_peak

def kept():
    reset_peak()
    before = peak()
    x = torch.ones(16 << 20)
    del x
    reset_peak()
    return peak() - before > 48 << 20

print(kept(), machine.retain_heap(), kept())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False True True"


def test_zipf_ids_repeat_and_avoid_padding() -> None:
    ids = zipf(16, 128, 30_522)
    assert ids.shape == (16, 128) and int(ids.min()) == 1 and int(ids.max()) < 30_522
    assert 500 < len(ids.unique()) < 1_000
    assert (ids == zipf(16, 128, 30_522)).all()


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="the contestant fused needs the C++ ops")
def test_every_benchmark_runs() -> None:
    """Tiny, XLM-R and Qwen are BERT by another name; and with the users' heap, beside which the other is a setting."""
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--size=tiny", "--threads=1", "-p", "no:cacheprovider"]
    command += ["--heap=users", "-k", "not xlm and not qwen"]
    done = subprocess.run(
        [*command, "--benchmark-disable"], cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_quick_is_a_part_of_it() -> None:
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--collect-only", "-m", "quick", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    assert "test_case[users-attack-step-table-scope-bert-base-fused]" in done.stdout
    assert not any(name in done.stdout for name in ("retained", "step-of-a-method", "training-step", "xlm-r"))
