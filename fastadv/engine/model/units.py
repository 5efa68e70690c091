"""The units of FSDP2 in one model, and what they send between the passes of a step.

See docs/design/0020-communication.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

CHOICES = ("each", "last", "keep")


class Switches(NamedTuple):
    """What one unit does after its forward and its backward, as it was when a step began."""

    group: Any  # of parameters, that are gathered and reduced together
    state: Any  # of the module that has it
    rooted: bool  # which module is the root was known
    sharded: bool
    reduces: bool
    all_reduces: bool
    frees: bool  # its weights after a backward
    mesh: Any  # over which its weights are sharded after a forward; None: they stay gathered

    def is_new_root(self) -> bool:
        """Whether the step's first forward has shown it to be the root, whose weights FSDP2 then keeps gathered."""
        return (
            not self.rooted and bool(self.state._is_root) and getattr(self.state, "_auto_reshard_after_forward", True)
        )


class Gradient(NamedTuple):
    """What a parameter had of gradients that are not reduced yet, when a step began."""

    parameter: Any
    accumulated: Tensor | None  # in the precision of the reduction
    plain: Tensor | None

    def put_back(self) -> None:
        """Let it have that again."""
        self.parameter.unsharded_accumulated_grad = self.accumulated
        whole = getattr(self.parameter, "_unsharded_param", None)
        if whole is not None:
            whole.grad = self.plain


class Units:
    """What FSDP2 has made of a model; nothing where it has not sharded it.

    Args:
        modules: the model's.
        communication: "each", "last" or "keep".
        atomic: whether gradients that are there already are copied, to be put back on a fault.
    """

    def __init__(self, modules: Iterable[nn.Module], communication: str, atomic: bool) -> None:
        self._states = list(dict.fromkeys(_states(modules)))
        self._late = communication != "each"
        self._keeps = communication == "keep"
        self._atomic = atomic
        self._switches: list[Switches] = []
        self._gradients: list[Gradient] = []

    def __bool__(self) -> bool:
        return bool(self._states)

    @property
    def late(self) -> bool:
        """Whether gradients wait for the last full pass."""
        return self._late and bool(self._states)

    def unreduced(self) -> Iterator[Tensor | None]:
        """What FSDP2 holds of gradients that are not reduced yet."""
        for state in self._states:
            for group in _groups(state):
                for parameter in group.fsdp_params:
                    yield from _waiting(parameter)

    def begin(self) -> None:
        """Write down what there is, where a step may change it."""
        self._switches = [_switches(state, group) for state in self._states for group in _groups(state)]
        if self._late:
            self._gradients = [_gradient(parameter, self._atomic) for parameter in self._parameters()]

    def hold(self) -> None:
        """Before a pass that another follows: it reduces nothing, and its weights may stay."""
        for one in self._switches if self._late else ():
            one.group.reduce_grads = one.group.all_reduce_grads = False
            if self._keeps:
                one.group.post_forward_mesh_info, one.group.reshard_after_backward = None, False

    def send(self) -> None:
        """Before the backward of the last full pass: it reduces and frees what the user's own would."""
        for one in self._switches:
            one.group.reduce_grads, one.group.all_reduce_grads = one.reduces, one.all_reduces
            one.group.reshard_after_backward = one.frees

    def thaw(self) -> None:
        """Weights that stayed gathered require a gradient where their shards do."""
        for parameter in self._parameters():
            whole = getattr(parameter, "_unsharded_param", None)
            if whole is not None:
                whole.requires_grad_(parameter.sharded_param.requires_grad)

    def end(self) -> None:
        """The step is over: everything is switched as it was, and what was sharded is."""
        self.send()
        for one in self._switches:
            one.group.post_forward_mesh_info = None if one.is_new_root() else one.mesh
            if self._keeps and one.sharded and one.frees:
                one.group._to_sharded()
        self._switches, self._gradients = [], []

    def undo(self) -> None:
        """The step has failed, perhaps in the midst of a forward: nothing is gathered, and no gradient is left."""
        for state in self._states:
            state._training_state, state._state_ctx.iter_forward_root = type(state._training_state).IDLE, None
        for one in self._switches:
            one.group._training_state = type(one.group._training_state).IDLE
            if one.sharded:
                one.group._to_sharded()
        for gradient in self._gradients:
            gradient.put_back()
        self.thaw()

    def _parameters(self) -> list[Any]:
        return [parameter for one in self._switches for parameter in one.group.fsdp_params]


def _states(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """FSDP2's own, of each module that it shards: one may serve several modules."""
    if "torch.distributed.fsdp" not in sys.modules:  # then nobody has sharded anything
        return
    from torch.distributed.fsdp import FSDPModule

    for module in modules:
        if isinstance(module, FSDPModule):
            yield module._get_fsdp_state()


def _groups(state: Any) -> list[Any]:
    """A state's parameters: one group, or none; in later versions of torch several."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return [one for one in ([state._fsdp_param_group] if groups is None else groups) if one is not None]


def _switches(state: Any, group: Any) -> Switches:
    return Switches(
        group,
        state,
        state._is_root is not None,
        group.is_sharded,
        group.reduce_grads,
        group.all_reduce_grads,
        group.reshard_after_backward,
        group.post_forward_mesh_info,
    )


def _gradient(parameter: Any, copy: bool) -> Gradient:
    accumulated, plain = (one.clone() if copy and one is not None else one for one in _waiting(parameter))
    return Gradient(parameter, accumulated, plain)


def _waiting(parameter: Any) -> tuple[Tensor | None, Tensor | None]:
    """Its gradients that are not reduced yet: in the precision of the reduction, and plain."""
    whole = getattr(parameter, "_unsharded_param", None)
    return parameter.unsharded_accumulated_grad, None if whole is None else whole.grad
