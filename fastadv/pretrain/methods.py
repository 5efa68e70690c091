"""Which methods pretraining offers, with its defaults: balls around documents, in units of the embedding's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastadv.jobs import method_options, names
from fastadv.jobs.errors import UserError
from fastadv.pretrain.settings import PLAIN_ONLY

if TYPE_CHECKING:  # torch comes with a method, and not before
    from torch import nn

    from fastadv.engine.owner import Owner
    from fastadv.methods import Method

# Radii are relative: 1 is the mean norm of the embedding's rows. A packed row is several samples, its documents. Where
# a step has a clean and an adversarial gradient each counts half, so that it is as large as plain training's. FreeLB's
# radius was tried: at 1 the small model learns little beyond the frequencies of words, at 0.3 as much as plainly. The
# others' are about as long.
DEFAULTS: dict[str, dict[str, Any]] = {
    "fgm": {"epsilon": 0.2, "scope": "sample", "clean_weight": 0.5, "adv_weight": 0.5},
    "pgd": {
        "epsilon": 0.2,
        "step_size": 0.1,
        "steps": 2,
        "scope": "sample",
        "clean_weight": 0.5,
        "adv_weight": 0.5,
    },
    "freelb": {"epsilon": 0.3, "step_size": 0.15, "steps": 2, "random_start": 0.15},
    "yopo": {"epsilon": 0.3, "step_size": 0.075, "steps": 2, "inner_steps": 2, "random_start": 0.15},
    "smart": {"epsilon": 0.1, "norm": "l2"},
    "vat": {"epsilon": 0.3, "xi": 1.0},  # far enough for bfloat16 to see
    "neftune": {"alpha": 1.0},
}
ALWAYS: dict[str, Any] = {"relative": True}
BY_ROW = ("sample", "token")  # scopes that do not depend on which rows share a forward
COMMUNICATION = "communication"  # plain training has this option too: when gradients of micro-batches are reduced


def offered() -> list[str]:
    """List the methods, plain training first."""
    return [PLAIN_ONLY, *DEFAULTS]


def parameters(name: str) -> dict[str, Any]:
    """List a method's parameters with their defaults here.

    Raises:
        UserError: pretraining does not offer it.
    """
    if name == PLAIN_ONLY:
        return {COMMUNICATION: "each"}
    if name not in DEFAULTS:
        raise UserError(f"pretraining has no method {name!r}: choose one of {', '.join(offered())}")
    return {**method_options.parameters(name), **ALWAYS, **DEFAULTS[name]}


def arguments(name: str, extra: Sequence[str] = (), own: Sequence[str] = ()) -> dict[str, Any]:
    """Read a method's parameters as a command line gives them, and complete them by the defaults here.

    Args:
        name: of the method.
        extra: such as ("--epsilon", "0.5").
        own: the names of the command's other options, to suggest one of them.

    Raises:
        UserError: an option that the method does not have, or a scope in which rows depend on each other.
    """
    known = parameters(name)
    given = {}
    for option, value in names.pairs(extra).items():
        if option not in known:
            names.refuse(option, [*own, *known])
        given[option] = method_options.literal(value)
    if name == PLAIN_ONLY:
        return given
    scope = given.get("scope", known.get("scope"))
    if scope not in BY_ROW:
        raise UserError(
            f"--scope {scope} puts the rows of a forward in one ball, so that a run would depend on --micro-batch and "
            "on the number of processes: give sample (each document) or token"
        )
    return {**ALWAYS, **DEFAULTS[name], **given}


def make(name: str, model: nn.Module, options: Mapping[str, Any], owner: Owner) -> Method | None:
    """Put a method on a model, which is wrapped already; None: plain training.

    A step that fails ends the run, so gradients of the micro-batches before are not copied (`atomic`).

    Raises:
        UserError: the method refuses its arguments.
    """
    if name == PLAIN_ONLY:
        return None
    try:
        method: Method = method_options.method_class(name)(model, backward=owner, atomic=False, **options)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"{name}: {error}") from None
    return method
