"""Stay what the base model is, by its answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastadv.llm.base_model import base_score
from fastadv.llm.scores import Scores, score
from fastadv.llm.targets import Targets
from fastadv.ops.divergence import divergence


def kl_to_base(
    model: nn.Module,
    *,
    labels: Tensor | Targets,
    reference: nn.Module | Scores | None = None,
    normalized: bool = False,
    shift: bool = True,
    fused: bool | None = None,
    **inputs: Any,
) -> Tensor:
    r"""The divergence of the model from its base at the target positions, the mean over them.

    .. math:: L = \frac1N \sum_n \sum_v p_{nv} \left(\log p_{nv} - \log q_{nv}\right)

    p is the model's distribution, q the base's, which gets no gradient: KL(p || q), from the model to its base, as
    LAT's penalty on benign text has it (Sheshadri et al. 2024,
    https://arxiv.org/abs/2407.15549). The kernel computes value and gradient in one pass over the
    logits, in float32.

    LAT's code divides the term by its own detached value: it is always 1, its gradient is that of log KL, and where the
    model still is its base, as LoRA is when it begins, 0 / 0. It also reads positions by a mask that is not shifted.
    `normalized=True, shift=False` is that code, but for 0 / 0, which gives 0 here.

    Args:
        model: whose adapters are turned off for the base.
        labels: [B, T], or `Targets`; where the distributions are compared.
        reference: another model as the base; or the base's `Scores` of this batch, from `base_score`, so that it runs
            once and outside of an attack's closure. None: adapters off.
        normalized: LAT's variant.
        shift: False compares at the marked tokens' own positions, not at those that predict them.
        fused: which backend of the kernel; see `fastadv.ops.divergence`.
        **inputs: as `score` takes them.

    Returns:
        0-d, float32 (float64 for float64 logits).

    Raises:
        TypeError: the model has no adapters, and no reference is given.
        ValueError: the reference's scores are of another batch.

    Examples:
        >>> class Unigram(nn.Module):  # whatever it reads
        ...     def __init__(self, *logits):
        ...         super().__init__()
        ...         self.logits = nn.Parameter(torch.tensor(logits))
        ...
        ...     def forward(self, input_ids):
        ...         return self.logits.expand(*input_ids.shape, -1)
        >>> ids = torch.tensor([[0, 1, 1]])
        >>> model, frozen = Unigram(0.0, 1.0), Unigram(0.0, 0.0)
        >>> kl_to_base(model, reference=frozen, input_ids=ids, labels=ids).detach()
        tensor(0.1109)
        >>> base = base_score(model, reference=frozen, input_ids=ids, labels=ids)  # once for many steps
        >>> kl_to_base(model, reference=base, input_ids=ids, labels=ids).detach()
        tensor(0.1109)
    """
    targets = labels if isinstance(labels, Targets) else Targets.of(labels, shift=shift)
    if isinstance(reference, Scores):
        base = reference
    else:
        base = base_score(model, labels=targets, reference=reference, **inputs)
    if base.targets is not targets and not torch.equal(base.targets.place, targets.place):
        raise ValueError("the reference has been scored at other positions: score it with these labels and this shift")
    scores = score(model, labels=targets, **inputs)
    kl = divergence(base.logits.detach(), scores.logits, "kl", fused=fused)  # KL(second || first)
    return kl / kl.detach().clamp_min(torch.finfo(kl.dtype).tiny) if normalized else kl
