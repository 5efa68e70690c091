"""Say in a few sentences what a result means. Every word of them follows from result.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastadv.jobs.conditions import obstacles
from fastadv.jobs.folders import ADVERSARIAL, PLAIN
from fastadv.pretrain.intervals import Interval, ratio
from fastadv.pretrain.measured import ATTACK, CLEAN
from fastadv.pretrain.settings import LONGER
from fastadv.pretrain.tables import number

LEARNT = 0.25  # of the vocabulary: a perplexity above it is hardly any learning
BEHIND = 1.3  # times plain training's perplexity: the method has kept the model from learning
WEAK = 1.05  # an attack that raises plain training's perplexity by less shows nothing
FAR = 1.0  # of the vocabulary: an attack that takes plain training there destroys it
TINY = 0.005  # a perplexity that is another by less is about the same
BETTER, WORSE, UNSURE = "better", "worse", "hardly or not surely different"


def sentences(result: Mapping[str, Any]) -> list[str]:
    """Sum a result up: what the adversarial training is better and worse at, and what it cost."""
    trainings = result["trainings"]
    if ADVERSARIAL not in trainings:
        return [_alone(trainings[PLAIN], "plain training")]
    method, adversarial = result["settings"]["method_name"], trainings[ADVERSARIAL]
    if PLAIN not in trainings:
        return [_alone(adversarial, method)]
    plain = trainings[PLAIN]
    found = [_against(method, adversarial, plain, "as many steps of plain training"), _cost(method, adversarial, plain)]
    if LONGER in trainings:
        steps = trainings[LONGER]["cost"]["steps"]
        found.append(
            _against(method, adversarial, trainings[LONGER], f"plain training for the same time ({steps:,} steps)")
        )
        found.append(_worth(method, adversarial, trainings[LONGER]))
    return found


def _alone(training: Mapping[str, Any], name: str) -> str:
    shown = "; ".join(f"{_what(cell)} {number(cell['perplexity'])}" for cell in training["measured"])
    return f"Perplexity of {name}: {shown}."


def _against(method: str, adversarial: Mapping[str, Any], plain: Mapping[str, Any], which: str) -> str:
    """Say at what the adversarial model is better, at what worse, and by how much its perplexity is another."""
    found: dict[str, list[str]] = {}
    for cell, change in _changes(adversarial, plain):
        found.setdefault(judged(change), []).append(f"{_what(cell)} (x {change.value:.2f})")
    parts = [f"{word} {_listed(found[word])}" for word in (BETTER, WORSE, UNSURE) if word in found]
    return f"Against {which}, {method} is {'; '.join(parts)}."


def _changes(adversarial: Mapping[str, Any], plain: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Interval]]:
    """List what was measured, with the ratio of the perplexities."""
    pairs = zip(plain["measured"], adversarial["measured"], strict=True)
    return [(one, ratio(one, other)) for one, other in pairs]


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def judged(change: Interval) -> str:
    """Judge a ratio of perplexities: only an interval that leaves 1 out says anything, and tiny changes say little."""
    if abs(change.value - 1) < TINY:
        return UNSURE
    return BETTER if change.high < 1 else WORSE if change.low > 1 else UNSURE


def _what(cell: Mapping[str, Any]) -> str:
    if cell["kind"] == CLEAN:
        return "on held-out text"
    if cell["kind"] == ATTACK:
        return f"under the attack of radius {cell['size']:g}"
    return "on misspelt text"


def _cost(method: str, adversarial: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    one, other = plain["cost"], adversarial["cost"]
    reasons = obstacles(one, other)
    if reasons:
        return f"The times of the trainings are not compared: {' and '.join(reasons)}."
    share = f"{100 * other['attack_share']:.0f} % of that training's time is for passes that plain training has not"
    return (
        f"A token takes {other['seconds_per_token'] / one['seconds_per_token']:.1f} times as long in {method}: {share}."
    )


def _worth(method: str, adversarial: Mapping[str, Any], longer: Mapping[str, Any]) -> str:
    """Say what speaks for the adversarial training once plain training is given its time."""
    judgements = {judged(change) for _, change in _changes(adversarial, longer)}
    if BETTER not in judgements:
        return f"So nothing measured here speaks for {method}: its time is better spent on more plain steps."
    if WORSE not in judgements:
        return f"So {method} is worth its time here: more plain steps are better at nothing that was measured."
    return f"So the time buys one or the other: what {method} is better at, or what more plain steps are better at."


def doubts(result: Mapping[str, Any]) -> list[str]:
    """Warn of a model that has hardly learnt, and of attacks that show nothing."""
    name, training = next(iter(result["trainings"].items()))
    clean, *others = training["measured"]
    size, found = result["data"]["vocabulary"], []
    if clean["perplexity"] > LEARNT * size:
        found.append(
            f"The model has hardly learnt: its perplexity is {number(clean['perplexity'])} with a vocabulary of "
            f"{size:,}. Train longer (--max-steps) before you compare anything."
        )
    if ADVERSARIAL in result["trainings"] and not found:
        theirs = result["trainings"][ADVERSARIAL]["measured"][0]["perplexity"]
        if theirs > BEHIND * clean["perplexity"]:
            method = result["settings"]["method_name"]
            found.append(f"{method} keeps the model from learning: take a smaller radius (--epsilon), or --start-step.")
    attacked = [cell for cell in others if cell["kind"] == ATTACK]
    if name == PLAIN and clean["perplexity"] <= LEARNT * size and attacked:
        strongest, weakest = attacked[-1]["perplexity"], attacked[0]["perplexity"]
        if strongest < WEAK * clean["perplexity"]:
            found.append(
                "The attack hardly moves the plain model, so that it shows little: give larger --attack-radii."
            )
        elif weakest > FAR * size:
            found.append("The attack leaves nothing of the plain model at any radius: give smaller --attack-radii.")
    return found
