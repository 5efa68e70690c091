"""Members compared by identity: what is missing, more, in another order or merely equal is another."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest

from fastadv import native

pytestmark = pytest.mark.skipif(
    not native.available() or not hasattr(native.extension(), "same_members"), reason="the C++ part is not built"
)
KINDS = ("one", "two")
A, B, C = [1], [2], [2]  # B equals C


def same(fields: list[Any], known: list[Any]) -> bool:
    found: bool = native.extension().same_members(fields, KINDS, known)
    return found


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ([A, C, B, None], True), ([A, B, B, None], False), ([C, A, B, None], False), ([A, C, B], False),
        ([A, C, B, None, None], False), ([], False),
    ],
)  # fmt: skip
def test_of_two_modules(known: list[Any], expected: bool) -> None:
    fields = [{"one": {"a": A}, "two": OrderedDict(b=B)}, {"two": {"nothing": None}, "one": {"c": C}, "more": 1}]
    assert same(fields, known) is expected


@pytest.mark.parametrize("fields", [[{"one": {}}], [{"one": {}, "two": [A]}], [A], [None]])
def test_members_that_are_elsewhere(fields: list[Any]) -> None:
    assert not same(fields, [])


def test_nothing_is_the_same_as_nothing() -> None:
    assert same([], []) and same([{"one": {}, "two": {}}], [])


def test_a_name_that_cannot_be_looked_up() -> None:
    with pytest.raises(TypeError):
        native.extension().same_members([{}], ([],), [])
