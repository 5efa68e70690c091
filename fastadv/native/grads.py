"""The launchers of csrc/grads.h."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fastadv import native
from fastadv.arguments.signatures import GRADS_PAIR
from fastadv.arguments.tensors import CODES
from fastadv.native.flags import destination
from fastadv.native.launch import require_device

# csrc/grads.h has the same codes.
COPY, ACCUMULATE, AVERAGE = 0, 1, 2


def grads_copy(into: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """into_i <- sources_i, bit for bit. Mutated: `into`; see `grads_accumulate`.

    Examples:
        >>> into = [torch.zeros(2)]
        >>> grads_copy(into, [torch.tensor([1.0, 2.0])])
        >>> into
        [tensor([1., 2.])]
    """
    _run("grads_copy", COPY, into, sources, 0.0)


def grads_accumulate(into: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
    r"""Add the weighted sources, in float32 (float64 for float64), rounded once.

    .. math:: \text{into}_i \leftarrow \text{into}_i + w \, s_i

    Mutated: `into`. The result does not depend on the number of threads.

    Args:
        into: contiguous tensors, float32, float64, bfloat16 or float16; share no memory with `sources`.
        sources: likewise, each of the shape and dtype of its fellow in `into`.
        weight: w.

    Raises:
        TypeError: dtypes that differ or are not served, or a tensor without plain memory.
        ValueError: lists of different lengths, shapes that differ, gaps, or a device that does not fit.
        RuntimeError: the extension is not there for this device.

    Examples:
        >>> into = [torch.ones(2), torch.zeros(1, dtype=torch.float64)]
        >>> grads_accumulate(into, [torch.tensor([1.0, 2.0]), torch.ones(1, dtype=torch.float64)], 0.5)
        >>> into
        [tensor([1.5000, 2.0000]), tensor([0.5000], dtype=torch.float64)]
    """
    _run("grads_accumulate", ACCUMULATE, into, sources, weight)


def grads_average(into: Sequence[Tensor], sources: Sequence[Tensor], decay: float) -> None:
    """into_i <- decay * into_i + (1 - decay) * sources_i. Mutated: `into`; see `grads_accumulate`.

    Examples:
        >>> into = [torch.tensor([1.0, 2.0])]
        >>> grads_average(into, [torch.tensor([3.0, 2.0])], 0.75)
        >>> into
        [tensor([1.5000, 2.0000])]
    """
    _run("grads_average", AVERAGE, into, sources, decay)


def fingerprint(tensors: Sequence[Tensor]) -> list[Any]:
    """The address, size and dtype of each tensor; a plan holds as long as they are equal."""
    try:
        return [(tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor.is_contiguous()) for tensor in tensors]
    except RuntimeError:  # one of them has no memory of its own
        return [_fingerprint(tensor) for tensor in tensors]


def _fingerprint(tensor: Tensor) -> Any:
    if tensor.layout is not torch.strided:
        return id(tensor)
    return tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor.is_contiguous()


def served(tensor: Tensor, known: Any) -> bool:
    """Whether a tensor with this fingerprint is plain contiguous memory in a dtype and on a device that are served."""
    if not is_plain(tensor) or tensor.is_neg() or not (tensor.is_cpu or _on_served_cuda(tensor)):
        return False
    address, count, dtype, contiguous = known
    return contiguous and dtype in CODES and (address != 0 or count == 0)


def _on_served_cuda(tensor: Tensor) -> bool:
    return tensor.is_cuda and native.cuda_reason() is None


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is neither sparse nor of a kind of its own, such as sharded."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided


def plan(device: torch.device, pairs: Iterable[tuple[Any, Any]]) -> Any:
    """A plan for pairs of fingerprints of tensors on `device` that are `served`: for `run(kind, number, threads)`.

    It keeps no tensor alive.
    """
    entries = [(CODES[into[2]], into[0], source[0], into[1]) for into, source in pairs]
    if device.type == "cuda":
        return CudaPlan(device, entries)
    made = native.extension().GradsPlan()
    made.add(entries)
    return made


class CudaPlan:
    """The same on a GPU, where the addresses lie in a table; made without waiting for the device."""

    def __init__(self, device: torch.device, entries: Sequence[tuple[int, int, int, int]]) -> None:
        self._extension, self._device = native.extension(), device
        chunk, first, rows = self._extension.grads_chunk, 0, []
        for entry in entries:
            if entry[3] > 0:  # one without elements has no chunk
                rows.append((*entry, first))
                first += -(-entry[3] // chunk)
        self._chunks = first
        table = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 5).pin_memory()
        self._table = table.to(device, non_blocking=True)

    def run(self, kind: int, number: float, threads: int) -> None:  # noqa: ARG002
        """One launch on torch's current stream."""
        on = destination(self._extension, self._device)
        self._extension.grads_cuda(self._table.data_ptr(), len(self._table), self._chunks, kind, number, on)


def _run(op: str, kind: int, into: Sequence[Tensor], sources: Sequence[Tensor], number: float) -> None:
    if len(into) != len(sources):
        raise ValueError(f"{op}: into has {len(into)} tensors and sources has {len(sources)}: they are taken in pairs")
    for one, other in zip(into, sources, strict=True):
        _check(op, one, other, into[0].device)
    if into:
        pairs = zip(fingerprint(into), fingerprint(sources), strict=True)
        plan(into[0].device, pairs).run(kind, number, torch.get_num_threads())
        increment_version(tuple(into))


def _check(op: str, into: Tensor, source: Tensor, device: torch.device) -> None:
    require_device(op, into.device)
    if into.device != device:
        raise ValueError(f"{op}: a tensor of into is on {into.device}, the first on {device}")
    GRADS_PAIR.fitted((into, source))
