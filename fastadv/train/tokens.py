"""Tokenise samples for the Trainer, and draw batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset, Sampler

from fastadv.train.data import Sample
from fastadv.train.split import shuffler


class Tokens(Dataset[dict[str, Any]]):
    """Tokenise samples for the Trainer; the collator pads, batch by batch."""

    def __init__(self, samples: Sequence[Sample], tokenizer: Any, max_length: int) -> None:
        texts = [sample.text for sample in samples]
        encoded = tokenizer(texts, truncation=True, max_length=max_length)
        self.items = [
            {"input_ids": ids, "attention_mask": mask, "labels": sample.label}
            for sample, ids, mask in zip(samples, encoded["input_ids"], encoded["attention_mask"], strict=True)
        ]
        self.cut = _cut(texts, self.lengths(), tokenizer, max_length)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    def lengths(self) -> list[int]:
        """Count the tokens of each sample."""
        return [len(item["input_ids"]) for item in self.items]


def _cut(texts: Sequence[str], lengths: Sequence[int], tokenizer: Any, max_length: int) -> list[int]:
    """Count the tokens that truncation takes away from each text that is longer than `max_length`."""
    full = [text for text, length in zip(texts, lengths, strict=True) if length >= max_length]
    if not full:
        return []
    whole = (len(ids) for ids in tokenizer(full, return_attention_mask=False)["input_ids"])
    return [length - max_length for length in whole if length > max_length]


class LengthGrouped(Sampler[int]):
    """Draw batches of similar length, in random order.

    The order follows from the seed and the epoch alone: two runs see the same batches whatever else they draw from
    torch's generator, and a resumed one continues where it stopped.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, pool: int = 50) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.pool = pool
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; the data loader calls this at its beginning."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = shuffler(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        size = self.batch_size
        pools = [order[start : start + size * self.pool] for start in range(0, len(order), size * self.pool)]
        batches: list[list[int]] = []
        for pool in pools:
            pool.sort(key=self.lengths.__getitem__)
            batches += [pool[start : start + size] for start in range(0, len(pool), size)]
        short = [batch for batch in batches if len(batch) < size]
        batches = [batch for batch in batches if len(batch) == size]
        generator.shuffle(batches)
        return iter([index for batch in batches + short for index in batch])
