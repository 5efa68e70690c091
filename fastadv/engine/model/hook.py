"""Where the perturbation enters: the output of a module, functionally. Weights are never touched.

A hook is installed once, does nothing while no pass is running, and is not carried by copies of the model.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.engine.forward import Entrance, Entrances, Perturbing
from fastadv.engine.model.find import first_tensor, is_plain_lookup
from fastadv.engine.model.placed import Placed, here, is_placed, is_planned, planned_over_sequence
from fastadv.engine.profile import span
from fastadv.ops.gather_perturb import gather_perturb

NO_INPUT = "{name} is given no floating tensor that could be perturbed: perturb the output of what runs before it"


def install(module: nn.Module, index: int, entrance: Entrance) -> Hook:
    """Let the running pass perturb what `module` returns, until `remove()`."""
    if is_plain_lookup(module) and _has_its_own_forward(module):
        return LookupHook(module, index, entrance)
    return OutputHook(module, index, entrance)


def _has_its_own_forward(module: nn.Module) -> bool:
    """Whether nobody stands in for its forward: another method's hook, or an offloading one."""
    return getattr(module.forward, "__func__", None) is nn.Embedding.forward


class Hook:
    """Base of both kinds: a module, and its index among the perturbed modules."""

    def __init__(self, module: nn.Module, index: int, entrance: Entrance) -> None:
        self.module = module
        self.index = index
        self._name = entrance.name
        self.divided = planned_over_sequence(module, before=isinstance(self, LookupHook))

    @property
    def entrance(self) -> Entrance:
        """Where the running pass is; by a way that does not lead through the module."""
        entrance: Entrance = getattr(Entrances, self._name)
        return entrance

    def remove(self) -> None:
        """Leave the module as it was found."""
        raise NotImplementedError

    def add(self, hidden: Tensor, ids: Tensor | None) -> Tensor:
        """`hidden` + delta, summed in delta's dtype and rounded once."""
        forward = self.entrance.forward
        if forward is None:
            return hidden
        placed = Placed(hidden, self.entrance.ranks) if is_placed(hidden) else None
        local, ids = (hidden if placed is None else placed.local), here(ids)
        apart = ids is not None and ids.numel() > local.shape[:-1].numel()  # a plan has sharded what the ids gave
        if placed is not None:
            forward.place(placed)
        if self.divided or apart or (placed is not None and placed.over_sequence):
            forward.divide(self.index, has_ids=not apart)
        lookup = forward.enter(local, local.shape, None if apart else ids, self.index)
        if lookup is None:
            return hidden
        if placed is not None:
            return placed.plus(lookup.delta)
        return (hidden.to(lookup.delta.dtype) + lookup.delta).to(hidden.dtype)


class NotCopied:
    """A hook that copies and pickles of its model do not carry."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return contextlib.nullcontext().__exit__

    def __reduce__(self) -> Any:
        # Unpickles as the standard library's own callable that takes anything and returns None, so that a saved model
        # needs no fastadv to load; nor does a saved copy.
        return getattr, (contextlib.nullcontext(), "__exit__")


class OutputHook(NotCopied, Hook):
    """The general case, a forward hook: output + delta. A tuple's first tensor is the one perturbed."""

    def __init__(self, module: nn.Module, index: int, entrance: Entrance) -> None:
        super().__init__(module, index, entrance)
        first = entrance.ranks is None and is_planned(module)  # the whole output, before a plan shards it
        self.handle = module.register_forward_hook(self, with_kwargs=True, prepend=first)

    def remove(self) -> None:
        """Take the hook off."""
        self.handle.remove()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.entrance.forward is None:
            return None
        first = args[0] if args else kwargs.get("input")
        ids = first if isinstance(module, nn.Embedding) else None
        hidden = self.add(first_tensor(output), ids)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class InputHook(NotCopied, Hook):
    """What a module is given: its first floating argument, or `hidden_states` where that comes by name."""

    def __init__(self, module: nn.Module, index: int, entrance: Entrance) -> None:
        super().__init__(module, index, entrance)
        self.divided = False  # a plan's layouts are of outputs
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off."""
        self.handle.remove()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.entrance.forward is None:
            return None
        if args and _is_floating(args[0]):
            return (self.add(args[0], None), *args[1:]), kwargs
        named = [name for name, value in kwargs.items() if _is_floating(value)]
        if not named:
            raise RuntimeError(NO_INPUT.format(name=type(module).__name__))
        name = "hidden_states" if "hidden_states" in named else named[0]
        return args, {**kwargs, name: self.add(kwargs[name], None)}


class LookupHook(Hook):
    """Exactly `nn.Embedding`: stands in for its `forward`, so that gather and add are one op."""

    def __init__(self, module: nn.Module, index: int, entrance: Entrance) -> None:
        super().__init__(module, index, entrance)
        module.__dict__["forward"] = self

    def remove(self) -> None:
        """Give the module its own forward back."""
        if self.module.__dict__.get("forward") is self:
            del self.module.__dict__["forward"]

    def __call__(self, input: Tensor) -> Tensor:
        module: Any = self.module
        forward = self.entrance.forward
        if forward is None:
            return nn.Embedding.forward(module, input)
        if torch.compiler.is_compiling() or not is_plain_lookup(module):
            # The compiler fuses lookup and sum by itself; a sharded weight needs its own lookup.
            return self.add(nn.Embedding.forward(module, input), input)
        with span("lookup"):
            return self._look_up(module, forward, input)

    def _look_up(self, module: Any, forward: Perturbing, input: Tensor) -> Tensor:
        """The lookup of a pass that is running, perturbed."""
        if self.divided:
            forward.divide(self.index, has_ids=True)
        weight: Tensor = module.weight
        shape = torch.Size((*input.shape, weight.shape[1]))
        lookup = forward.enter(weight, shape, input, self.index, plain=True)
        if lookup is None:
            return nn.Embedding.forward(module, input)
        if lookup.table is None or not lookup.checked:  # later passes look up the ids of the first
            _check_ids(input, weight.shape[0])
            lookup.checked = True
        padding: int | None = module.padding_idx
        return gather_perturb(
            weight.detach() if forward.detaches(lookup, weight) else weight,
            input,
            lookup.delta,
            added=lookup.added(),
            slot=lookup.slot if lookup.rows is not None and not lookup.materialised else None,
            ready=lookup.ready.embedded if lookup.ready is not None and lookup.ready.serves(input, weight) else None,
            padding_idx=padding,
            fused=forward.fused,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return nn.Embedding.forward.__get__(memo.get(id(self.module), self.module))

    def __reduce__(self) -> Any:
        # The module is being pickled around this: by the time it is rebuilt, it has its class's forward.
        return getattr, (self.module, "forward")


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _check_ids(ids: Tensor, vocabulary: int) -> None:
    """On the CPU an id outside the table is an error before anything is read; on CUDA looking would synchronise."""
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocabulary:
        raise IndexError(
            f"the embedding was called with id {low if low < 0 else high}, but its table has {vocabulary} rows: "
            "check the tokenizer, or resize the embedding"
        )
