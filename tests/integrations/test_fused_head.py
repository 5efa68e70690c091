"""A Trainer whose loss needs no logits, as TRL's SFTTrainer is: asked for them, it runs a forward under no_grad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

import fastadv
from fastadv.integrations.transformers import AdversarialMixin
from tests.integrations.by_hand import llama, samples, train


def waves(shape: tuple[int, ...], mask: Tensor) -> Tensor:
    """A start that does not depend on who else is in the batch."""
    del mask
    return 0.05 * torch.sin(torch.arange(shape[1] * shape[2])).view(shape[1:]).expand(shape)


METHODS: dict[str, Any] = {
    "pgd": (fastadv.PGD, {"epsilon": 0.5, "step_size": 0.3, "scope": "sample"}),
    "smart": (fastadv.SMART, {"epsilon": 0.1, "random_start": waves}),
    "vat": (fastadv.VAT, {"epsilon": 0.3, "xi": 0.1, "random_start": waves}),
    "bregman": lambda model: fastadv.BregmanProximal(
        model, 2.0, 0.5, method=fastadv.FGM(model, epsilon=0.1, scope="sample")
    ),
}


class Fused(AdversarialMixin, Trainer):
    asked = 0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, **kwargs)
        if not return_outputs:
            return loss
        self.asked += 1
        with torch.no_grad():
            return loss, model(**{name: value for name, value in inputs.items() if name != "labels"})


@pytest.mark.parametrize("name", METHODS)
def test_logits_come_with_their_graph_where_a_method_compares_them(tmp_path: Path, name: str) -> None:
    model, want = llama(), llama()
    data, start = samples(8, language=True), llama().state_dict()
    options = {"adversary": METHODS[name], "gradient_accumulation_steps": 2}
    trainer = train(model, tmp_path, data, kind=Fused, **options)
    train(want, tmp_path, data, **options)
    assert trainer.asked == (name != "pgd")  # until it is known
    for (key, mine), other in zip(model.state_dict().items(), want.state_dict().values(), strict=True):
        assert float((mine - other).abs().max()) < 5e-6, key
        assert float((other - start[key]).abs().max()) > 1e-3, key
