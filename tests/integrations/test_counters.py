"""What a Trainer counts in its `compute_loss` counts a batch once, whatever the method's passes are."""

from __future__ import annotations

from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import fastadv
from fastadv.integrations.transformers import AdversarialMixin
from tests.integrations.by_hand import arguments, assert_same, bert, sample_scope, samples, train


class Counting(Trainer):
    """Keeps tokens and metrics as TRL's trainers do, and others as one could."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.num_tokens = 0
        self.on_device = torch.zeros((), dtype=torch.long)
        self.metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.last = deque[float](maxlen=2)
        self.passes = [self]  # holds no number
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        tokens = int(inputs["attention_mask"].sum())
        self.num_tokens += tokens
        self.on_device += tokens
        self.metrics["train"]["loss"].append(loss.item())
        self.metrics["train"]["num_tokens"] = [self.num_tokens]
        self.last.append(loss.item())
        return (loss, outputs) if return_outputs else loss


class Adversarial(AdversarialMixin, Counting):
    pass


@pytest.mark.parametrize(
    "adversary",
    [
        sample_scope,
        (fastadv.PGD, {"epsilon": 0.5, "step_size": 0.3, "scope": "sample"}),
        (fastadv.SMART, {"epsilon": 0.1, "steps": 2}),
        (fastadv.AWP, {}),
        lambda model: fastadv.BregmanProximal(model, 2.0, 0.5, method=sample_scope(model)),
    ],
    ids=["fgm", "pgd", "smart", "awp", "bregman"],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_counts_once(tmp_path: Path, adversary: Any, accumulate: int) -> None:
    trainer = train(
        bert(), tmp_path, samples(8), kind=Adversarial, adversary=adversary, gradient_accumulation_steps=accumulate
    )
    tokens = sum(int(row["attention_mask"].sum()) for row in samples(8))
    assert trainer.num_tokens == trainer.on_device == tokens
    assert trainer.metrics["train"]["num_tokens"] == [tokens]
    assert len(trainer.metrics["train"]["loss"]) == 4
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    own = torch.tensor(trainer.metrics["train"]["loss"]).view(-1, accumulate).mean(1)
    assert own.tolist() == pytest.approx(logged, abs=1e-4)  # the clean pass's, not the perturbed ones'
    assert len(trainer.last) == 2
    assert trainer.last[-1] == trainer.metrics["train"]["loss"][-1]


def test_a_step_without_an_attack_counts_too(tmp_path: Path) -> None:
    adversary = (fastadv.FGM, {"epsilon": 0.5, "scope": "sample", "start_step": 2})
    trainer = train(bert(), tmp_path, samples(8), kind=Adversarial, adversary=adversary)
    assert trainer.num_tokens == sum(int(row["attention_mask"].sum()) for row in samples(8))


def test_an_error_in_a_later_pass_takes_its_figures_back(tmp_path: Path) -> None:
    class Failing(Adversarial):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            before = len(self.metrics["train"]["loss"])
            found = super().compute_loss(*args, **kwargs)
            if before:
                raise RuntimeError("in the second pass")
            return found

    trainer = Failing(model=bert(), args=arguments(tmp_path), train_dataset=samples(4), adversary=sample_scope)
    with pytest.raises(RuntimeError, match="in the second pass"):
        trainer.train()
    assert len(trainer.metrics["train"]["loss"]) == 1


def test_training_is_the_same(tmp_path: Path) -> None:
    model, want = bert(), bert()
    train(model, tmp_path, samples(8), kind=Adversarial)
    train(want, tmp_path, samples(8))
    assert_same(model, want, 0)
