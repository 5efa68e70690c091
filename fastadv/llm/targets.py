"""Which tokens of a batch are targets, and where the logits that predict them are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # the label of what is no target, as everywhere in PyTorch


@dataclass(frozen=True)
class Targets:
    """The N target tokens of a batch [B, T], sample by sample.

    A target is marked by its label alone: token id 0 is a token as any other, and so are ids that pad elsewhere.

    Args:
        place: [N] int64, where a token's logits are among the B * T positions.
        ids: [N] int64, the tokens.
        rows: [N] int64, the sample that each is in.
        shape: (B, T).
        filled: whether every sample has a target.
    """

    place: Tensor
    ids: Tensor
    rows: Tensor
    shape: tuple[int, int]
    filled: bool

    @classmethod
    def of(cls, labels: Tensor, *, shift: bool = True) -> Targets:
        """Read labels as transformers has them: unshifted, -100 where there is no target.

        It waits for the device once; made once per batch and given to `score` as `labels=`, no forward waits again.

        Args:
            labels: [B, T], integers.
            shift: a token is predicted by the position before it, and the first of a row by none. False: take the
                tokens' own positions, for losses that compare logits and ask for no token.

        Raises:
            TypeError: labels are no integers.
            ValueError: labels are not [B, T], or nothing is a target.

        Examples:
            >>> targets = Targets.of(torch.tensor([[-100, -100, 5, 0], [-100, 7, 8, -100]]))
            >>> targets.place.tolist(), targets.ids.tolist(), targets.rows.tolist()
            ([1, 2, 4, 5], [5, 0, 7, 8], [0, 0, 1, 1])
        """
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(
                f"labels must be token ids with {IGNORED} where there is no target, not {labels.dtype}: of a mask make "
                f"them by input_ids.masked_fill(~mask, {IGNORED})"
            )
        if labels.dim() != 2:
            raise ValueError(f"labels must be [B, T], but have shape {tuple(labels.shape)}")
        samples, length = labels.shape
        start = int(shift)
        kept = labels[:, start:] != IGNORED
        rows, columns = kept.nonzero(as_tuple=True)
        if not len(rows):
            raise ValueError(f"labels hold no target: every one that a position predicts is {IGNORED}")
        ids = labels[rows, columns + start].long()
        return cls(rows * length + columns, ids, rows, (samples, length), bool(kept.any(dim=1).all()))

    def per_sample(self, values: Tensor) -> Tensor:
        """The sums [B] of what the tokens have [N]; a sample without targets has 0."""
        return values.new_zeros(self.shape[0]).index_add(0, self.rows, values)

    def counts(self, like: Tensor) -> Tensor:
        """How many targets each sample has, [B], in the dtype of `like`."""
        return self.per_sample(torch.ones_like(self.ids, dtype=like.dtype))
