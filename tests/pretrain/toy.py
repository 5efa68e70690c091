"""A pretraining that takes a second: rows of uneven documents by formula, a model of some thousand weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastadv.jobs.stop import Stop
from fastadv.pretrain import methods
from fastadv.pretrain.loader import Loader
from fastadv.pretrain.masking import Masking
from fastadv.pretrain.optimizer import whole
from fastadv.pretrain.processes import Processes
from fastadv.pretrain.rows import Row, packed
from fastadv.pretrain.settings import Settings
from fastadv.pretrain.trainer import Trained, pretrain

VOCABULARY = 50
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "causal": {"model_type": "llama", "num_key_value_heads": 2, **SIZE},
    "masked": {
        "model_type": "bert",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **SIZE,
    },
    "dropout": {"model_type": "llama", "num_key_value_heads": 2, "attention_dropout": 0.2, **SIZE},
}


class Numbers:
    """A tokenizer as far as a training looks at it."""

    pad_token_id, eos_token_id, bos_token_id, mask_token_id = 0, 1, None, 2
    all_special_ids: ClassVar[list[int]] = [0, 1, 2]

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(VOCABULARY)}


class Rows:
    """Row r, by formula: tokens that mostly follow from the one before, in one to four documents."""

    def __init__(self, length: int) -> None:
        self.length = length

    def row(self, number: int) -> Row:
        drawn = np.random.default_rng([7, number])
        ids = drawn.integers(3, VOCABULARY, self.length)
        follows = drawn.random(self.length) < 0.7
        for place in range(1, self.length):
            if follows[place]:
                ids[place] = (ids[place - 1] * 7 + 3) % (VOCABULARY - 3) + 3
        cuts = np.unique(drawn.integers(1, self.length, drawn.integers(0, 4)))
        return packed(np.split(ids, cuts))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {}


def settings(folder: Path, model: str = "causal", **given: Any) -> Settings:
    """Of a training of ten steps of two or more micro-batches, with warm-up and clipping that is felt."""
    config = folder / f"{model}.json"
    if not config.exists():
        config.write_text(json.dumps(CONFIGS[model]))
    usual = {
        "model": str(config),
        "objective": "masked" if model == "masked" else "causal",
        "length": 24,
        "batch_tokens": 24 * 8,
        "micro_batch": 2,
        "max_steps": 10,
        "warmup_steps": 3,
        "max_grad_norm": 0.5,
        "log_every": 3,
        "save_every": 0,
        "dtype": "float64",
    }
    return Settings(**{**usual, **given})


def loader(wanted: Settings, processes: Processes) -> Loader:
    masking = Masking(Numbers(), wanted.seed) if wanted.objective == "masked" else None
    return Loader(Rows(wanted.length), wanted, masking, rank=processes.rank, world=processes.world)


def train(
    folder: Path,
    wanted: Settings,
    processes: Processes,
    method: str = "freelb",
    extra: Sequence[str] = (),
    *,
    phase: str = "phase",
    resume: bool = False,
) -> Trained:
    """One training in `folder`."""
    with Stop() as stop:
        return pretrain(
            wanted,
            folder,
            phase,
            loader(wanted, processes),
            Numbers(),
            method=method,
            options=methods.arguments(method, extra),
            processes=processes,
            log=folder / "log.jsonl",
            stop=stop,
            resume=resume,
        )


def weights(trained: Trained) -> dict[str, Tensor]:
    """All of them, on every process."""
    return {name: whole(weight.detach()).clone() for name, weight in trained.model.named_parameters()}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest of a weight."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def alone() -> Processes:
    return Processes(torch.device("cpu"))
