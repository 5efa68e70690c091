"""Options and the one thread setting of all benchmarks."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", choices=("minilm", "tiny"), default="minilm", help="how large a model to time")
