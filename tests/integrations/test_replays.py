"""FreeAT under the Trainer: replays, accumulation, epochs and resuming, against a loop written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadv
from fastadv.integrations.transformers import AdversarialTrainer
from tests.integrations.by_hand import RATE, arguments, assert_same, bert, classify, samples, train

FREEAT: dict[str, Any] = {"epsilon": 0.05, "replays": 2}


def micro_batches(count: int) -> list[dict[str, Tensor]]:
    rows = samples(count)
    return [{key: torch.stack([row[key] for row in rows[i : i + 2]]) for key in rows[0]} for i in range(0, count, 2)]


def by_hand(model: Any, count: int, accumulate: int = 1, carry: bool = True, epochs: int = 1) -> list[int]:
    """Every group of micro-batches twice, an optimizer step each time; each micro-batch of a group has slots."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    slots = [torch.zeros(2, 9, 32) for _ in range(accumulate)]
    order = []
    for _ in range(epochs):
        batches = micro_batches(count)
        for first in range(0, len(batches) - accumulate + 1, accumulate):
            group = batches[first : first + accumulate]
            if not carry:
                slots = [torch.zeros_like(slot) for slot in slots]
            for _ in range(2):
                for index, data in enumerate(group):
                    delta = (slots[index] * data["attention_mask"].unsqueeze(-1)).requires_grad_()
                    handle = model.get_input_embeddings().register_forward_hook(lambda m, a, o, d=delta: o + d)
                    classify(model, data, accumulate).backward()
                    handle.remove()
                    moved = (delta + 0.05 * delta.grad.sign()).clamp(-0.05, 0.05).detach()
                    slots[index] = torch.where(data["attention_mask"].bool().unsqueeze(-1), moved, slots[index])
                    order.append(first + index)
                optimizer.step()
                optimizer.zero_grad()
    return order


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize(("accumulate", "count"), [(1, 6), (2, 8), (2, 10)])
def test_replays(tmp_path: Path, accumulate: int, count: int, carry: bool) -> None:
    """Two epochs of which each batch comes twice are one epoch of data; a group that is not full is left out."""
    model, want = bert(), bert()
    trainer = train(
        model,
        tmp_path,
        samples(count),
        adversary=(fastadv.FreeAT, {**FREEAT, "carry": carry}),
        gradient_accumulation_steps=accumulate,
        num_train_epochs=2,
    )
    order = by_hand(want, count, accumulate, carry)
    assert trainer.state.global_step == len(order) // accumulate
    assert trainer.state.epoch == 1
    assert_same(model, want, 2e-6)


def trainer_of(model: Any, folder: Path, rows: int = 10, **changes: Any) -> AdversarialTrainer:
    """Shuffled, three replays of each batch, three data epochs."""
    args = arguments(
        folder,
        **{
            "num_train_epochs": 9,
            "save_strategy": "steps",
            "save_steps": 1,
            "train_sampling_strategy": "random",
            **changes,
        },
    )
    adversary = (fastadv.FreeAT, {"epsilon": 0.05, "replays": 3})
    return AdversarialTrainer(model=model, args=args, train_dataset=samples(rows), adversary=adversary)


class Seen:
    """Which rows a training saw, batch by batch."""

    def __init__(self, trainer: AdversarialTrainer) -> None:
        self.batches: list[list[int]] = []
        step = trainer.training_step

        def watched(model: Any, inputs: Any, *rest: Any, **options: Any) -> Tensor:
            self.batches.append(inputs["input_ids"].sum(1).tolist())
            return step(model, inputs, *rest, **options)

        trainer.training_step = watched


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_training_is_the_training_that_was_never_stopped(tmp_path: Path, accumulate: int) -> None:
    """From every checkpoint, in the middle of replays and of epochs as well: the same batches, the same weights."""
    torch.manual_seed(0)
    whole = trainer_of(bert(), tmp_path / "whole", gradient_accumulation_steps=accumulate)
    seen = Seen(whole)
    whole.train()
    steps = whole.state.global_step
    assert steps == 9 * (5 // accumulate)
    groups = [tuple(map(tuple, seen.batches[i : i + accumulate])) for i in range(0, len(seen.batches), accumulate)]
    assert all(groups[i] == groups[i - i % 3] for i in range(steps)), "replays differ"
    epoch = 3 * (5 // accumulate)
    assert groups[:epoch] != groups[epoch : 2 * epoch], "both epochs had the same order"
    for step in (1, 2, 3, epoch - 1, epoch, epoch + 1, 2 * epoch + 2):
        again = trainer_of(bert(), tmp_path / "whole", gradient_accumulation_steps=accumulate, save_strategy="no")
        rest = Seen(again)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert rest.batches == seen.batches[step * accumulate :], step
        for (name, got), want in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(got, want), (step, name)


def test_a_group_larger_than_the_epoch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gradient_accumulation_steps=8, but an epoch has 5 batches"):
        trainer_of(bert(), tmp_path, gradient_accumulation_steps=8).train()


def test_replays_must_be_known_before_the_method_is_made(tmp_path: Path) -> None:
    trainer = AdversarialTrainer(
        model=bert(), args=arguments(tmp_path), train_dataset=samples(4), adversary=lambda model: fastadv.FreeAT(model)
    )
    with pytest.raises(ValueError, match=r"adversary=\(fastadv.FreeAT, "):
        trainer.train()
    assert "forward" not in vars(trainer.model.get_input_embeddings())


def test_speed_counts_replayed_samples(tmp_path: Path) -> None:
    trainer = trainer_of(bert(), tmp_path, save_strategy="no")
    loader = trainer.get_train_dataloader()
    assert trainer.num_examples(loader) == 30
    assert len(loader) == 15


def test_a_method_knows_its_steps_after_resuming(tmp_path: Path) -> None:
    """Also one without replays: `attacked` goes on counting."""
    adversary = (fastadv.FGM, {"epsilon": 0.1, "scope": "sample"})
    train(bert(), tmp_path, samples(8), adversary=adversary, save_strategy="steps", save_steps=3)
    trainer = AdversarialTrainer(model=bert(), args=arguments(tmp_path), train_dataset=samples(8), adversary=adversary)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert trainer.adversary.attacked == 4
