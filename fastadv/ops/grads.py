r"""The gradients of all parameters at once: copies of them, sums, and moving averages.

.. math:: \text{into}_i \leftarrow s_i, \qquad \text{into}_i \leftarrow \text{into}_i + w \, s_i, \qquad
    \text{into}_i \leftarrow d \, \text{into}_i + (1 - d) \, s_i

`into` and `sources` are lists of tensors, pair by pair of one shape and dtype; computed in float32 (float64 for
float64) and rounded once. A list of tensors costs time by itself, so what is done step by step on the same tensors goes
through a `Plan`; `Backup` keeps and puts back the gradients of a model.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fastadv import native
from fastadv.native import grads as native_grads
from fastadv.ops.dispatch import Backend, Op, in_place


def eager_copy(into: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """`into <- sources` in plain PyTorch."""
    if len(into) == 1:  # also of a kind that the other does not know: sharded
        into[0].copy_(sources[0])
    elif into:
        torch._foreach_copy_(list(into), list(sources))


def eager_accumulate(into: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
    """`into <- into + weight * sources` in plain PyTorch."""
    if not into:
        return
    wide = _widened(into)
    torch._foreach_add_(wide, _widened(sources), alpha=weight)
    _narrow(into, wide)


def eager_average(into: Sequence[Tensor], sources: Sequence[Tensor], decay: float) -> None:
    """`into <- decay * into + (1 - decay) * sources` in plain PyTorch."""
    if not into:
        return
    wide = _widened(into)
    torch._foreach_mul_(wide, decay)
    torch._foreach_add_(wide, _widened(sources), alpha=1 - decay)
    _narrow(into, wide)


def _widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def _narrow(into: Sequence[Tensor], wide: Sequence[Tensor]) -> None:
    """Round what was computed in a wider dtype; the rest has been computed in place."""
    narrower = [(one, other) for one, other in zip(into, wide, strict=True) if one is not other]
    eager_copy([one for one, _ in narrower], [other for _, other in narrower])


def _op(name: str, schema: str, eager: Callable[..., Any]) -> Op:
    function = getattr(native_grads, name)
    backends = [
        Backend("C++", "cpu", function, native.reason),
        Backend("CUDA C++", "cuda", function, native.cuda_reason),
    ]
    return Op(name, schema, eager=eager, fake=in_place, backends=backends)


COPY = _op("grads_copy", "(Tensor(a!)[] into, Tensor[] sources) -> ()", eager_copy)
ACCUMULATE = _op("grads_accumulate", "(Tensor(a!)[] into, Tensor[] sources, float weight) -> ()", eager_accumulate)
AVERAGE = _op("grads_average", "(Tensor(a!)[] into, Tensor[] sources, float decay) -> ()", eager_average)


class Plan:
    """Copy, add or average `sources` into `into`, step by step, sorted once by who can do it.

    Each call reads every tensor anew: one that has moved is followed, and where one was resized or changed its dtype
    the pairs are sorted again. Pairs that are not plain contiguous memory (strided, sparse, sharded, misaligned) go
    through PyTorch.

    Args:
        into: what is written; shares no memory with `sources`.
        sources: what is read; each of the shape and dtype of its fellow in `into`.
        fused: None: C++ or CUDA where it can; True: insist on it; False: PyTorch throughout.

    Raises:
        ValueError: lists of different lengths, or shapes that differ.
        TypeError: dtypes that differ.
        RuntimeError: `fused=True` where the C++ ops cannot run.

    Examples:
        >>> sums, grads = [torch.zeros(2)], [torch.ones(2)]
        >>> plan = Plan(sums, grads)
        >>> plan.accumulate(0.5)
        >>> plan.accumulate(0.25)
        >>> sums
        [tensor([0.7500, 0.7500])]
    """

    def __init__(self, into: Sequence[Tensor], sources: Sequence[Tensor], fused: bool | None = None) -> None:
        self._fused = fused
        self._count = 0  # of the pairs that are sorted
        self._direct: list[int] = []  # the pairs for C++, by index
        self._on_cpu: list[int] = []
        self._on_cuda: list[tuple[list[int], Any, native_grads.CudaPlan]] = []
        self._others: list[list[int]] = []  # groups of pairs for PyTorch
        self.rebind(into, sources)

    def rebind(self, into: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Use these tensors from now on. The plan of the old ones is kept until others are run."""
        if len(into) != len(sources):
            raise ValueError(f"into has {len(into)} tensors and sources has {len(sources)}: they are taken in pairs")
        self._into, self._sources = list(into), list(sources)

    def copy(self) -> None:
        """`into <- sources`, bit for bit."""
        self._run(native_grads.COPY, 0.0, eager_copy)

    def accumulate(self, weight: float) -> None:
        """`into <- into + weight * sources`."""
        self._run(native_grads.ACCUMULATE, weight, lambda into, sources: eager_accumulate(into, sources, weight))

    def average(self, decay: float) -> None:
        """`into <- decay * into + (1 - decay) * sources`."""
        self._run(native_grads.AVERAGE, decay, lambda into, sources: eager_average(into, sources, decay))

    @torch.no_grad()
    def _run(self, kind: int, number: float, eager: Callable[[list[Tensor], list[Tensor]], None]) -> None:
        if len(self._into) != self._count or not self._start(kind, number):
            self._sort()
            if not self._start(kind, number):
                raise RuntimeError("a tensor of the plan has changed while it ran")
        if self._direct:
            increment_version([self._into[i] for i in self._direct] if self._others else self._into)
        for group in self._others:
            eager(*self._pairs(group))

    def _start(self, kind: int, number: float) -> bool:
        """Run the pairs for C++; False, and nothing has been written, where a tensor is no longer what it was."""
        for group in self._others:
            for i in group:
                _check(self._into[i], self._sources[i])
        for group, known, _ in self._on_cuda:
            if known != tuple(map(native_grads.fingerprint, self._pairs(group))):
                return False
        if self._on_cpu and not native_grads.run_cpu(*self._pairs(self._on_cpu), kind, number):
            return False
        for _, _, plan in self._on_cuda:
            plan.run(kind, number)
        return True

    def _sort(self) -> None:
        """Sort the pairs by index: those for C++, and groups of those for PyTorch."""
        pairs = list(zip(self._into, self._sources, strict=True))
        for pair in pairs:
            _check(*pair)
        fused = self._fused is not False and native.available()
        self._count = len(pairs)
        self._direct = [i for i, pair in enumerate(pairs) if fused and native_grads.served(*pair)]
        rest = sorted(set(range(len(pairs))) - set(self._direct))
        if self._fused and rest:
            COPY.choose(self._into[rest[0]].device.type, True)  # raises if C++ is not there at all
            raise RuntimeError(
                "fused=True, but a pair of tensors is not plain contiguous memory in a dtype that is served"
            )
        self._on_cpu = [i for i in self._direct if self._into[i].is_cpu]
        self._on_cuda = []
        for device in {self._into[i].device: None for i in self._direct if self._into[i].is_cuda}:
            group = [i for i in self._direct if self._into[i].device == device]
            pairs_there = self._pairs(group)
            known = tuple(map(native_grads.fingerprint, pairs_there))
            self._on_cuda.append((group, known, native_grads.CudaPlan(device, *pairs_there)))
        plain = [i for i in rest if native_grads.is_plain(self._into[i])]
        self._others = [[i] for i in rest if i not in plain] + ([plain] if plain else [])

    def _pairs(self, group: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        """What is written and what is read of these pairs."""
        return [self._into[i] for i in group], [self._sources[i] for i in group]


def _check(into: Tensor, source: Tensor) -> None:
    if into.dtype != source.dtype:
        raise TypeError(f"a pair of tensors must have one dtype, not {into.dtype} and {source.dtype}")
    if into.shape != source.shape:
        raise ValueError(f"a pair of tensors must have one shape, not {tuple(into.shape)} and {tuple(source.shape)}")
    if _is_freed(into) or _is_freed(source):
        raise ValueError("a tensor's memory has been freed (its storage was resized to nothing): give it memory first")


def _is_freed(tensor: Tensor) -> bool:
    """Whether there are elements and no memory, which PyTorch's own ops would read all the same."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.device.type != "meta"
    return plain and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


class Backup:
    """The gradients of `parameters`, kept aside and put back.

    The copies' memory is used again from one `save` to the next.

    Examples:
        >>> layer = torch.nn.Linear(2, 1)
        >>> backup = Backup(layer.parameters())
        >>> layer.weight.grad = torch.ones(1, 2)
        >>> backup.save()
        >>> layer.weight.grad.zero_()
        tensor([[0., 0.]])
        >>> backup.restore()
        >>> layer.weight.grad, layer.bias.grad
        (tensor([[1., 1.]]), None)
    """

    def __init__(self, parameters: Sequence[nn.Parameter], fused: bool | None = None) -> None:
        self._parameters = list(parameters)
        self._copies: list[Tensor | None] = [None] * len(self._parameters)  # memory for copies
        self._saved: list[Tensor | None] | None = None  # those that hold one
        lenient = False if fused is False else None  # a gradient that is strided or sparse is no reason to fail
        self._saving, self._restoring = Plan([], [], lenient), Plan([], [], lenient)

    def is_of(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether these are its parameters, in this order."""
        mine = self._parameters
        return len(mine) == len(parameters) and all(map(operator.is_, mine, parameters))

    @torch.no_grad()
    def save(self) -> None:
        """Copy every gradient there is, and remember where there is none."""
        grads = [parameter.grad for parameter in self._parameters]
        for index, grad in enumerate(grads):
            if grad is not None and not _alike(self._copies[index], grad):
                self._copies[index] = _room_for(grad)
        saved = [None if grad is None else copy for grad, copy in zip(grads, self._copies, strict=True)]
        self._saved = None
        self._through(self._saving, saved, grads)
        self._saved = saved

    @torch.no_grad()
    def restore(self) -> None:
        """Put every copy back bit for bit: into the gradient that is there, or else into a new one.

        Raises:
            RuntimeError: nothing was saved.
        """
        if self._saved is None:
            raise RuntimeError("restore() without save(): there is nothing to put back")
        for parameter, copy in zip(self._parameters, self._saved, strict=True):
            if copy is None:
                parameter.grad = None
            elif not _alike(parameter.grad, copy):
                parameter.grad = _room_for(copy)
        self._through(self._restoring, [parameter.grad for parameter in self._parameters], self._saved)

    @staticmethod
    def _through(plan: Plan, into: list[Tensor | None], sources: list[Tensor | None]) -> None:
        """Copy, and drop the references: `zero_grad` must be able to free gradients."""
        plan.rebind([one for one in into if one is not None], [one for one in sources if one is not None])
        plan.copy()
        plan.rebind([], [])


def fit(copies: Collection[Tensor], tensors: Collection[Tensor]) -> bool:
    """Whether each of `copies` can hold its fellow in `tensors`: of its shape and dtype, on its device."""
    return len(copies) == len(tensors) and all(map(_fits, copies, tensors))


def _fits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.device == other.device


def _alike(one: Tensor | None, other: Tensor) -> bool:
    """Whether `one` can take what `other` holds, of whatever kind that is."""
    return one is not None and type(one) is type(other) and one.layout == other.layout and _fits(one, other)


def _room_for(tensor: Tensor) -> Tensor:
    """A tensor that can take a copy of `tensor`."""
    if tensor.layout != torch.strided:
        return tensor.detach().clone()  # there is no telling how much room the next one needs
    return torch.empty_like(tensor, requires_grad=False)
