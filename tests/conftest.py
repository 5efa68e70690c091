"""Settings for every test: one thread of work at a time, a fixed seed, and no network."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("fastadv", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fastadv")
torch.set_num_threads(1)  # the models are tiny: a second thread only waits for the first


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=["native", "triton"],
        default="native",
        help="triton: what fused=None runs on the CPU is the Triton kernels, interpreted; slow",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--backend") == "triton":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
        from tests.kernels import interpreter

        interpreter.take_over()
        config.pluginmanager.register(interpreter)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--backend") == "triton":
        others = [item for item in items if item.get_closest_marker("native")]
        items[:] = [item for item in items if not item.get_closest_marker("native")]
        config.hook.pytest_deselected(items=others)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same place of torch's generator."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _a_stream_of_its_own() -> Iterator[None]:
    """On a GPU a test runs on another stream than the default one, which would wait for all others."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
    torch.cuda.synchronize()
