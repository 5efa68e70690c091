"""Tasks that a model of two layers learns in seconds. The words are numbers, so nothing is downloaded.

Every task gives batches as transformers' collators do: `input_ids`, `attention_mask`, `labels`. An odd word is good,
an even one bad.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

WORDS, LENGTH = 64, 12  # word 0 is padding
BERT = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
LLAMA = {**BERT, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {
    "vocab_size": WORDS,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}

SIZE = {key: BERT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
IMAGES = {**SIZE, "image_size": 16, "patch_size": 4, "num_channels": 1}

Batch = dict[str, Tensor]
Task = Callable[[int, torch.Generator], Batch]


class Score(NamedTuple):
    """How well a model did, what it would get by chance, and how many different answers it gave."""

    value: float
    chance: float
    answers: int


def batches(task: Task, steps: int = 80, rows: int = 32, seed: int = 0) -> Iterator[Batch]:
    """`steps` different batches of a task."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield task(rows, generator)


def unseen(task: Task, rows: int = 256) -> Batch:
    """Samples that no training has seen."""
    return next(batches(task, 1, rows, seed=1))


def accuracy(answers: Tensor, labels: Tensor) -> Score:
    """Share of right answers where there is a label; by chance: by always giving the commonest."""
    answers, labels = answers[labels != -100], labels[labels != -100]
    commonest = labels.unique(return_counts=True)[1].max() / len(labels)
    return Score(float((answers == labels).float().mean()), float(commonest), len(answers.unique()))


def sentences(rows: int, generator: torch.Generator, good: Tensor | None = None) -> Batch:
    """Words at random, padded; where `good` [rows] is 1, four of five are good, where it is 0, bad."""
    ids = torch.randint(1, WORDS // 2, (rows, LENGTH), generator=generator) * 2
    if good is not None:
        odd = torch.rand(rows, LENGTH, generator=generator) < 0.2 + 0.6 * good.unsqueeze(1)
        ids = ids - odd.long()
    mask = (torch.arange(LENGTH) < torch.randint(5, LENGTH + 1, (rows, 1), generator=generator)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def reviews(rows: int, generator: torch.Generator) -> Batch:
    """Classification: is it good?"""
    labels = torch.randint(0, 2, (rows,), generator=generator)
    return {**sentences(rows, generator, labels), "labels": labels}


def names(rows: int, generator: torch.Generator) -> Batch:
    """Token classification: a word above 50 is a person (1), one above 40 a place (2); -100 at padding."""
    batch = sentences(rows, generator)
    person, place = batch["input_ids"] > 50, batch["input_ids"] > 40
    labels = torch.where(person, 1, 2 * place)
    return {**batch, "labels": labels.masked_fill(batch["attention_mask"] == 0, -100)}


def topics(rows: int, generator: torch.Generator) -> Batch:
    """Multi-label: which of three topics (words up to 8, 16, 24) does it touch? Floats, as BCE wants them."""
    labels = torch.randint(0, 2, (rows, 3), generator=generator)
    batch, topic = sentences(rows, generator), torch.randint(0, 4, (rows, LENGTH), generator=generator)
    touched = torch.nn.functional.pad(labels, (0, 1)).gather(1, topic) == 1
    neutral = batch["input_ids"].clamp_min(25)
    ids = torch.where(touched, 8 * topic + batch["input_ids"] % 8 + 1, neutral) * batch["attention_mask"]
    return {**batch, "input_ids": ids, "labels": labels.float()}


def ratings(rows: int, generator: torch.Generator) -> Batch:
    """Regression: how good is it, from -1 to 1? Floats."""
    rating = torch.rand(rows, generator=generator)
    return {**sentences(rows, generator, rating), "labels": 2 * rating - 1}


def pairs(rows: int, generator: torch.Generator) -> Batch:
    """Sentence pairs: is the second one the better one? `token_type_ids` tell them apart."""
    labels = torch.randint(0, 2, (rows,), generator=generator)
    parts = [sentences(rows, generator, good) for good in (1 - labels, labels)]
    batch = {key: torch.cat([part[key] for part in parts], dim=1) for key in parts[0]}
    second = (torch.arange(2 * LENGTH) >= LENGTH).long().expand(rows, -1)
    return {**batch, "token_type_ids": second, "labels": labels}


def verdicts(rows: int, generator: torch.Generator) -> Batch:
    """Sequence to sequence: write one word, 1 for bad or 2 for good."""
    batch = reviews(rows, generator)
    return {**batch, "labels": 1 + batch["labels"].unsqueeze(1)}


def chains(rows: int, generator: torch.Generator) -> Batch:
    """Language modelling: every word is followed by the one seven further on."""
    batch = sentences(rows, generator)
    ids = 1 + (batch["input_ids"][:, :1] + 7 * torch.arange(LENGTH)) % (WORDS - 1)
    mask = batch["attention_mask"]
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def synonyms(rows: int, generator: torch.Generator) -> tuple[Batch, Batch]:
    """Contrastive: a sentence, and one that says the same: each word's synonym is the word 32 further on."""
    batch = sentences(rows, generator)
    ids = (batch["input_ids"] - 1) % 31 + 1
    ids = ids * batch["attention_mask"]
    return {**batch, "input_ids": ids}, {**batch, "input_ids": (ids + 32) * batch["attention_mask"]}


def images(rows: int, generator: torch.Generator) -> Batch:
    """Images of 16 x 16: which quarter is bright? As many of each."""
    labels = torch.arange(rows) % 4
    quarters = torch.nn.functional.one_hot(labels, 4).view(rows, 1, 2, 2).float()
    bright = torch.nn.functional.interpolate(quarters, scale_factor=8)
    return {"pixel_values": bright + 0.5 * torch.randn(rows, 1, 16, 16, generator=generator), "labels": labels}


def pretrained() -> BertForSequenceClassification:
    """A model that has learnt good words from bad ones, and its head again as it was drawn."""
    model = BertForSequenceClassification(BertConfig(**BERT, num_labels=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in batches(reviews, steps=60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.classifier.reset_parameters()
    return model
