# mypy: disable-error-code="no-untyped-call"
"""Make the model that is pretrained, from a transformers config: new weights, the same on every process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from fastadv.jobs.errors import UserError, loading
from fastadv.pretrain.settings import SMALL, Settings
from fastadv.pretrain.tokenizer import vocabulary_size

DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}  # of weights
SIZE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}
HEADS = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}


def config_of(settings: Settings, tokenizer: Any) -> PreTrainedConfig:
    """Read the config, and fit it to the tokenizer: size of the vocabulary, special tokens.

    A vocabulary that is trained on the text replaces the config's size. One that is given may be smaller than it.

    Raises:
        UserError: the config cannot be read, or has fewer tokens or positions than are asked of it.
    """
    config = _small(settings) if settings.model == SMALL else read_config(settings.model)
    size = vocabulary_size(tokenizer)
    if settings.model == SMALL or settings.tokenizer is None:
        config.vocab_size = size
    elif config.vocab_size < size:
        raise UserError(
            f"{settings.model} has {config.vocab_size} tokens and the tokenizer {settings.tokenizer} {size}: give the "
            "tokenizer of that model, or leave --tokenizer out to train one"
        )
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(tokenizer, name, None))
    config.use_cache = False
    places = getattr(config, "max_position_embeddings", None)
    if places is not None and places < settings.length:
        raise UserError(f"{settings.model} has {places} positions: --length {settings.length} needs as many")
    return config


def build(settings: Settings, tokenizer: Any) -> nn.Module:
    """Draw new weights by the seed, on the CPU and in float32, whatever the training's precision and device are.

    Raises:
        UserError: see `config_of`; or the architecture has no head for the objective.
    """
    config = config_of(settings, tokenizer)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model: nn.Module = HEADS[settings.objective].from_config(config, dtype=torch.float32)
    except ValueError as error:
        if "Unrecognized configuration" not in str(error):
            raise
        raise UserError(
            f"{settings.model} ({config.model_type}) has no {settings.objective} language model in transformers: give "
            "the other --objective, or another --model"
        ) from None
    return model.to(DTYPES[settings.dtype]).train()


def _small(settings: Settings) -> PreTrainedConfig:
    if settings.objective == "causal":
        return LlamaConfig(**SIZE, num_key_value_heads=4, max_position_embeddings=settings.length)
    no_dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(**SIZE, **no_dropout, max_position_embeddings=settings.length)


def read_config(name: str) -> PreTrainedConfig:
    """Read a config of transformers: a folder's, a JSON file, or that of a model on the hub.

    Raises:
        UserError: there is none.
    """
    with loading(f"{name} is no config", "give a folder with config.json, a JSON file, or a model's name on the hub"):
        path = Path(name).expanduser()
        if path.is_file():
            given = json.loads(path.read_text(encoding="utf-8"))
            read: PreTrainedConfig = AutoConfig.for_model(given.pop("model_type"), **given)
            return read
        found: PreTrainedConfig = AutoConfig.from_pretrained(
            str(path) if path.exists() else name, trust_remote_code=False
        )
        return found
