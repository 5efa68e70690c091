"""What is said of a result: also where plain training is better."""

from __future__ import annotations

from typing import Any

import pytest

from fastadv.pretrain import report, tables, verdict
from fastadv.pretrain.intervals import Interval

DOCUMENTS, TOKENS = 50, 40
CONDITIONS = {
    "host": "here",
    "processor": "one",
    "cores": 2,
    "threads": 2,
    "session": "1",
    "resumed": False,
    "others": 0.0,
}


def cell(kind: str, size: float, loss: float) -> dict[str, Any]:
    """Documents around a mean loss, each as far from it in every model."""
    losses = [TOKENS * (loss + 0.01 * (number % 7 - 3)) for number in range(DOCUMENTS)]
    number = 2.718281828**loss
    return {
        "kind": kind,
        "size": size,
        "perplexity": number,
        "low": 0.98 * number,
        "high": 1.02 * number,
        "documents": DOCUMENTS,
        "losses": losses,
        "tokens_each": [TOKENS] * DOCUMENTS,
    }


def training(clean: float, attacked: float, noisy: float, seconds: float, **cost: Any) -> dict[str, Any]:
    return {
        "measured": [cell("clean", 0.0, clean), cell("attack", 0.5, attacked), cell("noise", 0.05, noisy)],
        "cost": {
            "steps": 100,
            "tokens": 1000,
            "seconds": seconds,
            "seconds_per_token": seconds / 1000,
            "attack_share": 0.0,
            "peak_memory": 10**9,
            "device": "cpu",
            "conditions": CONDITIONS,
            **cost,
        },
    }


def result(**trainings: Any) -> dict[str, Any]:
    return {
        "command": "fastadv pretrain <small>",
        "finished": "2026-01-01T00:00:00+00:00",
        "settings": {
            "method": "freelb",
            "method_name": "FreeLB",
            "method_arguments": {},
            "attack_steps": 5,
            "length": 128,
            "objective": "causal",
        },
        "data": {"text": "some <text>", "documents": 900, "tokens": 10**5, "held_out": 50, "vocabulary": 2048},
        "model": {"class": "LlamaForCausalLM", "parameters": 10**6},
        "processes": 1,
        "versions": {},
        "hardware": "a processor",
        "trainings": trainings,
    }


PLAIN = training(4.0, 5.0, 4.5, 10.0)
FREELB = training(4.1, 4.6, 4.5, 20.0, attack_share=0.5)


def test_better_and_worse() -> None:
    first, cost = verdict.sentences(result(plain=PLAIN, adversarial=FREELB))
    assert first == (
        "Against as many steps of plain training, FreeLB is better under the attack of radius 0.5 (x 0.67); worse on "
        "held-out text (x 1.11); hardly or not surely different on misspelt text (x 1.00)."
    )
    assert cost.startswith("A token takes 2.0 times as long in FreeLB: 50 % of that training's time")


@pytest.mark.parametrize(
    ("longer", "said"),
    [
        ((3.5, 4.5, 4.0), "nothing measured here speaks for FreeLB: its time is better spent on more plain steps"),
        ((3.8, 4.9, 4.3), "the time buys one or the other"),
        ((4.2, 4.9, 4.6), "FreeLB is worth its time here"),
    ],
)
def test_what_the_time_would_have_bought(longer: tuple[float, float, float], said: str) -> None:
    found = verdict.sentences(result(plain=PLAIN, adversarial=FREELB, longer=training(*longer, 20.0, steps=200)))
    assert "plain training for the same time (200 steps)" in found[2]
    assert said in found[3]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((0.9, 0.8, 0.97), verdict.BETTER),
        ((0.9, 0.8, 1.01), verdict.UNSURE),
        ((0.998, 0.997, 0.999), verdict.UNSURE),
        ((1.1, 1.01, 1.2), verdict.WORSE),
        ((1.1, 0.99, 1.2), verdict.UNSURE),
    ],
)
def test_only_what_is_sure_and_not_tiny_is_said(change: tuple[float, float, float], said: str) -> None:
    assert verdict.judged(Interval(*change)) == said


def test_times_that_cannot_be_compared() -> None:
    crowded = {**FREELB, "cost": {**FREELB["cost"], "conditions": {**CONDITIONS, "threads": 1}}}
    assert (
        "not compared: they ran with 2 and 1 threads" in verdict.sentences(result(plain=PLAIN, adversarial=crowded))[1]
    )


def test_one_training_alone() -> None:
    for alone in (result(plain=PLAIN), result(adversarial=PLAIN)):
        (said,) = verdict.sentences(alone)
        assert said.endswith("on held-out text 54.6; under the attack of radius 0.5 148; on misspelt text 90.")
        assert len(tables.headings(alone)) == 2 == len(tables.lines(alone)[0])


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        (training(7.0, 7.5, 7.0, 1.0), "hardly learnt: its perplexity is 1,097 with a vocabulary of 2,048"),
        (training(4.0, 4.01, 4.5, 1.0), "hardly moves the plain model"),
        (training(4.0, 8.0, 4.5, 1.0), "leaves nothing of the plain model"),
        (PLAIN, ""),
    ],
)
def test_doubts(plain: dict[str, Any], said: str) -> None:
    found = " ".join(verdict.doubts(result(plain=plain, adversarial=FREELB)))
    assert said in found
    assert bool(said) == bool(found)


def test_a_method_that_is_too_strong() -> None:
    strong = training(4.5, 4.6, 4.7, 20.0)
    assert "FreeLB keeps the model from learning" in " ".join(verdict.doubts(result(plain=PLAIN, adversarial=strong)))


def test_the_page() -> None:
    whole = result(plain=training(7.0, 7.5, 7.0, 1.0), adversarial=FREELB, longer=training(3.5, 4.5, 4.0, 20.0))
    text = report.compose(whole, [])
    assert "some &lt;text&gt;" in text
    assert text.index('class="warnings"') < text.index('class="verdict"') < text.index("<table>")
    assert text.count("no loss was logged") == 2, "by steps and by seconds"
    for line in (*tables.lines(whole), *tables.costs(whole)):
        for one in line:
            assert one in text
