"""One call of a perturbed module in a step: its perturbation, its gradient, and what the next forward can reuse."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from fastadv.arguments.runs import Runs


@dataclass(slots=True)
class Lookup:
    """One call of a perturbed module, the same in every pass of a step."""

    delta: Tensor  # [B, T, D], a leaf that requires grad; float32, or float64 for a float64 model
    mask: Tensor | None  # [B, T] bool, True where a token is; None: everywhere
    documents: Runs | None = None  # of its positions, where rows are packed; None: a row is a sample
    ids: Tensor | None = None  # [B, T], where the module is an embedding table
    module: int = 0  # index of the module among the perturbed ones
    table: Tensor | None = None  # its weight, where the call is a plain lookup of the step's own ids
    first: FirstIds | None = None  # the ids of the step's first pass
    checked: bool = False  # no id of the first pass is out of range
    materialised: bool = True  # False: delta is an expanded zero, used only as an autograd leaf
    rows: Tensor | None = None  # r [R, D], added at slot [B, T] where delta is not materialised; None: nothing
    slot: Tensor | None = None
    clean: Tensor | None = None  # what the last pass added delta to, where that is clamped and no plain lookup
    grad: Tensor | None = None  # dL/dE of the last pass, until an ascent consumes it
    full_grads: list[Tensor] = field(default_factory=list)  # dL/dE of full passes, for the table's gradient
    ready: Ready | None = None  # the next forward's embedding, written by an ascent
    scratch: Tensor | None = None  # the memory it is written to
    moments: Tensor | None = None  # [2 or 1, *delta.shape] of the search's gradients, where it steps by them

    def added(self) -> Tensor | None:
        """The tensor that moves the call's result."""
        return self.delta if self.materialised else self.rows

    def zero_(self) -> None:
        """Drop the perturbation; keep the memory."""
        self.rows = self.slot = self.ready = None
        if self.materialised:
            with torch.no_grad():
                self.delta.zero_()

    def fits(self, shape: Size, dtype: torch.dtype, device: torch.device, materialised: bool) -> bool:
        """Whether these buffers can serve such a result."""
        delta = self.delta
        same = delta.shape == shape and delta.dtype == perturbation_dtype(dtype) and delta.device == device
        return same and self.materialised == materialised

    def looks_up(self, ids: Tensor) -> bool:
        """Whether these are the ids of the step's first pass; in the first pass they are."""
        if self.first is None:
            self.first = FirstIds(ids.clone(), ids, _version(ids))
        return self.first.are(ids)

    def next_lookup(self) -> dict[str, Any]:
        """Arguments with which an ascent also writes the next forward's embedding; none if this is no plain lookup.

        It writes into this call's own memory, unless another tensor still holds that.
        """
        self.ready = None
        if self.table is None or self.ids is None:
            return {}
        if self.scratch is None or self.scratch.dtype != self.table.dtype or not _is_ours(self.scratch):
            self.scratch = torch.empty(self.delta.shape, dtype=self.table.dtype, device=self.table.device)
        return {"weight": self.table, "ids": self.ids, "embedded": self.scratch}

    def wrote(self, lookup: dict[str, Any]) -> None:
        """Take note that the ascent has written it."""
        if lookup:
            self.ready = Ready.of(lookup["embedded"], lookup["ids"], lookup["weight"])


class FirstIds(NamedTuple):
    """The ids that a step is about, those of its first pass. A model that drops words sees others in the next."""

    copy: Tensor
    seen: Tensor
    version: int

    def are(self, ids: Tensor) -> bool:
        """Whether `ids` are these. On CUDA a comparison would synchronise: there, other memory means other ids."""
        if is_same(ids, self.seen) and _version(ids) == self.version:
            return True
        return ids.device.type == "cpu" and torch.equal(ids, self.copy)


class Ready(NamedTuple):
    """An embedding that is already written, with the versions of all it was computed from."""

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


def new_delta(shape: Size | tuple[int, ...], dtype: torch.dtype, device: torch.device, materialised: bool) -> Tensor:
    """A zero perturbation; one expanded zero where it is not materialised."""
    wide = perturbation_dtype(dtype)
    if not materialised:
        return torch.zeros((), dtype=wide, device=device).expand(shape).requires_grad_()
    return torch.zeros(shape, dtype=wide, device=device, requires_grad=True)


def perturbation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of perturbations: float32, or float64 for float64."""
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
    handle = tensor.untyped_storage()  # kept, since torch 2.6 does not count one that is gone, and later ones do
    return count is not None and count(handle._cdata) == 2  # the tensor and the handle
