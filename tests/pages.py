"""The pages of the documentation: their code, and what it takes as given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import fastadv
from fastadv.train.model import build, tokenizer_of
from tests.train.conftest import save_encoder

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(page for page in DOCS if "results" not in page.parts)]
RUN = "runs/DATE-TIME/adversarial"
CODE = re.compile(r"^```(python|diff)\n(.*?)^```", re.DOTALL | re.MULTILINE)
RUNNABLE = [page for page in PAGES if CODE.search(page.read_text())]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run(page: Path, folder: Path) -> None:
    """Run a page's code from top to bottom, in `folder`, on a BERT of three layers."""
    if RUN in page.read_text():
        save_run(folder / RUN)
    names = surroundings(folder)
    for language, block in CODE.findall(page.read_text()):
        if language == "diff":
            block = "".join(line[1:] for line in block.splitlines(keepends=True) if not line.startswith("-"))
        if "adv.capture(" in block and not torch.cuda.is_available():
            compile(block, page.name, "exec")
        else:
            exec(compile(block, page.name, "exec"), names)


def save_run(folder: Path) -> None:
    """Leave a model as `fastadv train` does."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = save_encoder(folder.parent)
    build(str(encoder), ["bad", "good"], 0.1).save_pretrained(folder)
    tokenizer_of(str(encoder)).save_pretrained(folder)


def surroundings(folder: Path) -> dict[str, Any]:
    """What the pages take as given."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(1, 50, (4, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 0, 1])}

    for _ in range(60):  # it has learnt something, so that a radius can be found
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def losses(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(**batch).logits, batch["labels"], reduction="none")

    return {
        "fastadv": fastadv,
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "loader": [batch, batch],
        "batch": batch,
        "mesh": {"cp": None, "tp": None},  # of one process
        "labelled": batch,
        "unlabelled": {key: value for key, value in batch.items() if key != "labels"},
        "losses": losses,
        "args": TrainingArguments(str(folder), max_steps=2, use_cpu=True, report_to="none", save_strategy="no"),
        "data": [{key: value[row] for key, value in batch.items()} for row in range(4)],
        "accelerator": Accelerator(cpu=True),
    }
