"""Perturbations that outlive their step: one buffer for each call of the embedding, by batch slot and position."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from fastadv.engine.lookup import Lookup

Key = tuple[int, int]  # which micro-batch of an optimizer step, which call of the embedding

SLOTS = re.compile(r"slots\.(?P<rank>rank\d+\.)?(?P<micro>\d+)\.(?P<call>\d+)")

CAPTURED = (
    "this batch is larger than any before, so that the perturbation carried from batch to batch would need more memory "
    "than the captured graph knows. Run the largest batch (rows and length) once before capture()"
)


class CarryBuffer:
    """The perturbation at each batch slot. A smaller batch finds its first rows, a longer one zeros at the end."""

    def __init__(self) -> None:
        self.buffers: dict[Key, Tensor] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self.buffers

    def clear(self) -> None:
        """The next batch has nothing to do with what is here."""
        self.buffers.clear()

    def at(self, key: Key, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The perturbation at the slots of a batch of that shape; zeros where there is none yet."""
        kept = self.buffers.get(key)
        if kept is None:
            return torch.zeros(shape, device=device)
        if kept.shape == shape:
            return kept
        found = kept.new_zeros(shape)
        both = _overlap(kept, shape)
        found[both] = kept[both]
        return found

    @torch.no_grad()
    def keep(self, key: Key, lookup: Lookup) -> None:
        """Leave a perturbation at its slots. Where a mask says that nothing is, what was there stays."""
        delta = lookup.delta.detach()
        slots = self._room(key, delta)[_overlap(delta, delta.shape)]
        slots.copy_(delta if lookup.mask is None else torch.where(lookup.mask.unsqueeze(-1), delta, slots))

    def _room(self, key: Key, delta: Tensor) -> Tensor:
        """A buffer that has all slots of `delta`, and what earlier batches left."""
        kept = self.buffers.get(key)
        if kept is not None and all(have >= need for have, need in zip(kept.shape, delta.shape, strict=True)):
            return kept
        if _captured(delta.device):
            raise RuntimeError(CAPTURED)
        larger = delta.shape if kept is None else map(max, kept.shape, delta.shape)
        self.buffers[key] = self.at(key, tuple(larger), delta.device).to(delta.dtype)
        return self.buffers[key]

    def remember(self) -> Callable[[], None]:
        """Return what puts everything back: the same buffers, with what is in them now."""
        buffers = dict(self.buffers)
        copies = {} if any(_captured(buffer.device) for buffer in buffers.values()) else self.copies()

        @torch.no_grad()
        def put_back() -> None:
            self.buffers = dict(buffers)
            for key, copy in copies.items():
                buffers[key].copy_(copy)

        return put_back

    def copies(self) -> dict[Key, Tensor]:
        """Of all buffers, for `take_back`."""
        return {key: buffer.clone() for key, buffer in self.buffers.items()}

    @torch.no_grad()
    def take_back(self, copies: Mapping[Key, Tensor]) -> None:
        """What was there, in the same memory; where nothing was, zeros."""
        for key, buffer in self.buffers.items():
            buffer.zero_()
            if key in copies:
                buffer[_overlap(copies[key], buffer.shape)] = copies[key]

    def state_dict(self) -> dict[str, Tensor]:
        """Every buffer, by name; where several processes train, by rank too: each has slots of its own.

        torch.distributed.checkpoint takes tensors of one name for one tensor.
        """
        return {f"slots.{_rank()}{micro}.{call}": buffer for (micro, call), buffer in self.buffers.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Take back what `state_dict` gave: of all ranks, or of this one; without a rank, as one process saves it."""
        self.buffers = {}
        for name, buffer in state.items():
            place = SLOTS.fullmatch(name)
            if place is not None and place["rank"] in (None, _rank()):
                self.buffers[int(place["micro"]), int(place["call"])] = buffer.to(device, copy=True)


def _rank() -> str:
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return f"rank{dist.get_rank()}." if several else ""


def _captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _overlap(kept: Tensor, shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, min(have, want)) for have, want in zip(kept.shape, shape, strict=True))
