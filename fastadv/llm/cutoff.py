"""A loss that has gone far enough."""

from __future__ import annotations

import torch
from torch import Tensor


def limited(loss: Tensor, cutoff: float | None, leak: float = 0.001, *, jump: bool = False) -> Tensor:
    r"""Let a loss that has fallen below its cutoff fall on at a small fraction of its slope.

    .. math:: L' = L \text{ if } L \ge c, \qquad L' = c + \lambda (L - c) \text{ below}

    This is ER-CAT's form. CAT's, c + lambda L, has the same gradient, and a jump of lambda c at the cutoff:
    `jump=True`. The comparison is made on the device.

    Args:
        loss: any shape; each element has a cutoff of its own.
        cutoff: c. None: the loss as it is.
        leak: lambda, what is left of the gradient below.
        jump: CAT's form.

    Examples:
        >>> limited(torch.tensor([2.0, 0.2]), 0.5)
        tensor([2.0000, 0.4997])
        >>> limited(torch.tensor([2.0, 0.2]), 0.5, jump=True)
        tensor([2.0000, 0.5002])
    """
    if cutoff is None:
        return loss
    return torch.where(loss < cutoff, (cutoff if jump else cutoff * (1 - leak)) + leak * loss, loss)
