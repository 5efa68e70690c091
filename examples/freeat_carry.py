"""Does the perturbation that one batch left say anything about the next? FreeAT's `carry`, measured.

Trains MiniLM on the default data with `FreeAT(carry=True)`. Before each replay the loss is taken without dropout: as it
is, at the perturbation that lies in the slots, at the same numbers in random order, and at one step of the batch's own.
Prints by how much each raises the loss, and how many of the perturbation's signs agree with the gradient's (by chance:
half). In replay 1 it is the last batch that left what lies there. `--output` keeps the numbers as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, get_linear_schedule_with_warmup

import fastadv
from fastadv.train.job import Settings, prepare
from fastadv.train.tokens import LengthGrouped

EPSILON, REPLAYS, RATE = 0.001, 4, 1e-4


class Meter:
    """The loss of the model without dropout, somewhere near a batch."""

    def __init__(self, model: Any) -> None:
        self.model, self.embedding = model, model.get_input_embeddings()
        self.rows: dict[int, list[dict[str, float]]] = defaultdict(list)  # by replay

    def look(self, replay: int, batch: dict[str, Tensor], lies: Tensor) -> None:
        """`lies`: [B, T, D], what the slots hold for this batch."""
        self.model.eval()
        keep = batch["attention_mask"].unsqueeze(-1)
        zero = torch.zeros_like(lies, requires_grad=True)
        clean = self.loss(batch, zero)
        (gradient,) = torch.autograd.grad(clean, zero)
        lies = lies * keep
        moved = lies.ne(0) & gradient.ne(0)
        shuffled = lies.clone()
        shuffled[moved] = lies[moved][torch.randperm(int(moved.sum()))]
        with torch.no_grad():
            row = {
                "clean loss": float(clean),
                "what lies there": float(self.loss(batch, lies) - clean),
                "in random order": float(self.loss(batch, shuffled) - clean),
                "one step of its own": float(self.loss(batch, EPSILON * gradient.sign() * keep) - clean),
                "signs that agree": float((lies[moved] * gradient[moved] > 0).float().mean()) if moved.any() else 0.5,
            }
        self.rows[replay].append(row)
        self.model.train()

    def loss(self, batch: dict[str, Tensor], delta: Tensor) -> Tensor:
        handle = self.embedding.register_forward_hook(lambda *call: call[-1] + delta)
        try:
            found: Tensor = self.model(**batch).loss
        finally:
            handle.remove()
        return found

    def means(self) -> dict[str, dict[str, float]]:
        """Over the batches, for each replay."""
        return {
            str(replay): {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
            for replay, rows in sorted(self.rows.items())
        }


def measure(batches: int, seed: int) -> dict[str, dict[str, float]]:
    """Train on `batches` batches, `REPLAYS` times each; the first one, whose slots are empty, is not counted."""
    job = prepare(Settings(method="freeat"))
    model = job.build(seed).train()
    loader = DataLoader(
        job.train,
        32,
        sampler=LengthGrouped(job.train.lengths(), 32, seed),
        collate_fn=DataCollatorWithPadding(job.tokenizer),
    )
    adv, meter = fastadv.FreeAT(model, epsilon=EPSILON, replays=REPLAYS), Meter(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    steps = batches * REPLAYS
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    for step, inputs in enumerate(fastadv.repeat(loader, REPLAYS)):
        if step == steps:
            break
        batch = dict(inputs)
        if step >= REPLAYS:
            shape = (*batch["input_ids"].shape, model.get_input_embeddings().embedding_dim)
            meter.look(step % REPLAYS + 1, batch, adv.slots.at((0, 0), shape, batch["input_ids"].device))
        adv.backward(lambda: model(**batch).loss, mask=batch["attention_mask"])  # noqa: B023
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return meter.means()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    means = measure(arguments.batches, arguments.seed)
    names = list(next(iter(means.values())))
    print("replay  " + "  ".join(names))
    for replay, row in means.items():
        print(f"{replay:>6}  " + "  ".join(f"{row[name]:{len(name)}.4f}" for name in names))
    if arguments.output:
        settings = {"epsilon": EPSILON, "replays": REPLAYS, "batches": arguments.batches, "seed": arguments.seed}
        kept = {**settings, "means": means}
        arguments.output.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
