"""Whether a mask says what a method takes it to say: true or 1 where a token is.

Two other conventions are about, and each would perturb the padding and nothing else: what is added to attention's
scores (0 for a token, a large negative number for padding), and torch's `key_padding_mask` (true for padding).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.engine.safety import rng

CONVENTION = "mask is [B, T], true or 1 where a token is and false or 0 where padding is"
OTHER_VALUES = CONVENTION + ", and this one ({dtype}) holds {value:g}. {convert}"
ADDITIVE = "One that is added to attention scores, 0 for a token, becomes such a mask by `mask == 0`"
COUNTING = "One that numbers from 1 the documents that a row is packed of becomes `mask=mask != 0, groups=mask - 1`"
WEIGHING = "Say which positions are to be perturbed, as `mask > 0` does"
COMPLEX = CONVENTION + ", and this one is {dtype}"
NO_TOKEN = (
    CONVENTION + ", and this one is 0 everywhere: nothing would be perturbed. Where true or 1 means padding, give "
    "`mask == 0`; leave out batches that hold nothing but padding"
)
INVERTED = (
    CONVENTION + ". This one keeps padding alone (id {padding}) and leaves every token out: where true or 1 means "
    "padding, as in torch's key_padding_mask, give `mask == 0`"
)

APART = (
    "mask and groups leave no position: mask is true where a token is, groups is -1 where no document is, and what is "
    "perturbed lies in both"
)


class MaskCheck:
    """The check of one method's masks. On the CPU of all; elsewhere, where reading waits, of the first of its dtype.

    Args:
        parts: other ranks have the rest of what a mask is of, so that it may be 0 everywhere.
    """

    def __init__(self, parts: bool = False) -> None:
        self._parts = parts
        self._trusted: set[tuple[str, torch.dtype]] = set()

    def values(self, mask: Tensor, *, may_be_empty: bool = False) -> None:
        """Look at what a mask holds; `may_be_empty`: perhaps nothing but zeros.

        Raises:
            ValueError: something else than zeros and ones, or zeros alone.
        """
        if mask.dtype.is_complex:
            raise ValueError(COMPLEX.format(dtype=mask.dtype))
        if self.reads("values", mask):
            _check_values(mask, self._parts or may_be_empty)

    def padding(self, mask: Tensor, ids: Tensor, padding: int) -> None:
        """Look at where a mask has its tokens: padding may lie among them.

        Raises:
            ValueError: they are all padding, and what it leaves out is not.
        """
        if not self.reads("padding", mask):
            return
        kept, pads = mask.bool(), ids == padding
        if self._parts and not bool(kept.any()):
            return
        if not bool((kept & ~pads).any()) and not bool(pads.all()):
            raise ValueError(INVERTED.format(padding=padding))

    def within(self, kept: Tensor, mask: Tensor) -> None:
        """Look at what is left of a mask where groups have documents.

        Raises:
            ValueError: nothing is.
        """
        if self.reads("within", mask) and not bool(kept.any()):
            raise ValueError(APART)

    def reads(self, what: str, mask: Tensor) -> bool:
        """Whether to look at a mask, or at groups, this time."""
        if mask.numel() == 0 or mask.device.type == "meta":
            return False
        if mask.device.type == "cpu":
            return True
        if rng.capturing() or (what, mask.dtype) in self._trusted:
            return False
        self._trusted.add((what, mask.dtype))
        return True


def _check_values(mask: Tensor, parts: bool) -> None:
    if not bool(mask.any()):
        if not parts:
            raise ValueError(NO_TOKEN)
        return
    if mask.dtype == torch.bool:
        return
    least, most = torch.aminmax(mask)
    if bool(most == 1) and bool(least >= 0) and (not mask.is_floating_point() or torch.equal(mask, mask * mask)):
        return
    odd = mask[(mask != 0) & (mask != 1)]
    value = float(odd[0])
    convert = ADDITIVE if value < 0 else WEIGHING if mask.is_floating_point() else COUNTING
    raise ValueError(OTHER_VALUES.format(dtype=mask.dtype, value=value, convert=convert))
