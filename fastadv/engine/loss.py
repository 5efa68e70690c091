"""What a closure may return, read once: a loss, or an output that has one."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

FORMS = "a scalar loss, an output with .loss, a dict with 'loss', or a tuple that begins with the loss"


def loss_of(output: Any) -> Tensor:
    """The loss in what the closure returned.

    Raises:
        TypeError: there is none.
        ValueError: it is not a scalar, or does not depend on anything that requires a gradient.
    """
    loss = _find(output)
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


def _find(output: Any) -> Any:
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
    leaves = tree_leaves(output)
    if len(leaves) == 1 and leaves[0] is output:
        fields = {name: getattr(output, name) for name in ("loss", "logits") if hasattr(output, name)}
        return SimpleNamespace(**{name: detached(value) for name, value in fields.items()}) if fields else output
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output)
