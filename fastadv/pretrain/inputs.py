"""What a model is given of packed rows, so that no document sees another, and the loss of what it answers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.jobs.errors import UserError
from fastadv.pretrain.masking import IGNORED
from fastadv.pretrain.settings import Settings

WINDOWS = ("sliding_window", "local_attention", "attention_chunk_size")


class Inputs:
    """How the rows of a batch go into a model.

    A position attends to those of its own document: to all of them where the objective is masked, to those before it
    where it is causal. The mask is [B, 1, T, T] bool, as torch's attention takes it.

    Args:
        model: a transformers model; read before it is wrapped.
        settings: of the training.
        sharded: FSDP2 sees to the precision, so that autocast does not.

    Raises:
        UserError: documents would see each other in such a model.
    """

    def __init__(self, model: nn.Module, settings: Settings, *, sharded: bool = False) -> None:
        self.model = model
        self.causal = settings.objective == "causal"
        self._low = settings.dtype == "bfloat16" and not sharded
        config: Any = model.config
        self._additive = getattr(config, "_attn_implementation", "eager") == "eager"
        taken = inspect.signature(type(model).forward).parameters
        self._takes_positions = "position_ids" in taken
        self._first = _first_position(model)
        _refuse_leaks(config, taken, settings)

    def closure(self, batch: Any, scale: float) -> Callable[[], dict[str, Tensor]]:
        """Make the forward of a batch: its logits, and the sum of its tokens' losses times `scale`."""
        places = {"position_ids": batch.positions + self._first} if self._takes_positions else {}
        mask = self._mask(batch.groups)
        targets = F.pad(batch.labels, (0, 1), value=IGNORED)[:, 1:] if self.causal else batch.labels

        def forward() -> dict[str, Tensor]:
            with self.precision():
                logits = self.model(input_ids=batch.ids, attention_mask=mask, **places).logits
            return {"loss": losses(logits, targets).sum() * scale, "logits": logits}

        return forward

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast to bfloat16, where this process sees to it by itself."""
        if not self._low:
            return contextlib.nullcontext()
        return torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16)

    def _mask(self, groups: Tensor) -> Tensor:
        """Which positions each sees: [B, 1, T, T]."""
        seen = groups[:, None, :, None] == groups[:, None, None, :]
        if self.causal:
            seen = seen.tril()
        if not self._additive:
            return seen
        dtype = next(self.model.parameters()).dtype
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def predicted(labels: Tensor, *, causal: bool) -> Tensor:
    """Count the tokens that are predicted: a causal model predicts no row's first one."""
    return ((labels[:, 1:] if causal else labels) != IGNORED).sum()


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute each position's cross entropy: [B * T], in float32 (float64 for float64), 0 where nothing is asked."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")


def _first_position(model: nn.Module) -> int:
    """Number the first position as the model's table does: RoBERTa's begin behind its padding."""
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding):
            return 0 if part.padding_idx is None else part.padding_idx + 1
    return 0


def _refuse_leaks(config: Any, taken: Any, settings: Settings) -> None:
    if "attention_mask" not in taken or "cache_params" in taken:
        raise UserError(
            f"{config.model_type} keeps a state from one token to the next, and the documents of a row would see each "
            "other: give a model with attention"
        )
    for name in WINDOWS:
        window = getattr(config, name, None)
        if isinstance(window, int) and 0 < window < settings.length:
            raise UserError(
                f"{config.model_type} attends within windows of {window} tokens, and the mask that keeps documents "
                f"apart knows none: give --length {window}, or a config without {name}"
            )
