"""What a closure may return, read once: a loss, or an output that has one."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

FORMS = "a scalar loss, an output with .loss, a dict with 'loss', or a tuple that begins with the loss"


def loss_of(output: Any) -> Tensor:
    """The loss in what the closure returned.

    Raises:
        TypeError: there is none.
        ValueError: it is not a scalar, or does not depend on anything that requires a gradient.
    """
    loss = find_loss(output)
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the closure must return {FORMS}; it returned {type(output).__name__}"
            + (" whose loss is None: pass labels to the model" if loss is None and output is not None else "")
        )
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError(
            f"the closure's loss must be a scalar, but it has shape {tuple(loss.shape)} and dtype {loss.dtype}: "
            "reduce it (mean or sum) in the closure"
        )
    if not loss.requires_grad:
        raise ValueError(
            "the closure's loss has no gradient: it was detached, computed under no_grad, or does not depend on the "
            "model"
        )
    return loss.reshape(()) if loss.ndim else loss


def loss_if_any(output: Any) -> Tensor | None:
    """The loss in what the closure returned; None where it returned an output without one: an unlabelled batch."""
    unlabelled = not isinstance(output, Tensor) and output is not None and find_loss(output) is None
    return None if unlabelled and find_logits(output) is not None else loss_of(output)


def has_loss(output: Any) -> bool:
    """Whether what the closure returned has a loss."""
    return find_loss(output) is not None


def logits_of(output: Any, who: str) -> Tensor:
    """The logits in what the closure returned, for a method that compares them.

    Raises:
        TypeError: there are none.
    """
    logits = find_logits(output)
    if logits is None:
        raise TypeError(
            f"{who} compares logits, and the closure returned {_described(output)}: return the model's output "
            "(model(**batch), with .logits), a dict with 'loss' and 'logits', or (loss, logits)"
        )
    return logits


def find_logits(output: Any) -> Tensor | None:
    """The logits in an output: `.logits`, "logits", or what comes second in a tuple."""
    found = None
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)) and len(output) > 1:
        found = output[1]
    return found if isinstance(found, Tensor) and found.is_floating_point() and found.dim() > 0 else None


def losses_of(output: Any) -> Tensor:
    """Each sample's loss [B], where the output has `.losses` or its loss is a vector; else the loss, as one sample.

    Raises:
        TypeError, ValueError: as `loss_of` does.
    """
    losses = output.get("losses") if isinstance(output, Mapping) else getattr(output, "losses", None)
    found = losses if isinstance(losses, Tensor) else find_loss(output)
    if not isinstance(found, Tensor) or found.dim() != 1 or not found.requires_grad or not found.is_floating_point():
        return loss_of(output).reshape(1)
    return found


def _described(output: Any) -> str:
    return "only a loss" if isinstance(output, Tensor) else f"{type(output).__name__} without logits"


def find_loss(output: Any) -> Any:
    """What stands where the loss is in what the closure returned, unchecked; None where there is nothing."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "loss"):
        return output.loss
    if isinstance(output, Mapping):
        return output.get("loss")
    if isinstance(output, (tuple, list)) and output:
        return output[0]
    return None


def detached(output: Any) -> Any:
    """`output` without its graph; an object of no known structure keeps its loss and logits alone."""
    if isinstance(output, Tensor):
        return output.detach()
    leaves, structure = tree_flatten(output)
    if len(leaves) == 1 and leaves[0] is output:
        fields = {name: getattr(output, name) for name in ("loss", "logits") if hasattr(output, name)}
        return SimpleNamespace(**{name: detached(value) for name, value in fields.items()}) if fields else output
    return tree_unflatten([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)
