"""Each recipe is short, and its model learns: above chance, and not one answer for everything."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples/recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "toy")
ELSEWHERE = {"torchtitan_trainer"}  # tests/integrations/test_torchtitan.py trains it, with what it needs on a CPU
NEEDS = {
    "deepspeed_zero": "deepspeed",
    "fabric_loop": "lightning",
    "lightning_loop": "lightning",
    "lora": "peft",
    "prompt_tuning": "peft",
    "trl_sft": "trl",
}
SLOW = {
    "accelerate_loop",
    "another_attack",
    "contrastive",
    "fabric_loop",
    "lora",
    "prompt_tuning",
    "semi_supervised",
    "sentence_pairs",
}
LONGEST = {"torchtitan_trainer": 40}  # others 30
MAIN = 'if __name__ == "__main__":'
TRAINED = [pytest.param(r, marks=pytest.mark.slow if r in SLOW else ()) for r in RECIPES if r not in ELSEWHERE]


@pytest.mark.parametrize("recipe", TRAINED)
def test_it_learns(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if recipe in NEEDS:
        pytest.importorskip(NEEDS[recipe])
    monkeypatch.syspath_prepend(str(FOLDER))
    score = runpy.run_path(str(FOLDER / f"{recipe}.py"))["main"]()
    assert score.value > score.chance + 0.2
    assert score.answers > 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_is_short(recipe: str) -> None:
    source = (FOLDER / f"{recipe}.py").read_text()
    docstring = ast.parse(source).body[0]
    code = [line for line in source.splitlines()[docstring.end_lineno :] if line.strip()]
    assert len(code[: code.index(MAIN)] if MAIN in code else code) <= LONGEST.get(recipe, 30)


def test_the_page_links_to_each() -> None:
    page = (ROOT / "docs/recipes.md").read_text()
    assert not [recipe for recipe in RECIPES if f"| `{recipe}.py` |" not in page]
