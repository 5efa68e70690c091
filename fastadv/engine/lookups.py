"""The calls of the perturbed modules in one step, in call order, and where equal ids lie in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Size, Tensor, nn

from fastadv.arguments.runs import Runs
from fastadv.engine.lookup import Lookup, new_delta
from fastadv.engine.model.find import is_plain_lookup
from fastadv.engine.perturb.documents import Documents, Groups
from fastadv.engine.perturb.masks import MaskCheck
from fastadv.engine.perturb.segments import group
from fastadv.engine.perturb.where import Texts, Where
from fastadv.engine.profile import span
from fastadv.ops import Segments

OTHER_BATCH = "the closure must run the same batch in every pass of a step, but the embedding's calls differ"

Masks = Tensor | Sequence[Tensor | None] | None


class Places(NamedTuple):
    """Where a model is perturbed: the same for all of its steps."""

    modules: Sequence[nn.Module]
    names: Sequence[str]
    padding: Sequence[int | None]  # the id of padding, by module; None: no id is
    by_row: bool  # plain lookups are moved by the rows of a table, so they need no delta of their own
    fused: bool | None
    check: MaskCheck
    clamps: bool = False  # perturbed activations stay in the range of the clean batch's


class Lookups:
    """One step's lookups. The first pass shows how many there are; before it, buffers are lent by an earlier step.

    Args:
        places: the perturbed modules.
        masks: of the user: one for every call, or a sequence of one (or None) a call.
        groups: of the user, likewise: the documents of packed rows.
        lent: an earlier step's lookups, whose memory serves again where the masks have their shape.
        under_at: whether the closure is taken to use `at(mask)`: then a lookup is a site, for all forwards together.
    """

    def __init__(
        self, places: Places, masks: Masks, groups: Groups, lent: Sequence[Lookup], under_at: bool = False
    ) -> None:
        for name, given in (("mask", masks), ("groups", groups)):
            if not all(one is None or isinstance(one, Tensor) for one in _each(given)):
                raise TypeError(f"{name} must be a tensor, or a sequence of tensors and None, not {given!r}")
        for mask in _each(masks):
            if isinstance(mask, Tensor):
                places.check.values(mask)
        self.places = places
        self.masks = masks
        self.documents = [
            Documents.read(one, places.check) if isinstance(one, Tensor) else None for one in _each(groups)
        ]
        self._shared = groups is None or isinstance(groups, Tensor)  # by all calls
        self.items: list[Lookup] = []
        self.settled = False  # a pass has shown how often the modules are called, and on what
        self._segments: Segments | None = None
        self.under_at, self.lent = under_at, list(lent) if under_at else []
        self.texts: Texts | None = None
        if not under_at:
            self._reuse(lent)
        if not under_at and not self.items:
            self._prepare()

    def __iter__(self) -> Iterator[Lookup]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def _reuse(self, lent: Sequence[Lookup]) -> None:
        for index, old in enumerate(lent):
            mask = self._mask_before_ids(index)
            if mask is not None and mask.shape != old.delta.shape[:-1]:
                break
            documents = self._documents_of(index)
            lookup = Lookup(old.delta, mask, documents, materialised=old.materialised, scratch=old.scratch)
            lookup.moments = old.moments
            lookup.delta.grad = None
            lookup.zero_()
            self.items.append(lookup)

    def _prepare(self) -> None:
        """Make the first delta now where the mask gives its shape: a compiled graph would break on making it."""
        mask, module = self._mask_before_ids(0), self.places.modules[0] if self.places.modules else None
        if mask is None or not isinstance(module, nn.Embedding):
            return
        materialised = not (self.places.by_row and is_plain_lookup(module))
        shape = (*mask.shape, module.embedding_dim)
        delta = new_delta(shape, module.weight.dtype, module.weight.device, materialised)
        self.items.append(Lookup(delta, mask, self._documents_of(0), materialised=materialised))

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def add(self, index: int, shape: Size, like: Tensor, ids: Tensor | None, module: int, materialised: bool) -> Lookup:
        """The lookup of a call that is seen for the first time; later ones are forgotten."""
        if self.texts is not None:
            return self._site(shape, like, module)
        if self.settled:
            before = ", ".join(str(tuple(lookup.delta.shape)) for lookup in self.items)
            raise RuntimeError(f"{OTHER_BATCH}: {tuple(shape)} in call {index}, and before {before}")
        mask = self._mask(index, shape, ids, module)
        delta = new_delta(shape, like.dtype, like.device, materialised)
        lookup = Lookup(delta, mask, self._documents_of(index), ids, module, materialised=materialised)
        del self.items[index:]
        self.items.append(lookup)
        return lookup

    # Under `at`

    def turn(self, under_at: bool) -> None:
        """Begin again: the closure uses `at(mask)`, or does not, other than was taken."""
        self.under_at, self.lent, self.texts = under_at, [], None
        self.items.clear()

    def where(self, mask: Tensor, device: torch.device) -> Where:
        """The positions of the forwards that follow, whose n-th vectors are those of the step's other forwards."""
        if self.texts is None:
            self.texts = Texts(mask, device, self.places.check)
        return self.texts.where(mask)

    def site(self, module: int) -> Lookup | None:
        """The perturbation of a site, where it is there."""
        return next((lookup for lookup in self.items if lookup.module == module), None)

    def _site(self, shape: Size, like: Tensor, module: int) -> Lookup:
        """A new one, in the memory of an earlier step's where that fits."""
        assert self.texts is not None
        old = next((one for one in self.lent if one.module == module), None)
        if old is not None and old.fits(shape, like.dtype, like.device, materialised=True):
            delta = old.delta
            delta.grad = None
        else:
            delta = new_delta(shape, like.dtype, like.device, materialised=True)
        lookup = Lookup(delta, self.texts.there.to(like.device), module=module)
        lookup.moments = None if old is None or delta is not old.delta else old.moments
        lookup.zero_()
        self.items[:] = [*(one for one in self.items if one.module != module), lookup]
        return lookup

    def settle(self, calls: int) -> None:
        """After a forward that made so many calls: in the first pass keep these, later expect as many.

        Raises:
            RuntimeError: a later pass made another number of calls.
        """
        if self.settled:
            if calls != len(self.items):
                raise RuntimeError(f"{OTHER_BATCH}: {calls} calls, and before {len(self.items)}")
            return
        self.settled = True
        del self.items[calls:]
        for index, lookup in enumerate(self.items):
            if lookup.ids is None:
                continue
            padding = self.places.padding[lookup.module]
            if self.given_mask(index) is None:
                lookup.mask = _both(lookup.mask, self._padding_mask(lookup.ids, lookup.module))
            elif padding is not None and lookup.mask is not None and lookup.mask.shape == lookup.ids.shape:
                self.places.check.padding(lookup.mask, lookup.ids, padding)

    def renew(self) -> None:
        """Perturbations of zero in other memory: a graph that waits may hold what was there."""
        for lookup in self.items:
            lookup.delta = torch.zeros_like(lookup.delta, requires_grad=True)

    def segments(self) -> Segments:
        """Where equal ids lie, over all calls: one sort per batch, shared by all ascents."""
        if self._segments is None:
            with span("segments"):
                self._segments = group(self.items, self.places.modules, self.places.fused)
        return self._segments

    # Masks

    def mask_of(self, shape: Size) -> Tensor | None:
        """The mask of logits of that shape, one per token; None for one per sample. The outputs' mask comes last."""
        if self.under_at:
            return None  # of the vectors, not of a text's positions
        masks = [*_each(self.masks), *(lookup.mask for lookup in self.items)]
        fitting = [mask for mask in masks if isinstance(mask, Tensor) and mask.dim() > 1 and mask.shape == shape]
        return fitting[-1] if fitting else None

    def masks_follow_ids(self) -> bool:
        """Whether the masks are known only when the ids are."""
        return self.given_mask(0) is None and any(index is not None for index in self.places.padding)

    def given_mask(self, index: int) -> Tensor | None:
        """The user's mask for call `index`."""
        if self.masks is None or isinstance(self.masks, Tensor):
            return self.masks
        return self.masks[index] if index < len(self.masks) else None

    def _documents_of(self, index: int) -> Runs | None:
        documents = self._given_documents(index)
        return None if documents is None else documents.runs

    def _given_documents(self, index: int) -> Documents | None:
        index = 0 if self._shared else index
        return self.documents[index] if index < len(self.documents) else None

    def _mask_before_ids(self, index: int) -> Tensor | None:
        """What is known of the mask of call `index` without its ids: the user's, where a document is."""
        mask, documents = self.given_mask(index), self._given_documents(index)
        if mask is None or documents is None:
            return documents.inside if documents is not None else None if mask is None else mask.bool()
        if mask.shape != documents.inside.shape:
            shapes = f"{tuple(mask.shape)} and {tuple(documents.inside.shape)}"
            raise ValueError(f"mask and groups are of the same positions, but have shapes {shapes}")
        both = mask.bool() & documents.inside
        self.places.check.within(both, mask)
        return both

    def _mask(self, index: int, shape: Size, ids: Tensor | None, module: int) -> Tensor | None:
        mask = self._mask_before_ids(index)
        if mask is not None and mask.shape != shape[:-1]:
            name = "groups" if self.given_mask(index) is None else "mask"
            raise ValueError(
                f"{name} has shape {tuple(mask.shape)}, but the embedding returned {tuple(shape)}: it must be "
                f"{tuple(shape[:-1])}. Where the embedding is called several times, give one {name} (or None) a call."
            )
        if self.given_mask(index) is not None or ids is None:
            return mask
        return _both(mask, self._padding_mask(ids, module))

    def _padding_mask(self, ids: Tensor, module: int) -> Tensor | None:
        padding = self.places.padding[module]
        return None if padding is None else ids != padding


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one & other


def _each(masks: object) -> Sequence[object]:
    return masks if isinstance(masks, (list, tuple)) else [masks]
