"""The methods that pretraining offers, and their parameters as options. Light: read before torch is loaded."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from fastadv.jobs import names
from fastadv.jobs.errors import UserError
from fastadv.jobs.method_options import literal, parameters, signature_of

# By document, with radii in mean norms of the embedding's rows: both stay what they are when batch or model changes.
_BALL = {"scope": "sample", "relative": True}
OFFERED: dict[str, dict[str, Any]] = {
    "fgm": {"epsilon": 1.0, **_BALL},
    "pgd": {"epsilon": 1.0, "step_size": 0.5, "steps": 2, **_BALL},
    "freelb": {"epsilon": 1.0, "step_size": 0.5, "random_start": 0.5, "steps": 2, **_BALL},
    "yopo": {"epsilon": 1.0, "step_size": 0.3, "random_start": 0.3, **_BALL},
    "smart": {"relative": True},
    "vat": {"relative": True},
    "neftune": {},
}
TAKEN = ("embedding", "emb_name", "alpha", "tied", "fused", "atomic", "split")  # of a script's, or decided here


def method_parameters(name: str) -> dict[str, Any]:
    """List the parameters of a method that can be given, with their defaults in this job; none of plain training.

    Raises:
        UserError: pretraining does not offer such a method.
    """
    from fastadv.pretrain.settings import PLAIN_ONLY

    if name == PLAIN_ONLY:
        return {}
    if name not in OFFERED:
        raise UserError(f"pretraining offers no method {name!r}: choose one of {', '.join([PLAIN_ONLY, *OFFERED])}")
    own = {key: value for key, value in parameters(name).items() if key not in TAKEN}
    return {**own, **OFFERED[name]}


def given(extra: Sequence[str], method: str, own: Sequence[str] = ()) -> dict[str, Any]:
    """Read the options that are a method's parameters.

    Args:
        extra: as the command line has them.
        method: its name.
        own: the names of the options that the command declares itself, to suggest one of them.

    Raises:
        UserError: an option that is none; it names the nearest one, or the methods that have it.
    """
    accepted = method_parameters(method)
    found: dict[str, Any] = {}
    for name, value in names.pairs(extra).items():
        if name not in accepted:
            _refuse(name, method, accepted, own)
        found[name] = literal(value)
    return found


def _refuse(name: str, method: str, accepted: Mapping[str, Any], own: Sequence[str]) -> None:
    owners = [other for other in OFFERED if name in method_parameters(other)]
    if not owners:
        names.refuse(name, [*own, *accepted])
    near = names.related(name, own)
    hint = f"; {names.suggestion(near)}" if near else ""
    who = signature_of(method).name if method in OFFERED else f"{method} training"
    takes = f"it takes {', '.join(map(names.option, accepted))}" if accepted else "it takes none"
    of = ", ".join(signature_of(one).name for one in owners)
    raise UserError(f"{names.option(name)} is no parameter of {who} (of {of}); {takes}{hint}")


def arguments(extra: Sequence[str], method: str) -> dict[str, Any]:
    """Complete what was given by this job's defaults: what the method's class is made with.

    Raises:
        UserError: see `given`.
    """
    return {**OFFERED.get(method, {}), **given(extra, method)}


def listing() -> str:
    """List the methods with their parameters, for `fastadv pretrain --help`."""
    lines = ["Parameters of the methods, with their defaults in this job:"]
    for name in OFFERED:
        # "\xa0" keeps an option and its value on one line.
        shown = [f"{names.option(key)}\xa0{value}" for key, value in method_parameters(name).items()]
        text = textwrap.fill(
            f"{name}: {', '.join(shown)}", 76, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
        )
        lines += text.replace("\xa0", " ").splitlines()
    return "\n".join(lines)
