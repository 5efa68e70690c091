"""One call of an embedding in a forward pass: what is added to its result, and what its gradient was."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor


@dataclass(slots=True)
class Call:
    """What a step knows of one call."""

    delta: Tensor  # [B, T, D], a leaf that requires grad; float32, or float64 for a float64 model
    mask: Tensor | None  # [B, T] bool, True where a token is; None: everywhere
    ids: Tensor | None = None  # [B, T], where the module is an embedding table
    module: int = 0  # which of the perturbed modules was called
    table: Tensor | None = None  # its weight, where the call is a plain lookup of the step's own ids
    first: FirstIds | None = None  # what a plain lookup looked up in the step's first pass
    body: bool = True  # whether delta has memory; in table scopes, a plain lookup's only marks where the gradient is
    rows: Tensor | None = None  # what is added instead where delta has no body: r [R, D] at slot [B, T]; None: nothing
    slot: Tensor | None = None
    grad: Tensor | None = None  # dL/dE of the last pass, until an ascent takes it
    held: list[Tensor] = field(default_factory=list)  # dL/dE of full passes, until they go to the table's gradient
    ready: Ready | None = None  # what an ascent has written for the next forward
    room: Tensor | None = None  # where it writes

    def added(self) -> Tensor | None:
        """What moves the call's result."""
        return self.delta if self.body else self.rows

    def to_zero(self) -> None:
        """No perturbation; the memory stays."""
        self.rows = self.slot = self.ready = None
        if self.body:
            with torch.no_grad():
                self.delta.zero_()

    def clear(self) -> None:
        """A new step: no perturbation and no gradient."""
        self.to_zero()
        self.first = None
        self.grad = self.delta.grad = None
        self.held.clear()

    def fits(self, shape: Size, dtype: torch.dtype, device: torch.device, body: bool) -> bool:
        """Whether this call's buffers can serve a result like that."""
        delta = self.delta
        same = delta.shape == shape and delta.dtype == perturbation_dtype(dtype) and delta.device == device
        return same and self.body == body

    def looks_up(self, ids: Tensor) -> bool:
        """Whether these are the ids of the step's first pass; if this is the first, they are."""
        if self.first is None:
            self.first = FirstIds(ids.clone(), ids, _version(ids))
        return self.first.are(ids)

    def next_lookup(self) -> dict[str, Any]:
        """What an ascent needs to write the next forward's embedding; nothing where this is no plain lookup.

        It writes into this call's own memory, unless somebody still holds that.
        """
        self.ready = None
        if self.table is None or self.ids is None:
            return {}
        if self.room is None or self.room.dtype != self.table.dtype or not _is_ours(self.room):
            self.room = torch.empty(self.delta.shape, dtype=self.table.dtype, device=self.table.device)
        return {"weight": self.table, "ids": self.ids, "embedded": self.room}

    def embedded(self, lookup: dict[str, Any]) -> None:
        """The ascent has written it."""
        if lookup:
            self.ready = Ready.of(lookup["embedded"], lookup["ids"], lookup["weight"])


class FirstIds(NamedTuple):
    """The ids that a step is about: those of its first pass. A model that drops words has others in the next."""

    copy: Tensor
    seen: Tensor
    version: int

    def are(self, ids: Tensor) -> bool:
        """Whether `ids` are these. On CUDA comparing would be a sync: there, other memory means other ids."""
        if is_same(ids, self.seen) and _version(ids) == self.version:
            return True
        return ids.device.type == "cpu" and torch.equal(ids, self.copy)


class Ready(NamedTuple):
    """An embedding that is already written, and what it was computed from."""

    embedded: Tensor
    ids: Tensor
    table: Tensor
    versions: tuple[int, ...]

    @staticmethod
    def of(embedded: Tensor, ids: Tensor, table: Tensor) -> Ready:
        """As of now."""
        return Ready(embedded, ids, table, _versions(embedded, ids, table))

    def serves(self, ids: Tensor, table: Tensor) -> bool:
        """Whether nothing has changed since it was written. (A table that is given other memory counts too.)"""
        return is_same(ids, self.ids) and table is self.table and _versions(self.embedded, ids, table) == self.versions


def new_delta(shape: Size | tuple[int, ...], dtype: torch.dtype, device: torch.device, body: bool = True) -> Tensor:
    """A zero perturbation; without a body it is one zero, expanded."""
    wide = perturbation_dtype(dtype)
    if not body:
        return torch.zeros((), dtype=wide, device=device).expand(shape).requires_grad_()
    return torch.zeros(shape, dtype=wide, device=device, requires_grad=True)


def perturbation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that perturbations have: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same view of the same memory."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _versions(embedded: Tensor, ids: Tensor, table: Tensor) -> tuple[int, ...]:
    return (_version(embedded), _version(ids), _version(table), table.data_ptr())


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _is_ours(tensor: Tensor) -> bool:
    """Whether no other tensor (a graph's, or one that the closure kept) shares this one's memory."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return count is not None and count(tensor.untyped_storage()._cdata) == 2  # the tensor, and the handle just made
