"""Read what a JSON file holds by the types that are declared for it, before anything takes it for granted."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from fastadv.jobs.errors import UserError

Made = TypeVar("Made")
LONGEST = 60  # characters of a value that an error shows


class _Wrong(Exception):  # noqa: N818 - turned into a UserError, which names the file
    """Say what does not fit, and where."""


def read(value: Any, kind: type[Made], file: object, advice: str) -> Made:
    """Check `value` against a TypedDict or a dataclass; of a dataclass make one, with its defaults.

    A TypedDict may hold more than it declares, a dataclass may not: its fields are all that this version knows.

    Raises:
        UserError: a key is missing or unknown, or a value is of another type. It names `file`, the key, and `advice`.
    """
    try:
        return cast("Made", _read(value, kind, ""))
    except _Wrong as wrong:
        raise UserError(f"{file} is damaged, or written by another program or version: {wrong}. {advice}") from None


def _read(value: Any, kind: Any, place: str) -> Any:
    if kind is Any:
        return value
    origin = get_origin(kind)
    for of, reader in _READERS.items():
        if origin is of:
            return reader(value, kind, place)
    if dataclasses.is_dataclass(kind):
        return _dataclass(value, kind, place)
    if hasattr(kind, "__required_keys__"):
        return _typed_dict(value, kind, place)
    return _plain(value, kind, place)


def _plain(value: Any, kind: Any, place: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise _Wrong(f"{place} is too large a number") from None
    if kind is type(None):
        kind = types.NoneType
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _Wrong(f"{_named(place)} must be {_NAMES.get(kind, kind.__name__)}, not {_shown(value)}")
    return value


def _dataclass(value: Any, kind: Any, place: str) -> Any:
    given, hints = _plain(value, dict, place), get_type_hints(kind)
    unknown = [name for name in given if name not in hints]
    if unknown:
        raise _Wrong(f"there is no {_at(place, unknown[0])}")
    return kind(**{name: _read(one, hints[name], _at(place, name)) for name, one in given.items()})


def _typed_dict(value: Any, kind: Any, place: str) -> Any:
    given, hints = _plain(value, dict, place), get_type_hints(kind)
    missing = sorted(kind.__required_keys__ - set(given))
    if missing:
        raise _Wrong(f"{_at(place, missing[0])} is missing")
    return {**given, **{name: _read(given[name], hints[name], _at(place, name)) for name in hints if name in given}}


def _list(value: Any, kind: Any, place: str) -> list[Any]:
    (inner,) = get_args(kind)
    return [_read(one, inner, f"{place}[{index}]") for index, one in enumerate(_plain(value, list, place))]


def _tuple(value: Any, kind: Any, place: str) -> tuple[Any, ...]:
    return tuple(_list(value, list[get_args(kind)[0]], place))  # type: ignore[misc]


def _dict(value: Any, kind: Any, place: str) -> dict[str, Any]:
    _, inner = get_args(kind)
    return {name: _read(one, inner, _at(place, name)) for name, one in _plain(value, dict, place).items()}


def _union(value: Any, kind: Any, place: str) -> Any:
    *others, last = sorted(get_args(kind), key=lambda one: one is not types.NoneType)
    for one in others:
        try:
            return _read(value, one, place)
        except _Wrong:
            continue
    return _read(value, last, place)


def _literal(value: Any, kind: Any, place: str) -> Any:
    if not isinstance(value, str) or value not in get_args(kind):
        raise _Wrong(f"{place} must be one of {', '.join(get_args(kind))}, not {_shown(value)}")
    return value


_READERS: Mapping[Any, Callable[[Any, Any, str], Any]] = {
    list: _list, tuple: _tuple, dict: _dict, Union: _union, types.UnionType: _union, Literal: _literal,
}  # fmt: skip
_NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def _at(place: str, name: str) -> str:
    return f"{place}.{name}" if place else str(name)


def _named(place: str) -> str:
    return place or "all of it"


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return _NAMES[type(value)]
    shown = repr(value)
    return shown if len(shown) <= LONGEST else shown[:LONGEST] + "..."
