"""Methods and their parameters by name, as a command line gives them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import fastadv
from fastadv.jobs import signatures
from fastadv.jobs.errors import UserError

if TYPE_CHECKING:  # torch comes with a method, and not before
    from fastadv.methods import Method

# Parameters that a job decides itself, or that only a program can give.
INTERNAL = {"self", "model", "method", "parameters", "backward", "scaler", "atomic", "process_group"}


def methods() -> dict[str, type[Method]]:
    """List every method that fastadv exports, by its lower-case name."""
    return {name: getattr(fastadv, one.name) for name, one in signatures.methods().items()}


def signature_of(name: str) -> signatures.Signature:
    """Find what a method takes, without importing it.

    Raises:
        UserError: there is no such method.
    """
    known = signatures.methods()
    if name.lower() not in known:
        raise UserError(f"there is no method {name!r}: choose one of {', '.join(known)}")
    return known[name.lower()]


def method_class(name: str) -> type[Method]:
    """Find a method by its name.

    Raises:
        UserError: there is none.
    """
    cls: type[Method] = getattr(fastadv, signature_of(name).name)
    return cls


def parameters(method: type[Method] | str) -> dict[str, Any]:
    """List a method's options that a command line can give, with their defaults."""
    found = signature_of(method if isinstance(method, str) else method.__name__).options
    return {name: default for name, default in found.items() if name not in INTERNAL}


def literal(text: str | None) -> Any:
    """Read a value much as Python would: none, true, 3, 0.5, l2, bfloat16."""
    if text is None:
        return True
    constants = {"none": None, "true": True, "false": False}
    if text.lower() in constants:
        return constants[text.lower()]
    if text.lower() in {"bfloat16", "float16"}:
        import torch

        return getattr(torch, text.lower())
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
