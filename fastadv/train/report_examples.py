"""The report's examples: each word shaded by how far the attack moved it, and what both models answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastadv.jobs import page
from fastadv.jobs.folders import ADVERSARIAL, PLAIN
from fastadv.train.examples import GAINED, HELD, LOST, TURNED, WRONG

LONGEST = 80  # words that are shown of a text


def section(result: Mapping[str, Any]) -> str:
    """Write the section; nothing where the result has no examples."""
    examples = result.get("examples")
    if not examples or not examples["samples"]:
        return ""
    names = {PLAIN: "plain", ADVERSARIAL: result["settings"]["method"]}
    parts = [
        "<h2>The attack, sample by sample</h2>",
        page.paragraph(_counts(examples, names)),
        page.paragraph(_legend(examples), "quiet"),
        *(_sample(sample, names) for sample in examples["samples"]),
    ]
    return "\n".join(parts)


def _counts(examples: Mapping[str, Any], names: Mapping[str, str]) -> str:
    counts = examples["counts"]
    if not counts:
        return f"The first test samples, attacked at radius {examples['radius']:g}."
    parts = [f"{counts.get(kind, 0):,} {text}" for kind, text in _kinds(names).items()]
    wrong = counts.get(WRONG, 0)
    return (
        f"Of the {sum(counts.values()):,} attacked test samples at radius {examples['radius']:g} the attack turns "
        f"{', '.join(parts)}. {wrong:,} were wrong before, for at least one of the models. Below are the first of each "
        "kind, in the order of the test data."
    )


def _kinds(names: Mapping[str, str]) -> dict[str, str]:
    return {
        GAINED: f"for the {names[PLAIN]} model alone",
        LOST: f"for the model of {names[ADVERSARIAL]} alone",
        TURNED: "for both",
        HELD: "for neither",
    }


def _legend(examples: Mapping[str, Any]) -> str:
    near = [word for sample in examples["samples"] for model in sample["models"].values() for word in model["words"]]
    changed = sum("nearest" in word for word in near)
    return (
        "The attack moves the embeddings of a text, not its letters. The darker a word, the more of the radius it "
        "takes: its shift's length over the radius. Each model is attacked by a perturbation of its own. "
        + (
            f"{changed:,} of the {len(near):,} words come to lie nearest to another word of the vocabulary (after ->)."
            if changed
            else "However far it moved, each word below is still nearest to its own place in the vocabulary: written "
            "out, the attacked texts are the same texts."
        )
    )


def _sample(sample: Mapping[str, Any], names: Mapping[str, str]) -> str:
    turned = f"Turned {_kinds(names)[sample['turned']]}. " if "turned" in sample else ""
    title = f"{turned}Right answer: {sample['label']}"
    right = sample["label"] if turned else None
    models = "".join(_model(names[name], model, right) for name, model in sample["models"].items())
    return f'<div class="sample"><h3>{page.text(title)}</h3>{models}</div>'


def _model(name: str, model: Mapping[str, Any], right: str | None) -> str:
    """`right`: None for a number, which is not right or wrong."""
    clean, attacked = model["clean"], model["attacked"]
    kind = ' class="turned"' if right is not None and attacked["answer"] != right else ""
    answers = f"{page.text(name)}: {_answer(clean)}, attacked <span{kind}>{_answer(attacked)}</span>"
    words = model["words"]
    shown = " ".join(_word(word) for word in words[:LONGEST])
    more = f" and {len(words) - LONGEST:,} more words" if len(words) > LONGEST else ""
    return f'<p>{answers}</p><p class="moved">{shown}{more}</p>'


def _answer(answer: Mapping[str, Any]) -> str:
    share = f" ({100 * answer['probability']:.0f} %)" if "probability" in answer else ""
    return page.text(f"{answer['answer']}{share}")


def _word(word: Mapping[str, Any]) -> str:
    share = min(1.0, word["share"])
    kind = ' class="special"' if word.get("special") else ""
    text = page.text(word["word"])
    if "nearest" in word:
        text += f" -&gt; {page.text(word['nearest'])}"
    return f'<span{kind} style="background: rgba(234, 88, 12, {share:.2f})" title="{100 * share:.0f} %">{text}</span>'
