"""Train a Trainer's model on unlabelled texts as well: a batch of them beside every batch of labelled ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer

from fastadv.methods import Method, StepResult

KEY = "unlabelled_batches"  # in a checkpoint


class Endless(Sampler[list[int]]):
    """The batches of this process, for ever: every epoch in an order of its own, which its number and the seed give.

    Args:
        count: the samples.
        batch_size: of each process.
        seed: of all orders.
        start: how many batches an earlier run has seen.
        process, processes: which of how many this is.
    """

    def __init__(self, count: int, batch_size: int, seed: int, start: int, process: int, processes: int) -> None:
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.process = process
        self.processes = processes

    def __iter__(self) -> Iterator[list[int]]:
        place = (self.start * self.processes + self.process) * self.batch_size
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        while True:
            batch = []
            for at in range(place, place + self.batch_size):
                if at // self.count != epoch:
                    epoch = at // self.count
                    order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed + epoch))
                batch.append(int(order[at % self.count]))
            yield batch
            place += self.processes * self.batch_size


class Unlabelled:
    """The unlabelled data of one training.

    Args:
        trainer: whose collator, batch size, workers and seed serve here too.
        dataset: samples as the labelled ones are; labels among them are not looked at.
        method: how to train on a batch without a loss.
        seen: how many batches an earlier run has seen.

    Raises:
        ValueError: the method cannot train on a batch without labels, or the data set has no length or is empty.
    """

    def __init__(self, trainer: Trainer, dataset: Any, method: Method, seen: int) -> None:
        if not method._takes_unlabelled:
            raise ValueError(
                f"unlabelled= needs a method that trains on batches without labels, and {type(method).__name__} needs "
                "a loss: use adversary=(fastadv.VAT, {...})"
            )
        if not hasattr(dataset, "__len__") or not len(dataset):
            raise ValueError("unlabelled= takes a data set with a length, of at least one sample")
        self.seen = seen
        self._trainer = trainer
        self._batches = iter(self._loader(dataset))

    def _loader(self, dataset: Any) -> DataLoader[Any]:
        trainer, args = self._trainer, self._trainer.args
        if hasattr(dataset, "column_names"):  # of the library `datasets`
            dataset, collate = trainer._remove_unused_columns(dataset, "unlabelled"), trainer.data_collator
        else:
            collate = trainer._get_collator_with_removed_columns(trainer.data_collator, "unlabelled")
        place = (self.seen, args.process_index, args.world_size)
        order = Endless(len(dataset), trainer._train_batch_size, args.data_seed or args.seed, *place)
        return DataLoader(
            dataset,
            batch_sampler=order,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            generator=torch.Generator(),  # so that the labelled batches and dropout draw as they do without
        )

    def train(self, method: Method, model: nn.Module, step: int) -> StepResult:
        """Train on the divergence of the next batch."""
        trainer: Any = self._trainer
        inputs = self._next()

        def closure() -> dict[str, Any]:
            with trainer.compute_loss_context_manager():
                output = model(**inputs)
            return {"logits": output["logits"] if isinstance(output, Mapping) else output.logits}

        mask, groups = trainer.adversarial_mask(inputs), trainer.adversarial_groups(inputs)
        return method.backward(closure, mask=mask, step=step, groups=groups)

    def _next(self) -> dict[str, Any]:
        """The next batch, on the device and without its labels."""
        self.seen += 1
        batch = self._trainer._prepare_inputs(next(self._batches))
        labels = ("labels", "label", *self._trainer.label_names)
        return {name: value for name, value in batch.items() if name not in labels}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {KEY: torch.tensor(self.seen)}
