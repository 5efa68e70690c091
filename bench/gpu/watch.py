"""A pytest plugin (`-p bench.gpu.watch --journal FILE`): tests by journal, where another process can go on."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.journal import Journal, die_with

LONGEST = 6_000  # characters that are kept of a failure


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("journal")
    group.addoption("--journal", type=Path, help="where each test's outcome goes as it ends; what is there is not run")
    group.addoption("--parent", type=int, default=0, help="the process with which this one ends")
    group.addoption("--part", default="0/1", help="of N/M: which of M parts of the tests this process runs")
    group.addoption("--limit", type=float, default=60.0, help="seconds for each test")
    group.addoption("--only", type=Path, help="a file that names the tests to run, one a line")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--journal"):
        config.pluginmanager.register(Watch(config))
    if config.getoption("--parent"):
        die_with(config.getoption("--parent"))


class Watch:
    """Writes the journal, and stops where CUDA has broken."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.journal = config, Journal(config.getoption("--journal"))
        self.found: dict[str, Any] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """This process's part, without what an earlier one has begun."""
        only: Path | None = self.config.getoption("--only")
        names = set(only.read_text(encoding="utf-8").splitlines()) if only else None
        number, count = (int(part) for part in self.config.getoption("--part").split("/"))
        mine = [item for item in items if names is None or item.nodeid in names][number::count]
        self.journal.plan([item.nodeid for item in mine])
        begun = self.journal.read().begun
        chosen = [item for item in mine if item.nodeid not in begun]
        self.config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.journal.end(report.nodeid, outcome="failed", message=report.longreprtext[-LONGEST:])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.journal.begin(item.nodeid, self.config.getoption("--limit"))
        self.found = {"outcome": "passed", "seconds": 0.0}
        result = yield
        self.journal.end(item.nodeid, **self.found)
        if self.found["outcome"] == "failed" and broken():
            item.session.shouldstop = "CUDA has broken: a new process goes on"
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.found["seconds"] = round(self.found["seconds"] + report.duration, 3)
        if report.failed:
            self.found.update(outcome="failed", message=report.longreprtext[-LONGEST:])
        elif report.skipped and not hasattr(report, "wasxfail") and self.found["outcome"] != "failed":
            self.found.update(outcome="skipped", message=report.longreprtext[-LONGEST:])


def broken() -> bool:
    """Whether this process can use CUDA no longer: after an illegal access, or in a capture that never ended."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
