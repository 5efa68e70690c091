"""The launchers of csrc/grads.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fastadv import native
from fastadv.arguments.signatures import GRADS_PAIR
from fastadv.arguments.tensors import CODES
from fastadv.native import launch
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


def run_cpu(into: Sequence[Tensor], sources: Sequence[Tensor], kind: int, number: float) -> bool:
    """One launch for pairs on the CPU; False where a pair is not `served`, and nothing has been written then."""
    pairs, threads = launch.compiled(GRADS_PAIR), torch.get_num_threads()
    return native.extension().grads_cpu(pairs, list(into), list(sources), kind, number, threads) is not None


def served(into: Tensor, source: Tensor) -> bool:
    """Whether a pair is plain contiguous memory in a dtype and on a device that are served."""
    if not (is_plain(into) and is_plain(source)):
        return False
    there = into.is_cpu or (into.is_cuda and native.cuda_reason() is None)
    return there and bool(launch.compiled(GRADS_PAIR).takes((into, source)))


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is neither sparse nor of a kind of its own, such as sharded."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided


def fingerprint(tensors: Sequence[Tensor]) -> list[Any]:
    """What a `CudaPlan` rests on: it holds as long as two are equal."""
    return [
        (tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor.is_contiguous()) if is_plain(tensor) else id(tensor)
        for tensor in tensors
    ]


class CudaPlan:
    """Pairs on a GPU, whose addresses lie in a table there, made without waiting for the device. It keeps none alive.

    Args:
        device: of all pairs, which are `served`.
        into: what is written.
        sources: what is read.
    """

    def __init__(self, device: torch.device, into: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        self._extension, self._device = native.extension(), device
        chunk, first, rows = self._extension.grads_chunk, 0, []
        for one, other in zip(into, sources, strict=True):
            if one.numel() > 0:  # one without elements has no chunk
                rows.append((CODES[one.dtype], one.data_ptr(), other.data_ptr(), one.numel(), first))
                first += -(-one.numel() // chunk)
        self._chunks = first
        table = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 5).pin_memory()
        self._table = table.to(device, non_blocking=True)

    def run(self, kind: int, number: float) -> None:
        """One launch on torch's current stream."""
        on = destination(self._extension, self._device)
        self._extension.grads_cuda(self._table.data_ptr(), len(self._table), self._chunks, kind, number, on)


def _run(op: str, kind: int, into: Sequence[Tensor], sources: Sequence[Tensor], number: float) -> None:
    if len(into) != len(sources):
        raise ValueError(f"{op}: into has {len(into)} tensors and sources has {len(sources)}: they are taken in pairs")
    if not into:
        return
    device, pairs = into[0].device, [_fitted(op, pair, into[0].device) for pair in zip(into, sources, strict=True)]
    firsts, seconds = [one for one, _ in pairs], [other for _, other in pairs]
    if device.type == "cuda":
        CudaPlan(device, firsts, seconds).run(kind, number)
    elif not run_cpu(firsts, seconds, kind, number):
        raise RuntimeError(f"{op}: the arguments were checked and are refused all the same")
    for one, fit in zip(into, firsts, strict=True):
        if one is not fit:  # it was misaligned
            one.copy_(fit)
    increment_version(tuple(into))


def _fitted(op: str, pair: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    require_device(op, pair[0].device)
    if pair[0].device != device:
        raise ValueError(f"{op}: a tensor of into is on {pair[0].device}, the first on {device}")
    into, source = GRADS_PAIR.fitted(pair)
    return into, source
