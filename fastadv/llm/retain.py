"""Keep what a layer computes on text that is to stay as it is."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def retain(states: Tensor, base: Tensor, mask: Tensor | None = None, form: Literal["mse", "norm"] = "mse") -> Tensor:
    r"""How far hidden states have moved from the base model's, the mean over the positions that count.

    .. math:: L_\text{mse} = \frac{1}{D |M|} \sum_{n \in M} \lVert h_n - h^0_n \rVert^2, \qquad
        L_\text{norm} = \frac{1}{|M|} \sum_{n \in M} \lVert h_n - h^0_n \rVert

    h are the states, h^0 the base's, M the positions that count. "mse" is RMU's (Li et al. 2024,
    https://arxiv.org/abs/2403.03218), with and without LAT; "norm" that of circuit breakers (Zou et al. 2024,
    https://arxiv.org/abs/2406.04313).

    At h = h0, where training with adapters begins, "norm" has the gradient 0, and no NaN. To retain answers, not
    states, take `toward` or `kl_to_base` on the benign batch.

    Args:
        states: [..., D], any floating dtype.
        base: of the same shape; it gets no gradient.
        mask: [...], nonzero at the positions that count; None: all.
        form: which of the two.

    Returns:
        0-d, float32 (float64 for float64 states); 0 where the mask is empty.

    Raises:
        ValueError: shapes that differ, or another form.

    Examples:
        >>> states, base = torch.ones(1, 2, 4), torch.zeros(1, 2, 4)
        >>> retain(states, base), retain(states, base, torch.tensor([[1, 0]]), "norm")
        (tensor(1.), tensor(2.))
    """
    if states.shape != base.shape or (mask is not None and mask.shape != states.shape[:-1]):
        shapes = ", ".join(str(tuple(one.shape)) for one in (states, base, mask) if one is not None)
        raise ValueError(f"states and base must be [..., D], and the mask [...]: these are {shapes}")
    if form not in ("mse", "norm"):
        raise ValueError(f"form must be 'mse' or 'norm', not {form!r}")
    wide = torch.promote_types(states.dtype, torch.float32)
    moved = states.to(wide) - base.detach().to(wide)
    if mask is not None:  # before the square: what is padded may be NaN
        moved = moved.masked_fill(mask.unsqueeze(-1) == 0, 0)
    each = moved.square().mean(dim=-1) if form == "mse" else torch.linalg.vector_norm(moved, dim=-1)
    return each.mean() if mask is None else each.sum() / (mask != 0).sum().clamp_min(1)
