"""The generators of a device that is not here: torch's calls for it stand in, and keep a state."""

from __future__ import annotations

import random

import pytest
import torch

from fastadv.engine.safety import rng

MPS = torch.device("mps", 0)


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Of an Apple GPU's generator."""
    kept = {"now": torch.tensor([7])}
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: kept["now"].clone())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: kept.update(now=new))
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: kept.update(now=torch.tensor([seed])))
    return kept


def test_an_apple_gpus_generator_is_put_back(state: dict[str, torch.Tensor]) -> None:
    """dropout="same" goes back to it, and a step that fails leaves no trace in it."""
    replayed, before = rng.Replayed(MPS), (torch.get_rng_state(), random.getstate())
    state["now"] = torch.tensor([8])
    torch.rand(1)
    random.random()
    replayed.again()
    assert int(state["now"]) == 7
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_start_there_is_drawn_apart(state: dict[str, torch.Tensor]) -> None:
    with rng.apart(42, MPS):
        assert int(state["now"]) == 42
    assert int(state["now"]) == 7
