"""A small part of the campaign of kills."""

from __future__ import annotations

import pytest

from tests.campaigns.kills import Command, kills


@pytest.mark.slow
@pytest.mark.parametrize(("command", "count"), [("train", 5), ("compare", 2), ("sweep", 2)])
def test_kills(command: Command, count: int) -> None:
    found = kills(command, count, seed=0)
    assert found["kills"] == count
    assert not found["not_resumable"] and not found["differ"], "\n".join(found["lines"])
