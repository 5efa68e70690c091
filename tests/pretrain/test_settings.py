"""The options: declared once, and told alike by the page and the command."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from fastadv.jobs import typed
from fastadv.jobs.errors import UserError
from fastadv.jobs.names import option
from fastadv.pretrain.settings import Settings, check, options

PAGE = (Path(__file__).parents[2] / "docs/pretraining.md").read_text()
ON = ("plain", "same_time")  # which the page shows by how they are turned off


def test_the_defaults_can_be() -> None:
    check(Settings())
    check(Settings(max_steps=1, warmup_steps=100))


def test_they_survive_json() -> None:
    chosen = Settings(extra=("--epsilon", "1"), warmup_steps=7, eval_data="more.txt")
    assert typed.read(json.loads(json.dumps(asdict(chosen))), Settings, "settings.json", "") == chosen


def test_every_option_is_on_the_page() -> None:
    for name in options():
        shown = f"--no-{name.replace('_', '-')}" if name in ON else option(name)
        assert f"`{shown}`" in PAGE, name


@pytest.mark.parametrize("name", ["held_out", "vocab_size", "length", "max_steps", "batch_tokens", "micro_batch"])
def test_the_page_has_the_defaults(name: str) -> None:
    (line,) = (one for one in PAGE.splitlines() if one.startswith(f"| `{option(name)}` |"))
    assert line.split("|")[-2].strip() == str(getattr(Settings(), name))


@pytest.mark.parametrize(
    "one", [one for one in fields(Settings) if one.metadata.get("least") is not None], ids=lambda f: f.name
)
def test_bounds(one: object) -> None:
    name, least, most = one.name, one.metadata["least"], one.metadata["most"]  # type: ignore[attr-defined]
    for value in (least - 1, most * 2 + 1, float("nan")):
        with pytest.raises(UserError, match=f"^{option(name)} must be"):
            check(Settings(**{name: value}))


def test_warm_up_by_share_and_by_steps() -> None:
    assert Settings(max_steps=200, warmup_steps=0.05).warmup == 10
    assert Settings(max_steps=200, warmup_steps=30).warmup == 30
    assert Settings(max_steps=6).warmup == 0
