"""Run a decoder, and its head at target positions alone: no [B, T, V] logits are computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fastadv.engine.model.find import is_traced, unwrap
from fastadv.llm.targets import Targets


def target_logits(model: nn.Module, targets: Targets, inputs: Mapping[str, Any]) -> Tensor:
    """The logits [N, V] of the model at the targets' positions, as its full logits have them there.

    The model's own forward runs, with its hooks and with whatever it does to logits afterwards (soft-capping, scales).
    Only the head's input is cut to the targets.
    """
    with _cut(model, targets):
        logits = _logits(model(**inputs))
    if logits.shape[:-1] == (1, len(targets.ids)):
        return logits[0]
    if logits.shape[:-1] == targets.shape:
        return logits.flatten(0, 1).index_select(0, targets.place)
    raise ValueError(
        f"the model's logits have shape {tuple(logits.shape)}, and labels [B, T] = {targets.shape}: labels must have "
        "the positions that the model sees, with no virtual tokens and no logits_to_keep"
    )


@contextlib.contextmanager
def _cut(model: nn.Module, targets: Targets) -> Iterator[None]:
    head = _head(model)
    if head is None or is_traced(model, [head]):  # a hook of its own would compile a graph per call
        yield
        return

    def cut(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor) or args[0].shape[:-1] != targets.shape:
            return None  # a shard of the sequence, or another caller: the full logits then
        hidden = args[0].flatten(0, 1).index_select(0, targets.place)
        return (hidden.unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(cut, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits of hidden states, where the model says which."""
    inner = unwrap(model)
    ask = getattr(inner, "get_output_embeddings", None)
    found = ask() if callable(ask) else None
    found = getattr(inner, "lm_head", None) if found is None else found
    return found if isinstance(found, nn.Module) else None


def _logits(output: Any) -> Tensor:
    """In an output with .logits, a dict, a tuple that begins with them, or the logits themselves."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.dim() != 3:
        raise TypeError(
            f"the model returned {type(output).__name__} without logits [B, T, V]: give a causal language model"
        )
    return found
