"""Where the perturbation enters: the output of a module, functionally. Weights are never touched.

An interception is installed once, does nothing while its site is idle, and is not carried by copies of the model.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.engine.embedding import first_tensor, is_plain_lookup
from fastadv.engine.site import Site
from fastadv.ops import gather_perturb


def install(module: nn.Module, index: int, site: Site) -> Interception:
    """Let `site` perturb what `module` returns, until `remove()`."""
    if is_plain_lookup(module) and _has_its_own_forward(module):
        return Lookup(module, index, site)
    return OutputHook(module, index, site)


def _has_its_own_forward(module: nn.Module) -> bool:
    """Whether nobody stands in for its forward: another method's lookup, or an offloading hook."""
    return getattr(module.forward, "__func__", None) is nn.Embedding.forward


class Interception:
    """What both kinds share: a module, its index among the perturbed modules, and the site."""

    def __init__(self, module: nn.Module, index: int, site: Site) -> None:
        self.module = module
        self.index = index
        self.site = site

    def remove(self) -> None:
        """Leave the module as it was found."""
        raise NotImplementedError

    def add(self, hidden: Tensor, ids: Tensor | None) -> Tensor:
        """`hidden` + delta, summed in delta's dtype and rounded once."""
        call = self.site.enter(hidden, hidden.shape, ids, self.index)
        if call is None:
            return hidden
        return (hidden.to(call.delta.dtype) + call.delta).to(hidden.dtype)


class NotCopied:
    """A hook that copies and pickles of its model do not carry."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _pass_on

    def __reduce__(self) -> Any:
        # What unpickles in the hook's place: the standard library's own callable that takes anything and returns
        # None, so that a saved model needs no fastadv to load.
        return getattr, (contextlib.nullcontext(), "__exit__")


def _pass_on(*_: Any) -> None:
    """The hook that a deep copy carries: it changes nothing."""


class OutputHook(NotCopied, Interception):
    """The general case, a forward hook: output + delta. A tuple's first tensor is the one perturbed."""

    def __init__(self, module: nn.Module, index: int, site: Site) -> None:
        super().__init__(module, index, site)
        self.handle = module.register_forward_hook(self, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off."""
        self.handle.remove()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.site.live:
            return None
        first = args[0] if args else kwargs.get("input")
        ids = first if isinstance(module, nn.Embedding) else None
        hidden = self.add(first_tensor(output), ids)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class Lookup(Interception):
    """Exactly `nn.Embedding`: stands in for its `forward`, so that gather and add are one op."""

    def __init__(self, module: nn.Module, index: int, site: Site) -> None:
        super().__init__(module, index, site)
        module.__dict__["forward"] = self

    def remove(self) -> None:
        """Give the module its own forward back."""
        if self.module.__dict__.get("forward") is self:
            del self.module.__dict__["forward"]

    def __call__(self, input: Tensor) -> Tensor:
        module = self.module
        if not self.site.live:
            return nn.Embedding.forward(module, input)  # type: ignore[arg-type]
        if torch.compiler.is_compiling() or not is_plain_lookup(module):
            # The compiler fuses lookup and sum by itself; a sharded weight needs its own lookup.
            return self.add(nn.Embedding.forward(module, input), input)  # type: ignore[arg-type]
        weight: Tensor = module.weight  # type: ignore[assignment]
        _check_ids(input, weight.shape[0])
        shape = torch.Size((*input.shape, weight.shape[1]))
        call = self.site.enter(weight, shape, input, self.index, plain=True)
        if call is None:
            return nn.Embedding.forward(module, input)  # type: ignore[arg-type]
        padding: int | None = module.padding_idx  # type: ignore[assignment]
        return gather_perturb(
            weight.detach() if self.site.detaches(call, weight) else weight,
            input,
            call.delta,
            added=call.added(),
            slot=call.slot if call.rows is not None and not call.body else None,
            ready=call.ready.embedded if call.ready is not None and call.ready.serves(input, weight) else None,
            padding_idx=padding,
            fused=self.site.fused,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return nn.Embedding.forward.__get__(memo.get(id(self.module), self.module))

    def __reduce__(self) -> Any:
        # The module is being pickled around this: by the time it is rebuilt, it has its class's forward.
        return getattr, (self.module, "forward")


def _check_ids(ids: Tensor, vocabulary: int) -> None:
    """On the CPU an id outside the table is an error before anything is read; on CUDA looking would be a sync."""
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocabulary:
        raise IndexError(
            f"the embedding was called with id {low if low < 0 else high}, but its table has {vocabulary} rows: "
            "check the tokenizer, or resize the embedding"
        )
