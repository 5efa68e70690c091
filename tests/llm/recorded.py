"""Recorded runs of LLM safety: the model with PEFT's own adapters, and the perturbation put in by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from fastadv import llm
from tests.support import golden
from tests.tiny_llama import load

PEFT = "base_model.model."


def recorded(name: str, scale: float = 2.0) -> tuple[Any, dict[str, Any]]:
    """The model at its recorded weights, and the run. `scale` is alpha / r of its adapters."""
    run = golden(f"llm/{name}")
    model: nn.Module = load({f"w::{key}": value.numpy() for key, value in run["w"].items()})
    if any("lora_" in key for key in run["w"]):
        adapted = sorted({key.split(".lora_")[0].removeprefix(PEFT) for key in run["w"] if "lora_" in key})
        model.is_gradient_checkpointing = False  # peft asks
        model.config.get = lambda key, default=None: getattr(model.config, key, default)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=int(4 * scale), target_modules=adapted)).double()
        model.load_state_dict(run["w"])
    return model, run


@contextlib.contextmanager
def perturbed(model: nn.Module, deltas: dict[str, Tensor]) -> Iterator[None]:
    """Add a perturbation [B, T, D] to the output of each named module."""
    inner = model.get_base_model().model if isinstance(model, PeftModel) else model.model
    handles = [
        inner.get_submodule(name).register_forward_hook(lambda _module, _args, output, delta=delta: output + delta)
        for name, delta in deltas.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def of(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """LAT's batches: ids and the mask of their answers, right padded; that code gives no attention mask."""
    return {"input_ids": ids, "labels": ids.where(mask.bool(), -100)}


def kept(model: nn.Module, run: dict[str, Any], rows: slice, delta: Tensor | None = None) -> llm.Scores:
    """What the model gives the targets of some rows of CAT's batch."""
    data = {name: run[name][rows] for name in ("input_ids", "attention_mask", "labels")}
    with perturbed(model, {} if delta is None else {"embed_tokens": delta}):
        return llm.score(model, **data)


def moved(run: dict[str, Any]) -> Tensor:
    """CAT's perturbation of the harmful rows, at the prompt's positions of the safe rows: n-th to n-th."""
    ids, attended, labels = (run[name] for name in ("input_ids", "attention_mask", "labels"))
    at = (attended.bool() & (labels == -100))[3:6]
    delta = torch.zeros_like(run["delta"][-1])
    for row in range(3):
        found = run["delta"][-1][row, run["delta_mask"][row].bool()]
        assert len(found) == int(at[row].sum()), ids.shape
        delta[row, at[row]] = found
    return delta
