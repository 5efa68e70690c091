"""What the report says follows from its numbers."""

from __future__ import annotations

from typing import Any

import pytest

from fastadv.train.metrics import wilson
from fastadv.train.verdict import sentences

SAMPLES = 500


def cell(radius: float, right: str) -> dict[str, Any]:
    correct = right.count("1")
    low, high = wilson(correct, len(right))
    counts = {"radius": radius, "correct": correct, "total": len(right), "accuracy": correct / len(right)}
    return {**counts, "low": low, "high": high, "right": right}


def result(clean: tuple[str, str], attacked: tuple[str, str], **more: Any) -> dict[str, Any]:
    conditions = {"host": "a", "processor": "p", "cores": 2, "threads": 2, "session": "1", "resumed": False}
    costs = [
        {"device": "cpu", "seconds_per_step": seconds, "conditions": {**conditions, "others": 0.0}}
        for seconds in (0.5, 0.95)
    ]
    models = {
        name: {"accuracy": [cell(0, clean[index]), cell(0.1, attacked[index])], "cost": costs[index]}
        for index, name in enumerate(("plain", "adversarial"))
    }
    models["adversarial"].update(more)
    return {"settings": {"method": "FGM"}, "models": models}


def marks(share: float, gained: float = 0, lost: float = 0) -> tuple[str, str]:
    """Of 500 samples the first model gets `share`; the second gets some others more, and some of these not."""
    count, more, less = (round(SAMPLES * one) for one in (share, gained, lost))
    first = "1" * count + "0" * (SAMPLES - count)
    second = "0" * less + "1" * (count - less + more) + "0" * (SAMPLES - count - more)
    return first, second


SAME = marks(0.8)


@pytest.mark.parametrize(
    ("clean", "said"),
    [
        (marks(0.8, 0.010, 0.006), "Clean accuracy stays: 80.4 %, and 80.0 % with plain training (+0.4 points ["),
        (marks(0.8, 0.06, 0.05), "Clean accuracy shows no sure difference: 81.0 %"),
        (marks(0.8, 0.08, 0.01), "Clean accuracy rises: 87.0 %"),
        (marks(0.8, 0.01, 0.06), "Clean accuracy falls: 75.0 %, and 80.0 % with plain training (-5.0 points [-"),
    ],
)
def test_clean(clean: tuple[str, str], said: str) -> None:
    assert sentences(result(clean, SAME))[0].startswith(said)


@pytest.mark.parametrize(
    ("attacked", "said"),
    [
        (marks(0.5, 0.10, 0.02), "FGM gains: accuracy is 58.0 % with FGM, and 50.0 % without (+8.0 points [+"),
        (marks(0.5, 0.02, 0.10), "FGM loses: accuracy is 42.0 % with FGM, and 50.0 % without (-8.0 points [-"),
        (marks(0.5, 0.05, 0.04), "no gain is sure: accuracy is 51.0 % with FGM"),
        (marks(0.0), "neither model is right on any sample: measure at smaller radii"),
    ],
)
def test_attacked(attacked: tuple[str, str], said: str) -> None:
    found = sentences(result(SAME, attacked))
    assert found[1].startswith(f"Under the embedding attack of radius 0.1 {said}")
    assert found[-1] == "A step takes 1.9 times as long."
    assert len(found) == 3


def test_few_samples() -> None:
    few = tuple(one[150:190] for one in marks(0.34, 0.03))
    assert "With 40 test samples only differences above some" in sentences(result(few, few))[2]


def test_a_model_that_answers_one_class() -> None:
    """Its accuracy under attack is high, and nothing of the sort is said."""
    found = sentences(result(SAME, marks(0.2, 0.4), only_answer="fresh"))
    assert found[0].startswith("The model of FGM answers 'fresh' whatever it reads.")
    assert not any("gains" in sentence for sentence in found)


def test_a_result_of_an_earlier_version() -> None:
    """No marks, no conditions: the numbers stand without an interval, and the times without a ratio."""
    old = result(SAME, marks(0.5, 0.1))
    for model in old["models"].values():
        del model["cost"]["conditions"]
        for one in model["accuracy"]:
            del one["right"]
    clean, attacked, time = sentences(old)
    assert clean.endswith("(+0.0 points); how sure that is, this result does not tell.")
    assert attacked.endswith("accuracy is 60.0 % with FGM, and 50.0 % without (+10.0 points).")
    assert "not compared: the conditions of the two trainings were not recorded" in time
