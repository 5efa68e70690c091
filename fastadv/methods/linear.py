"""What a first-order prediction says of each sample, or of each document of packed rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.arguments.runs import Runs
from fastadv.engine.safety import rng
from fastadv.engine.step import Step


def along(step: Step, deltas: list[Tensor], slope: list[Tensor], losses: Tensor) -> Tensor:
    """Delta . g of each sample, or of all of them where there is one loss."""
    products = [delta * g for delta, g in zip(deltas, slope, strict=True)]
    if len(losses) == 1:
        return torch.stack([product.sum() for product in products]).sum().reshape(1)
    by_sample = zip(products, step.lookups, strict=True)
    return torch.stack([_of_samples(product, lookup.documents, len(losses)) for product, lookup in by_sample]).sum(0)


def _of_samples(products: Tensor, documents: Runs | None, count: int) -> Tensor:
    """The sum over each sample; in packed rows samples are documents, in their order."""
    if documents is None:
        return products.flatten(1).sum(1)
    rows = products.flatten(0, -2).sum(1)
    return rows.new_zeros(len(documents.starts) - 1).index_add(0, documents.of, rows)[:count]


def check_samples(step: Step, losses: Tensor) -> None:
    """Raises ValueError where rows are packed and there is a loss for something else than each document, or for all."""
    for lookup in step.lookups:
        if lookup.documents is None or len(losses) == 1 or rng.capturing():
            continue
        count = lookup.documents.occupied()
        if count != len(losses):
            raise ValueError(
                f"LLR takes one loss, or one of each sample, and groups hold {count} documents, but there are "
                f"{len(losses)} losses: return one of each document, row after row"
            )
