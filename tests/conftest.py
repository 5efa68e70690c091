"""Settings for every test: one thread of work at a time, a fixed seed, and no network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("fastadv", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fastadv")
torch.set_num_threads(1)  # the models are tiny: a second thread only waits for the first


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same place of torch's generator."""
    torch.manual_seed(0)
