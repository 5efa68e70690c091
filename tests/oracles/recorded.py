"""Recorded runs as the tests of goldens read them, and the classic scripts' against what they must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv import native
from tests.models import TinyModel
from tests.support import assert_close, assert_gradients, golden, gradients, seeded

NATIVE = pytest.mark.skipif(not native.available(), reason=f"no C++ ops: {native.reason()}")
ENGINES = [pytest.param(True, id="fused", marks=NATIVE), pytest.param(False, id="eager")]
FGM_ZHIHU = ["fgm_zhihu_mlp_eps0.5", "fgm_zhihu_mlp_eps1.0"]
PGD_ZHIHU = [
    "pgd_zhihu_mlp_eps0.5_a0.3_K3",
    "pgd_zhihu_mlp_eps1.0_a0.3_K1",
    "pgd_zhihu_mlp_eps1.0_a0.3_K3",
    "pgd_zhihu_mlp_eps1.0_a0.3_K5",
]


def hyperparameters(name: str) -> dict[str, Any]:
    """`..._eps0.5_a0.3_K3` -> {"epsilon": 0.5, "step_size": 0.3, "steps": 3}."""
    known = {"eps": ("epsilon", float), "a": ("step_size", float), "K": ("steps", int)}
    found = {}
    for part in name.split("_mlp_")[1].split("_"):
        key = part.rstrip("0123456789.")
        word, kind = known[key]
        found[word] = kind(part.removeprefix(key))
    return found


def load(
    name: str, build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, dict[str, Any]]:
    run = golden(name)
    model = seeded(build, dtype=dtype)
    model.load_state_dict(run["w"])
    return model, run


class Watched:
    """A closure that keeps every loss it returned."""

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        self.forward = forward
        self.losses: list[Tensor] = []

    def __call__(self) -> Tensor:
        loss = self.forward()
        self.losses.append(loss.detach())
        return loss


def zhihu(name: str) -> tuple[nn.Module, dict[str, Any], Watched]:
    model, run = load(name, TinyModel)
    return model, run, Watched(lambda: model(run["ids"], run["mask"], run["labels"]).loss)


def check_zhihu(model: nn.Module, run: dict[str, Any], watched: Watched, seen: list[Tensor]) -> None:
    """Gradients, the loss of every pass and the perturbation of every pass."""
    assert_gradients(gradients(model), run["g"], 1e-7)
    want = torch.cat([run["loss_clean"].reshape(1), run["loss_adv"].reshape(-1)])
    assert_close(torch.stack(watched.losses), want, 1e-7, "losses")
    table, real = run["w"]["bert.embeddings.word_embeddings.weight"], run["mask"].bool()
    assert torch.equal(seen[0], table[run["ids"]])
    steps = run["r"].reshape(-1, *table.shape)
    assert len(seen) == len(steps) + 1
    for embedded, r in zip(seen[1:], steps, strict=True):
        assert_close((embedded - table[run["ids"]])[real], r[run["ids"]][real], 1e-7, "perturbation")
