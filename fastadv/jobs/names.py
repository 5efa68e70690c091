"""Options by their names: read them from a command line, and suggest one for a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from fastadv.jobs.errors import UserError


def option(name: str) -> str:
    """Spell a name as an option: `attack_steps` is `--attack-steps`."""
    return "--" + name.replace("_", "-")


def pairs(arguments: Sequence[str]) -> dict[str, str | None]:
    """Read `--name value`, `--name=value` and a bare `--name` into a dict with underscores in its names.

    Raises:
        UserError: a value without a name before it.
    """
    found: dict[str, str | None] = {}
    name: str | None = None
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = value if equals else None
        elif name is not None and found[name] is None:
            found[name], name = argument, None
        else:
            raise UserError(f"{argument!r} belongs to no option: see --help")
    return found


def related(name: str, known: Iterable[str]) -> list[str]:
    """Pick the names that have all words of `name`, or no others: `attack_steps` for `step`."""
    words = _words(name)
    return [one for one in known if one != name and ((theirs := _words(one)) <= words or theirs >= words)]


def _words(name: str) -> set[str]:
    return {word.removesuffix("s") for word in name.split("_")}


def suggestion(found: Sequence[str]) -> str:
    """Ask for what was meant."""
    return f"did you mean {' or '.join(option(one) for one in found)}?"


def refuse(name: str, own: Sequence[str], others: Iterable[str] = ()) -> NoReturn:
    """Refuse an option that does not exist. `own` are the command's, `others` those that it passes on.

    Raises:
        UserError: always; it names the nearest one.
    """
    passed_on = list(others)
    found = related(name, own) or related(name, passed_on)
    if not 1 <= len(found) <= 3:  # a word that many have
        found = difflib.get_close_matches(name, [*own, *passed_on], n=1)
    raise UserError(f"there is no option {option(name)}: {suggestion(found) if found else 'see --help'}")


def only(context: Any, *own: str) -> None:
    """Refuse other options beside --resume: the run keeps its settings, so they would be ignored.

    Args:
        context: of the command, as typer gives it.
        *own: the options that a run which goes on takes.

    Raises:
        UserError: it was given others.
    """
    given = [
        name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    others = [option(name) for name in given if name not in own]
    others += [one for one in context.args if one.startswith("--")]
    if others:
        raise UserError(f"--resume continues with the settings of the run: leave out {', '.join(others)}")
