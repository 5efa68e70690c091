"""What a step's forward passes see: the perturbation of each call of the embedding, in call order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Size, Tensor, nn

from fastadv.engine.call import Call, is_same, new_delta
from fastadv.engine.embedding import is_plain_lookup
from fastadv.engine.groups import group
from fastadv.ops import Segments

OTHER_BATCH = "the closure must run the same batch in every pass of a step, but the embedding's calls differ"

Masks = Tensor | Sequence[Tensor | None] | None


class Started(Protocol):
    """Fills a new call's perturbation with the start that the step asks for."""

    def __call__(self, call: Call) -> None: ...


class Site:
    """The state that the interceptions read. Idle, it costs them one attribute."""

    def __init__(self, modules: Sequence[nn.Module], fused: bool | None, by_row: bool) -> None:
        self.modules = modules
        self.fused = fused
        self.by_row = by_row  # plain lookups are moved by the rows of a table, and need no delta of their own
        self.padding: list[int | None] = [getattr(module, "padding_idx", None) for module in modules]
        self.live = False
        self.settled = False  # a pass of this step has shown how often the embedding is called, and on what
        self.searching = True  # a pass that records; False where a found perturbation is only applied
        self.probing = False  # a pass that wants no table's gradient
        self.own: dict[int, Tensor] = {}  # the tables, by module, whose gradient this pass need not leave to autograd
        self.recomputing = False
        self.held = False  # an earlier pass's graph waits for its backward
        self.groups: Segments | None = None
        self.calls: list[Call] = []
        self.cursor = 0
        self.masks: Masks = None
        self.started: Started | None = None
        self.without_grad = False

    # Between passes

    def begin(self, masks: Masks) -> None:
        """A new step, with no perturbation.

        The last step's buffers serve again where the masks have their shape. Where there is none yet and the shape is
        known, one is made now: a compiled model must find it ready, or its graph would break where one is made.
        """
        if not all(mask is None or isinstance(mask, Tensor) for mask in _each(masks)):
            raise TypeError(f"mask must be a tensor, or a sequence of tensors and None, not {masks!r}")
        self.masks, self.started, self.settled, self.groups = masks, None, False, None
        for index, call in enumerate(self.calls):
            mask = self.given_mask(index)
            if mask is not None and mask.shape != call.delta.shape[:-1]:
                del self.calls[index:]
                break
            call.mask = None if mask is None else mask.bool()
        first, module = self.given_mask(0), self.modules[0] if self.modules else None
        if not self.calls and first is not None and isinstance(module, nn.Embedding):
            body = not (self.by_row and is_plain_lookup(module))
            delta = new_delta((*first.shape, module.embedding_dim), module.weight.dtype, module.weight.device, body)
            self.calls.append(Call(delta, first.bool(), body=body))
        for call in self.calls:
            call.clear()

    def idle(self) -> None:
        """No forward is perturbed."""
        self.live = self.recomputing = False
        self.searching = True
        self.probing, self.own = False, {}

    def begin_pass(self) -> None:
        """The next forward's calls are counted from the first."""
        self.cursor, self.without_grad, self.live = 0, False, True

    def end_forward(self) -> None:
        """After the first pass: forget calls that it did not make, and find the masks that follow from ids."""
        if self.settled:
            if self.cursor != len(self.calls):
                raise RuntimeError(f"{OTHER_BATCH}: {self.cursor} calls, and before {len(self.calls)}")
            return
        self.settled = True
        del self.calls[self.cursor :]
        for call in self.calls:
            if call.mask is None and call.ids is not None:
                call.mask = self._padding_mask(call.ids, call.module)

    def grouped(self) -> Segments:
        """Where equal ids lie, over all calls: one sort per batch, shared by all of its steps."""
        if self.groups is None:
            self.groups = group(self.calls, self.modules, self.fused)
        return self.groups

    def mask_of(self, shape: Size) -> Tensor | None:
        """The mask of answers of that shape, one per token; None for one per sample. An output's mask comes last."""
        given = self.masks if isinstance(self.masks, (list, tuple)) else [self.masks]
        masks = [*given, *(call.mask for call in self.calls)]
        fitting = [mask for mask in masks if mask is not None and mask.dim() > 1 and mask.shape == shape]
        return fitting[-1] if fitting else None

    def masks_follow_ids(self) -> bool:
        """Whether the masks are known only when the ids are."""
        return self.given_mask(0) is None and any(index is not None for index in self.padding)

    def given_mask(self, index: int) -> Tensor | None:
        """The mask that the user gave for call `index`."""
        if self.masks is None or isinstance(self.masks, Tensor):
            return self.masks
        return self.masks[index] if index < len(self.masks) else None

    def _padding_mask(self, ids: Tensor, module: int) -> Tensor | None:
        padding = self.padding[module]
        return None if padding is None else ids != padding

    # Inside a forward

    def detaches(self, call: Call, table: Tensor) -> bool:
        """Whether autograd need not compute the gradient that this call has for `table`."""
        return self.probing or (call.table is table and self.own.get(call.module) is table)

    def enter(self, like: Tensor, shape: Size, ids: Tensor | None, module: int, plain: bool = False) -> Call | None:
        """The call that is happening, or None where it is left alone.

        Its result has `shape`, and dtype and device of `like`; `plain`: it is the lookup W[ids] and nothing else.
        """
        if self.recomputing:
            return self._again(shape, ids)
        if self.searching and not torch.is_grad_enabled():
            self.without_grad = True
            return None
        index, body = self._next(), not (plain and self.by_row)
        if index >= len(self.calls) or not self.calls[index].fits(shape, like.dtype, like.device, body):
            self._new(index, shape, like, ids, module, body)
        call = self.calls[index]
        if self.searching:
            call.ids, call.module = ids, module
            call.table = like if plain and ids is not None and call.looks_up(ids) else None
        return call

    def _next(self) -> int:
        index = self.cursor
        self.cursor = index + 1
        if not self.searching and self.calls:
            return index % len(self.calls)
        return index

    def _again(self, shape: Size, ids: Tensor | None) -> Call:
        """The call that a checkpoint recomputes: the same ids, or else the only one of that shape."""
        if self.held:
            raise RuntimeError(
                "activation checkpointing recomputes the perturbed module after the perturbation has moved on, and "
                "this method goes back through the passes before that: keep it outside of checkpointed segments"
            )
        alike = [call for call in self.calls[: self.cursor] if call.delta.shape == shape]
        same = [call for call in alike if ids is not None and call.ids is not None and is_same(call.ids, ids)]
        if len(same or alike) != 1:
            raise RuntimeError(
                "activation checkpointing recomputes an embedding, and which of its calls cannot be told "
                f"({len(alike)} calls of shape {tuple(shape)} were seen in the forward pass). Use "
                "checkpoint(..., use_reentrant=False), and keep the embedding outside of checkpointed segments."
            )
        return (same or alike)[0]

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def _new(self, index: int, shape: Size, like: Tensor, ids: Tensor | None, module: int, body: bool) -> None:
        if not self.searching:
            raise RuntimeError(
                f"no perturbation was found for an embedding call of shape {tuple(shape)}: inside `perturbed`, run the "
                "model on the batch that the closure ran it on"
            )
        if self.settled:
            before = ", ".join(str(tuple(call.delta.shape)) for call in self.calls)
            raise RuntimeError(f"{OTHER_BATCH}: {tuple(shape)} in call {index}, and before {before}")
        mask = self._mask(index, shape, ids, module)
        call = Call(new_delta(shape, like.dtype, like.device, body), mask, ids, module, body=body)
        del self.calls[index:]
        self.calls.append(call)
        if self.started is not None:
            self.started(call)

    def _mask(self, index: int, shape: Size, ids: Tensor | None, module: int) -> Tensor | None:
        mask = self.given_mask(index)
        if mask is not None:
            if mask.shape != shape[:-1]:
                raise ValueError(
                    f"mask has shape {tuple(mask.shape)}, but the embedding returned {tuple(shape)}: it must be "
                    f"{tuple(shape[:-1])}. Where the embedding is called several times, give one mask (or None) a call."
                )
            return mask.bool()
        return None if ids is None else self._padding_mask(ids, module)


def _each(masks: object) -> Sequence[object]:
    return masks if isinstance(masks, (list, tuple)) else [masks]
