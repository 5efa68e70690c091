"""Semi-supervised training with the Trainer, against a loop written by hand."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv.integrations.transformers import AdversarialTrainer
from fastadv.integrations.unlabelled import Endless
from tests.integrations.by_hand import RATE, arguments, assert_same, bert, samples, train


def start(shape: tuple[int, ...], mask: Tensor) -> Tensor:
    return 0.01 * torch.sin(torch.arange(shape[2])).expand(shape)


VAT = (fastadv.VAT, {"epsilon": 0.5, "weight": 2.0, "random_start": start})


def texts(count: int) -> list[dict[str, Tensor]]:
    """Samples without labels."""
    return [{name: row[name] for name in ("input_ids", "attention_mask")} for row in samples(count + 7)[7:]]


def semi(model: nn.Module, folder: Path, adversary: Any = VAT, **changes: Any) -> Any:
    unlabelled = changes.pop("unlabelled", texts(5))
    return AdversarialTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=samples(8),
        adversary=adversary,
        unlabelled=unlabelled,
    )


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_the_loop_written_by_hand(tmp_path: Path, accumulate: int) -> None:
    """Every batch of labelled samples is followed by one of the others; both add their divergence."""
    model, want = bert(), bert()
    trainer = semi(model, tmp_path, gradient_accumulation_steps=accumulate)
    trainer.train()
    adv, optimizer = VAT[0](want, **VAT[1]), torch.optim.SGD(want.parameters(), lr=RATE)
    adv.share = 1 / accumulate
    labelled, others = samples(8), texts(5)
    orders = iter(Endless(5, 2, trainer.args.seed, 0, 0, 1))
    for number in range(4):
        with_labels = stacked(labelled[2 * number : 2 * number + 2])
        without = stacked([others[index] for index in next(orders)])

        def closure(data: dict[str, Tensor] = with_labels) -> tuple[Tensor, Tensor]:
            output = want(**data)
            return output.loss / accumulate, output.logits

        adv.backward(closure, mask=with_labels["attention_mask"])
        adv.backward(lambda data=without: want(**data), mask=without["attention_mask"])  # type: ignore[misc]
        if (number + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(model, want)
    alone = bert()
    train(alone, tmp_path, samples(8), adversary=VAT, gradient_accumulation_steps=accumulate)
    moved = (alone.classifier.weight - model.classifier.weight).detach().abs().max()
    assert float(moved) > 1e-4, "the unlabelled samples changed nothing"


def test_labels_among_them_are_not_looked_at(tmp_path: Path) -> None:
    model, other = bert(), bert()
    semi(model, tmp_path).train()
    semi(other, tmp_path, unlabelled=samples(12)[7:]).train()
    assert_same(model, other, 0)


def test_the_labelled_batches_come_in_the_order_they_had(tmp_path: Path) -> None:
    """At weight 0 the unlabelled ones change nothing: their loader draws from no generator that others draw from."""
    models = []
    for unlabelled in (None, texts(5)):
        model = bert()
        adversary = (fastadv.VAT, {"epsilon": 0.5, "weight": 0.0, "random_start": start})
        semi(model, tmp_path, adversary, unlabelled=unlabelled, train_sampling_strategy="random").train()
        models.append(model)
    assert_same(*models, 0)


def test_resumed_it_goes_on_where_it_was(tmp_path: Path) -> None:
    """In the middle of the unlabelled set's second epoch."""
    whole = semi(bert(), tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    again = semi(bert(), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert again._unlabelled.seen == whole._unlabelled.seen == 4
    assert_same(again.model, whole.model, 0)


def test_a_step_that_is_not_attacked_sees_none(tmp_path: Path) -> None:
    trainer = semi(bert(), tmp_path, (fastadv.VAT, {**VAT[1], "start_step": 2}))
    trainer.train()
    assert trainer._unlabelled.seen == 2
    assert trainer.adversary.attacked == 4


def test_vat_near_a_teacher(tmp_path: Path) -> None:
    trainer = semi(
        bert(), tmp_path, lambda model: fastadv.BregmanProximal(model, 1.0, 0.5, method=VAT[0](model, **VAT[1]))
    )
    trainer.train()
    assert trainer._unlabelled.seen == trainer.adversary.updates == 4


@pytest.mark.parametrize(
    ("adversary", "data", "phrase"),
    [
        ((fastadv.FGM, {"epsilon": 0.1}), texts(5), "FGM needs a loss: use adversary=\\(fastadv.VAT"),
        (lambda model: fastadv.BregmanProximal(model), texts(5), "BregmanProximal needs a loss"),
        (VAT, [], "at least one sample"),
        (VAT, iter(texts(5)), "with a length"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, adversary: Any, data: Any, phrase: str) -> None:
    with pytest.raises(ValueError, match=phrase):
        semi(bert(), tmp_path, adversary, unlabelled=data).train()


def test_orders() -> None:
    """An epoch has every sample once; the next has another order; processes share one; a start skips."""
    batches = list(islice(Endless(5, 2, 7, 0, 0, 1), 10))
    flat = [index for batch in batches for index in batch]
    epochs = [flat[at : at + 5] for at in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    parts = [list(islice(Endless(5, 2, 7, 0, process, 2), 5)) for process in range(2)]
    assert [batch for pair in zip(*parts, strict=True) for batch in pair] == batches
    assert list(islice(Endless(5, 2, 7, 3, 0, 1), 7)) == batches[3:]
    assert list(islice(Endless(5, 2, 8, 0, 0, 1), 10)) != batches
