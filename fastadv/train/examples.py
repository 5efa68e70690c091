# mypy: disable-error-code="no-untyped-call"
"""Show an attack on a handful of test samples: what it moves, and what both models then answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding

from fastadv.jobs.folders import ADVERSARIAL, PLAIN
from fastadv.train.evaluate import measuring, summed
from fastadv.train.job import Job
from fastadv.train.labels import MULTI_LABEL, REGRESSION, Label, task_of
from fastadv.train.model import label_names, load_checkpoint, place
from fastadv.train.words import Word, words_of

# What the attack of the smallest radius did to a sample, and how many of each are shown.
GAINED, LOST, TURNED, HELD, WRONG = "plain alone", "adversarial alone", "both", "neither", "wrong before"
SHOWN = {GAINED: 2, LOST: 1, TURNED: 1, HELD: 1}
NUMBERS = 3  # samples of a regression that are shown
CHUNK = 8192  # rows of the vocabulary at once


def of_run(job: Job, folder: Path, models: Mapping[str, Any]) -> dict[str, Any]:
    """Attack the first samples of each kind anew, with both models; of numbers, which no attack turns, the first."""
    cells = [models[name]["accuracy"] for name in (PLAIN, ADVERSARIAL)]
    kinds = list(_kinds(*cells))
    chosen = _first(kinds) if kinds else list(range(min(NUMBERS, len(job.test))))
    radius, steps = cells[0][1]["radius"], job.settings.attack_steps
    answers = {}
    for name in (PLAIN, ADVERSARIAL):
        model = place(load_checkpoint(folder / name), models[name]["cost"]["device"])
        answers[name] = attack(model, job.tokenizer, [job.test[index] for index in chosen], radius, steps)
    samples = [
        {
            "index": index,
            "text": job.samples.test[index].text,
            "label": _label(job.samples.test[index].label, job.samples.labels),
            **({"turned": kinds[index]} if kinds else {}),
            "models": {name: found[position] for name, found in answers.items()},
        }
        for position, index in enumerate(chosen)
    ]
    return {"radius": radius, "steps": steps, "counts": Counter(kinds), "samples": samples}


def _label(label: Label, names: Sequence[str]) -> str:
    if isinstance(label, tuple):
        return _joined(names, label)
    return names[label] if isinstance(label, int) else f"{label:.4g}"


def _kinds(plain: Sequence[Mapping[str, Any]], adversarial: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Say of each attacked sample which models the attack turned."""
    marks = [model[position].get("right", "") for model in (plain, adversarial) for position in (0, 1)]
    for before, after, others_before, others_after in zip(*marks, strict=False):  # all samples, but not all attacked
        if "0" in before + others_before:
            yield WRONG
        else:
            yield {"01": GAINED, "10": LOST, "00": TURNED, "11": HELD}[after + others_after]


def _first(kinds: Sequence[str]) -> list[int]:
    """The first samples of each kind: nobody picks them."""
    found = [[index for index, kind in enumerate(kinds) if kind == one][:count] for one, count in SHOWN.items()]
    return [index for indices in found for index in indices]


def attack(
    model: Any, tokenizer: Any, items: Sequence[dict[str, Any]], radius: float, steps: int
) -> list[dict[str, Any]]:
    """Find each sample's perturbation; its answers with and without it, and how far each word has moved."""
    if not items:
        return []
    device = next(model.parameters()).device
    batch: Any = DataCollatorWithPadding(tokenizer)([dict(item) for item in items])
    batch = batch.to(device)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labelled = {**inputs, "labels": batch["labels"]}
    model.eval()
    with measuring(model, radius, steps) as pgd:
        found = pgd.find(lambda: summed(model, labelled), mask=inputs["attention_mask"])
        with torch.no_grad():
            before = model(**inputs).logits
            with found.applied():
                after = model(**inputs).logits
    names, task = label_names(model), task_of(model.config.problem_type)
    moved = found.values[0]
    return [
        {
            "clean": _answer(before[row], names, task),
            "attacked": _answer(after[row], names, task),
            "words": _words(model, tokenizer, inputs["input_ids"][row][mask], moved[row][mask], radius),
        }
        for row, mask in enumerate(inputs["attention_mask"].bool())
    ]


def _answer(logits: Tensor, names: Sequence[str], task: str) -> dict[str, Any]:
    """Read logits [C]: the class and its probability; of several classes the least sure; of a number, the number."""
    if task == REGRESSION:
        return {"answer": f"{float(logits):.4g}"}
    if task == MULTI_LABEL:
        shares = logits.float().sigmoid()
        return {"answer": _joined(names, logits > 0), "probability": _rounded(torch.maximum(shares, 1 - shares).min())}
    shares = logits.float().softmax(-1)
    return {"answer": names[int(shares.argmax())], "probability": _rounded(shares.max())}


def _joined(names: Sequence[str], there: Iterable[Any]) -> str:
    return ", ".join(name for name, one in zip(names, there, strict=True) if one) or "none"


def _rounded(share: Tensor) -> float:
    return round(float(share), 4)


def _words(model: Any, tokenizer: Any, ids: Tensor, moved: Tensor, radius: float) -> list[dict[str, Any]]:
    near = nearest(model.get_input_embeddings(), ids, moved)
    lengths = moved.float().norm(dim=-1)
    return [_word(word, tokenizer, ids, near, lengths, radius) for word in words_of(tokenizer, ids.tolist())]


def _word(word: Word, tokenizer: Any, ids: Tensor, near: Tensor, lengths: Tensor, radius: float) -> dict[str, Any]:
    span = slice(word.start, word.end)
    shown: dict[str, Any] = {"word": word.text, "share": round(float(lengths[span].norm()) / radius, 4)}
    if word.special:
        shown["special"] = True
    if not torch.equal(near[span], ids[span]):
        shown["nearest"] = tokenizer.decode(near[span])
    return shown


@torch.no_grad()
def nearest(embedding: nn.Module, ids: Tensor, moved: Tensor) -> Tensor:
    """Find the token [T] whose embedding is nearest to that of each of `ids` [T], moved by `moved` [T, D]."""
    points = embedding(ids).float() + moved.float()
    rows = len(cast("Tensor", embedding.weight))
    best = torch.full((len(ids),), torch.inf, device=ids.device)
    found = ids.clone()
    for chunk in torch.arange(rows, device=ids.device).split(CHUNK):
        distance, index = torch.cdist(points, embedding(chunk).float()).min(dim=1)
        found = torch.where(distance < best, chunk[index], found)
        best = torch.minimum(best, distance)
    return found
