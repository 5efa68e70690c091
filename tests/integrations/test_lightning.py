"""Lightning's manual optimisation and Fabric, in two processes against one."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.integrations.lightning import FabricOwner, LightningOwner
from tests.distributed.workers import WORLD, build, half, step
from tests.integrations.stacks import MICRO, NAMES, RATE, assert_as_alone, make, micro_batches, together, weights
from tests.support import assert_gradients, batch, gradients

pytest.importorskip("lightning")


def fit(module: Any, data: Any, **options: Any) -> None:
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            enable_model_summary=False,
            use_distributed_sampler=False,
            **quiet,
            **options,
        )
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))


def manual(name: str, reduced: list[int]) -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.model = build()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=RATE / MICRO)

        def on_fit_start(self) -> None:
            self.adv = make(name, self.model, backward=LightningOwner(self))
            if hasattr(self.adv, "attach"):
                self.adv.attach(self.optimizers().optimizer)

        def training_step(self, data: dict[str, Tensor], index: int) -> None:
            step(self.adv, self.model, data)
            if index % MICRO == MICRO - 1:
                self.optimizers().step()
                self.optimizers().zero_grad()

        def on_before_backward(self, loss: Tensor) -> None:
            reduced.append(self.trainer.strategy.model.require_backward_grad_sync)

    return Module()


def lightning_trained(rank: int, name: str) -> dict[str, Tensor]:
    reduced: list[int] = []
    module = manual(name, reduced)
    fit(module, [half(rank, seed) for seed, _, _ in micro_batches()], strategy="ddp", devices=WORLD)
    if name == "pgd-sample":
        assert reduced == [False, True] * 4, "a clean pass and a last one"
    return weights(module.model)


def fabric_trained(rank: int, name: str) -> dict[str, Tensor]:
    import lightning

    fabric = lightning.Fabric(accelerator="cpu", devices=WORLD, strategy="ddp", precision="64-true")
    fabric.launch()
    model = build()
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=RATE / MICRO))
    adv = make(name, wrapped, backward=FabricOwner(fabric, wrapped))
    if hasattr(adv, "attach"):
        adv.attach(optimizer.optimizer)
    for seed, due, _ in micro_batches():
        torch.set_default_dtype(torch.float64)  # in which Fabric gives outputs
        with fabric.no_backward_sync(wrapped, enabled=not due):
            step(adv, wrapped, half(rank, seed))
        torch.set_default_dtype(torch.float32)
        if due:
            optimizer.step()
            optimizer.zero_grad()
    return weights(model)


@pytest.mark.slow
@pytest.mark.dist
def test_manual_optimisation_under_ddp(tmp_path: Path) -> None:
    assert_as_alone(together(lightning_trained, NAMES, tmp_path))


@pytest.mark.slow
@pytest.mark.dist
def test_fabric_under_ddp(tmp_path: Path) -> None:
    found = together(fabric_trained, NAMES, tmp_path)
    assert_as_alone({name: found.pop(name) for name in ("pgd-sample", "yopo-sample")})
    assert_as_alone(found, 1e-6)  # their start is one of torch's default dtype


@pytest.mark.parametrize("name", ["pgd-sample", "llr", "smart", "held-smart"])
def test_fabric_in_mixed_precision(name: str) -> None:
    """Probes are backwards too. The twin: autocast inside of the closure."""
    import lightning

    def closure(model: nn.Module, precision: Any) -> dict[str, Tensor]:
        data = batch()
        with precision:
            output = model(**data)
        logits = output.logits.float()  # once: each cast's gradient is rounded by itself
        losses = F.cross_entropy(logits, data["labels"], reduction="none")
        return {"loss": losses.mean(), "logits": logits, "losses": losses}

    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model, want = build().float(), build().float()
    wrapped = fabric.setup_module(model)
    adv = make(name, wrapped, backward=FabricOwner(fabric, wrapped))
    adv.backward(lambda: closure(wrapped, contextlib.nullcontext()), mask=batch()["attention_mask"])
    make(name, want, backward=lambda loss: loss.backward()).backward(
        lambda: closure(want, torch.autocast("cpu", torch.bfloat16)), mask=batch()["attention_mask"]
    )
    assert_gradients(gradients(model), gradients(want), 1e-6)
    assert type(wrapped).__module__ == "lightning.fabric.wrappers"
    assert not sys.modules["lightning.fabric.wrappers"]._in_fabric_backward


def test_automatic_optimisation_is_refused_with_the_recipe() -> None:
    module = manual("pgd-sample", [])
    module.automatic_optimization = True
    with pytest.raises(ValueError, match=r"self\.automatic_optimization = False"):
        fit(module, [batch()])
