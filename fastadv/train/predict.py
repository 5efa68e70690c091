# mypy: disable-error-code="no-untyped-call"
"""Answer texts with a trained model: `fastadv predict`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from fastadv.jobs.errors import UserError
from fastadv.jobs.shown import visible_json
from fastadv.jobs.surroundings import quiet
from fastadv.train.model import check_length, check_tokens, label_names, load_where_it_runs, longest, tokenizer_of
from fastadv.train.sources import Columns, file_rows, half

BATCH = 64
POOL = 32 * BATCH  # so many texts are sorted by length before they are cut into batches
STDIN = "-"


def texts_of(given: Sequence[str], data: str | None, column: str, skip_empty: bool = False) -> list[str]:
    """List the texts of the command line, or of a file; `data` "-" is standard input, a text a line.

    Raises:
        UserError: there are none, or both; the file cannot be read.
    """
    if given and data is not None:
        raise UserError("give texts or --data, not both")
    if data == STDIN:
        texts = _lines_of_stdin()
    elif data is not None:
        columns = Columns(text=column, label=column, skip_empty=skip_empty)  # no label is needed
        texts = [row.text for row in file_rows(data, columns).rows]
    else:
        texts = list(given)
    if any(map(half, texts)):
        raise UserError("a text holds half a character, or bytes that are not UTF-8: convert it")
    if not texts:
        raise UserError('no texts: give some, such as fastadv predict RUN "a warm film", or a file with --data')
    return texts


def _lines_of_stdin() -> list[str]:
    try:
        return [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding} ({error.reason}): convert it") from None


class Predictor:
    """Hold a model that is ready to answer. `max_length`: as in training by default.

    Raises:
        UserError: `folder` holds no model of `fastadv train`.
    """

    def __init__(self, folder: Path, max_length: int | None = None) -> None:
        quiet(offline=True)
        if max_length is not None and max_length < 3:
            raise UserError(f"--max-length must be at least 3, not {max_length}")
        self.model = load_where_it_runs(folder).eval()
        self.folder = folder
        check_length(self.model.config, max_length, folder)
        self.tokenizer = tokenizer_of(str(folder))
        self.max_length = longest(self.tokenizer, max_length)

    def __call__(self, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield the answer to each text, in their order."""
        labels, problem = label_names(self.model), self.model.config.problem_type
        with tqdm(total=len(texts), unit="text", disable=None, leave=False) as bar:
            for start in range(0, len(texts), POOL):
                pool = texts[start : start + POOL]
                for text, logits in zip(pool, self._logits(pool, bar), strict=True):
                    yield {"text": text, **answer(logits, labels, problem)}

    def _logits(self, pool: Sequence[str], bar: Any) -> list[Tensor]:
        """Compute the logits of each text, in batches of similar length."""
        order = sorted(range(len(pool)), key=lambda index: len(pool[index]))
        found: dict[int, Tensor] = {}
        for first in range(0, len(pool), BATCH):
            chosen = order[first : first + BATCH]
            texts = [pool[index] for index in chosen]
            batch = self.tokenizer(
                texts, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
            ).to(self.model.device)
            check_tokens(self.model, batch["input_ids"].tolist(), self.folder)
            with torch.inference_mode():
                logits = self.model(batch["input_ids"], batch["attention_mask"]).logits
            found.update(zip(chosen, logits.float().cpu(), strict=True))
            bar.update(len(chosen))
        return [found[index] for index in range(len(pool))]


def answer(logits: Tensor, labels: Sequence[str], problem: str | None) -> dict[str, Any]:
    """Lay out the logits of one text by the model's `problem_type`."""
    if problem == "regression":
        values = logits.tolist()
        return {"score": values[0]} if len(labels) == 1 else {"scores": dict(zip(labels, values, strict=True))}
    if problem == "multi_label_classification":
        scores = dict(zip(labels, logits.sigmoid().tolist(), strict=True))
        return {"labels": [name for name, score in scores.items() if score >= 0.5], "scores": scores}
    scores = dict(zip(labels, logits.softmax(-1).tolist(), strict=True))
    best = labels[int(logits.argmax())]
    return {"label": best, "score": scores[best], "scores": scores}


def write(answers: Iterator[dict[str, Any]], output: Path | None) -> None:
    """Write JSON Lines to a file, or to standard output.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        opened = nullcontext(sys.stdout) if output is None else output.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}): check the path") from None
    with opened as file:
        for one in answers:
            file.write(visible_json(json.dumps(one, ensure_ascii=False)) + "\n")
            file.flush()
