"""`python -m bench.report [FILE ...] [--write]`.

With pytest-benchmark's files (`--benchmark-json`): prints a table of every group, and with `--write` keeps the run in
bench/results/<machine>.json. With `--write`, or without files: makes everything that is shown of what is kept, which is
bench/results/<machine>.csv, docs/benchmarks.md (between its markers) and the pictures in docs/results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import machine
from bench.report import pictures, tables
from bench.report.condense import condense, merged

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- results: written by bench/report -->", "<!-- end of results -->"
PICTURES = {
    "benchmarks.svg": "Times over fastadv's",
    "scaling.svg": "How cost grows with vocabulary, tokens, dimension and steps",
    "step_time.svg": "The time of a training step by method",
}


def keep(condensed: dict[str, Any], root: Path = ROOT) -> Path:
    """Keep a run beside the groups of earlier ones that it has not."""
    heaps = {heap for found in condensed["groups"].values() for heap in found}
    on_gpu = "nvidia" in str(condensed["machine"]["processor"]).lower()
    if condensed["machine"]["size"] != "full" or not (on_gpu or heaps == set(tables.HEAPS)):
        raise ValueError("not kept: only a run of full size with both heaps is")
    results = root / f"bench/results/{machine.name(condensed['machine'])}.json"
    results.parent.mkdir(exist_ok=True)
    if results.exists():
        condensed = merged(json.loads(results.read_text(encoding="utf-8")), condensed)
    results.write_text(json.dumps(condensed, indent=1) + "\n", encoding="utf-8")
    return results


def kept(root: Path = ROOT) -> dict[str, dict[str, Any]]:
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in root.glob("bench/results/*.json")}
    return {name: one for name, one in sorted(found.items()) if "groups" in one}  # others are of gpu-check alone


def shown(machines: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What the pages and the pictures show: the machine that ran last."""
    return max(machines.values(), key=lambda one: str(one["runs"][-1]["date"]))


def render(root: Path = ROOT) -> list[Path]:
    machines = kept(root)
    if not machines:
        raise ValueError("nothing is kept in bench/results yet: run `make bench`")
    last, page = shown(machines), root / "docs/benchmarks.md"
    made = pictures.every(last)
    links = [f"![{title}](results/{name})" for name, title in PICTURES.items() if name in made]
    text = "\n\n".join([*links, tables.markdown(last)])
    files = {root / f"bench/results/{name}.csv": tables.comma_separated(one) for name, one in machines.items()}
    files |= {root / "docs/results" / name: picture for name, picture in made.items()}
    files[page] = between_markers(page.read_text(encoding="utf-8"), text)
    for file, content in files.items():
        file.write_text(content, encoding="utf-8")
    return list(files)


def between_markers(page: str, text: str) -> str:
    """`page` with what stands between its markers replaced by `text`."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no markers {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="pytest-benchmark's JSON")
    parser.add_argument("--write", action="store_true", help="keep the run in bench/results, and make what is shown")
    options = parser.parse_args(arguments)
    runs: list[Mapping[str, Any]] = [json.loads(file.read_text(encoding="utf-8")) for file in options.files]
    try:
        if runs:
            condensed = condense(runs)
            print(tables.markdown(condensed))
            if not options.write:
                return
            print(keep(condensed))
        print("\n".join(str(file) for file in render()))
    except ValueError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
