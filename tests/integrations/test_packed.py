"""Packed documents in the Trainer: what its collators give is read, and each document is a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

import fastadv
from fastadv import packed
from fastadv.integrations.transformers import AdversarialTrainer
from fastadv.methods.radius_losses import Task
from tests.integrations.by_hand import llama, train

LENGTHS = (7, 3, 2, 9, 5, 4)
EPSILON = 0.3
PGD = (fastadv.PGD, {"epsilon": EPSILON, "step_size": EPSILON, "steps": 2, "scope": "sample"})


def documents() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(4)
    return [{"input_ids": torch.randint(1, 40, (length,), generator=generator).tolist()} for length in LENGTHS]


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A row for each document; its first token is nobody's label, as where rows are packed."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((mask == 0), -100)}


class Watching(AdversarialTrainer):
    """Keeps each micro-batch's perturbation and groups."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        assert self.adversary is not None and self.adversary._engine.last is not None
        [lookup] = self.adversary._engine.last.lookups
        vars(self).setdefault("seen", []).append((lookup.delta.detach().clone(), self.adversarial_groups(inputs)))
        return loss


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_train_as_padded_ones(tmp_path: Path, attention: str) -> None:
    """Llama computes norms and rotations in float32, whatever it is in."""
    found = []
    for collator in (DataCollatorWithFlattening(), padded):
        model = llama().double()
        model.config.use_cache = False
        model.set_attn_implementation(attention)
        options: dict[str, Any] = {"data_collator": collator, "adversary": PGD, "kind": Watching}
        trainer = train(model, tmp_path, documents(), **options, per_device_train_batch_size=3)
        found.append((trainer, [p.detach() for p in model.parameters()]))
    (packing, got), (_, want) = found
    start = [p.detach() for p in llama().double().parameters()]
    for one, other, before in zip(got, want, start, strict=True):
        assert (one - other).norm() <= 1e-5 * (other - before).norm()
    for delta, groups in packing.seen:
        assert delta.shape[0] == 1
        for number in range(3):
            assert float(delta[groups == number].norm()) == pytest.approx(EPSILON, rel=1e-9)
    for row in packing.state.log_history[:-1]:
        assert row["adv_norm"] == pytest.approx(EPSILON, rel=1e-6)


def test_a_radius_is_measured_by_document() -> None:
    model = llama().double()
    model.config.use_cache = False
    task = Task(
        fastadv.FGM, {"scope": "sample"}, lambda m, batch: m(**batch), lambda batch: batch.get("attention_mask")
    )
    packing, rows = DataCollatorWithFlattening(return_tensors="pt")(documents()), padded(documents())
    rows["labels"][:, 0] = -100  # which is nobody's label in any case
    got, want = (task.attacked(model, [batch], EPSILON) for batch in (packing, rows))
    assert got == pytest.approx(want, rel=1e-5)
    assert want > 1.01 * task.attacked(model, [rows], 0.01)


@pytest.mark.parametrize("given", ["return_position_ids", "return_seq_idx", "return_flash_attn_kwargs"])
def test_each_form_of_the_collator_is_read(given: str) -> None:
    options = {"return_position_ids": False, given: True}
    batch = DataCollatorWithFlattening(return_tensors="pt", **options)(documents())
    want = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).unsqueeze(0)
    groups = packed.from_batch(batch)
    assert groups is not None
    assert torch.equal(groups.long(), want)
    assert packed.from_batch({**batch, "attention_mask": torch.ones_like(want)}) is None


def test_positions_that_begin_again() -> None:
    places = torch.tensor([[0, 1, 2, 0, 0, 1, 0], [3, 4, 5, 6, 7, 8, 9]])
    assert packed.from_position_ids(places).tolist() == [[0, 0, 0, 1, 2, 2, 3], [0] * 7]
    assert packed.from_position_ids(places[:, :0]).shape == (2, 0)
    assert packed.from_position_ids(places.int() + 2)[0].tolist() == [0, 0, 0, 1, 2, 2, 3]


def test_running_sums_of_lengths() -> None:
    """Through the rows; behind the last there is no document."""
    got = packed.from_cu_seq_lens(torch.tensor([0, 3, 3, 4, 6], dtype=torch.int32), (2, 4))
    assert got.tolist() == [[0, 0, 0, 2], [3, 3, -1, -1]]


def test_a_batch_that_tells_nothing() -> None:
    ids = torch.ones(2, 4, dtype=torch.int64)
    assert packed.from_batch({"input_ids": ids}) is None
    assert packed.from_batch({"input_ids": ids, "position_ids": torch.arange(4)[None]}) is None  # for all rows alike
    assert packed.from_batch({"pixel_values": torch.ones(2, 3, 4, 4), "position_ids": None}) is None


@pytest.mark.parametrize(
    ("call", "error", "phrase"),
    [
        (lambda: packed.from_position_ids(torch.ones(2, 3)), TypeError, "integers"),
        (lambda: packed.from_position_ids(torch.ones(3, 2, 3).long()), ValueError, r"\[B, T\]"),
        (lambda: packed.from_cu_seq_lens(torch.ones(2), (1, 2)), TypeError, "integers"),
        (lambda: packed.from_cu_seq_lens(torch.ones(2, 2).long(), (1, 2)), ValueError, r"documents \+ 1"),
    ],
)
def test_refuses(call: Any, error: type[Exception], phrase: str) -> None:
    with pytest.raises(error, match=phrase):
        call()
