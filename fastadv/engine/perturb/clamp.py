r"""What an ascent leaves out: perturbed activations beyond those that the clean batch has.

.. math:: \delta \leftarrow \min(\max(x + \delta, \min x), \max x) - x

x are the perturbed module's own outputs, and least and largest of all of them, at every position (Casper et al. 2024,
https://arxiv.org/abs/2403.05030).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.engine.lookup import Lookup

DIVIDED_RANGE = (
    "clamp='batch' takes the range of all of a batch's activations, and this rank has a part of each sample: leave it "
    "out where activations are sharded"
)


@torch.no_grad()
def into_range(lookup: Lookup, module: nn.Module) -> None:
    """Clamp the call's perturbation."""
    x = _clean(lookup, module).to(lookup.delta.dtype)
    if x.numel():
        least, largest = x.aminmax()
        lookup.delta.clamp_(least - x, largest - x)
    lookup.ready = None


def _clean(lookup: Lookup, module: nn.Module) -> Tensor:
    """What delta is added to."""
    if lookup.clean is not None:
        return lookup.clean
    assert isinstance(module, nn.Embedding)
    assert lookup.ids is not None
    return F.embedding(lookup.ids, module.weight)
