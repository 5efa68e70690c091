"""The lookup that an ascent does for the next forward."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Lookup(NamedTuple):
    """`embedded` <- weight[ids] + delta, or weight[ids] + delta[slot]."""

    weight: Tensor
    ids: Tensor
    slot: Tensor | None
    embedded: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of `signatures`, without a slot that is None."""
        weight, ids, slot, embedded = self
        return (weight, ids, embedded) if slot is None else (weight, ids, embedded, slot)


def lookup_of(
    weight: Tensor | None = None, ids: Tensor | None = None, slot: Tensor | None = None, embedded: Tensor | None = None
) -> Lookup | None:
    """The lookup, or None where nothing of it is given.

    Raises:
        ValueError: a part is missing.
    """
    if weight is None and ids is None and slot is None and embedded is None:
        return None
    if weight is None or ids is None or embedded is None:
        raise ValueError("weight, ids and embedded belong together: give all three, or none of them and no slot")
    return Lookup(weight, ids, slot, embedded)
