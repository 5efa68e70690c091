"""What a method was made with: how it is shown, pickled and copied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fastadv.engine.model.find import unwrap
from fastadv.methods.options import options_of, shown

if TYPE_CHECKING:
    from fastadv.methods.base import Method

STRENGTH = ("epsilon", "step_size", "steps", "replays", "alpha", "gamma", "decay", "norm", "scope")  # always shown
FROZEN = "_frozen"  # in the place of everything else, until the model of a method is there again

Given = tuple[tuple[Any, ...], dict[str, Any]]  # a constructor's arguments, the model first


def described(method: Method) -> str:
    """Its class with what tells how strong it is, and all options that are not the defaults."""
    _, options = method._given
    parts = []
    for name, default in options_of(type(method)).items():
        value = getattr(method, name, None)
        if not isinstance(value, (str, int, float)):  # it is not kept under its name
            value = options.get(name, default)
        if name in STRENGTH or (value is not default and value != default):
            parts.append(f"{name}={_shown(value)}")
    return f"{type(method).__name__}({', '.join(parts)})"


def _shown(value: Any) -> str:
    return described(value) if hasattr(value, "_given") else shown(value)


def model_name(model: nn.Module) -> str:
    """The class of the user's own module, inside what wraps it."""
    return type(unwrap(model)).__name__


def reduced(method: Method) -> tuple[Any, ...]:
    """For pickle and copy: the constructor's arguments, with the model, and the state."""
    args, options = method._given
    return remade, (type(method), args, options, method.state_dict(), method._engine.closed)


def remade(cls: type[Method], args: tuple[Any, ...], options: dict[str, Any], state: Any, closed: bool) -> Method:
    """Make the method again, around the model that came with it.

    A model that keeps its method as an attribute is pickled around it, and is empty still when the method is read. The
    method is then made when it is first used.
    """
    method: Method = object.__new__(cls)
    vars(method)[FROZEN] = args, options, state, closed
    model = args[0] if args else options["model"]
    if "_modules" in vars(model):
        thaw(method)
    return method


def thaw(method: Method) -> bool:
    """Make a frozen method; whether it was one."""
    frozen = vars(method).pop(FROZEN, None)
    if frozen is None:
        return False
    args, options, state, closed = frozen
    method._given = args, options
    cls: Any = type(method)
    cls.__init__(method, *args, **options)
    method.load_state_dict(state)
    if closed:
        method.close()
    return True
