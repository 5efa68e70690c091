"""The tensors that each op takes, form by form; `signature` says how to read the tables."""

from __future__ import annotations

from torch import Tensor

from fastadv.arguments.lookup import Lookup
from fastadv.arguments.signature import Signature

_STEP = """
    delta!    wide         [*P, D]  contiguous
    grad      goes:delta   [*P, D]  even        -- grad and delta must be equal in shape
    mask?     mask         [*P]     copied
    skipped!  int64        []       contiguous  -- it is 0-d
    starts?   int64        [S+1]    copied      -- one more than there are groups
"""
_BY_POSITION = """
    weight    goes:delta   [V, D]   rows
    ids       index        [*P]     copied      -- without slot, ids are those of delta's positions
    embedded! same:weight  [*P, D]  contiguous
"""
_BY_SLOT = """
    delta!    wide         [R, D]   contiguous  -- with slot, delta must be [R, D]
    grad      goes:delta   [R, D]   even        -- grad and delta must be equal in shape
    mask?     mask         [R]      copied
    skipped!  int64        []       contiguous  -- it is 0-d
    starts?   int64        [S+1]    copied      -- one more than there are groups
    weight    goes:delta   [V, D]   rows
    ids       index        [*I]     copied
    embedded! same:weight  [*I, D]  contiguous
    slot      int64        [*I]     copied
"""
ASCEND, ASCEND_BY_POSITION, ASCEND_BY_SLOT = (
    Signature("ascend", table) for table in (_STEP, _STEP + _BY_POSITION, _BY_SLOT)
)


def ascend(
    delta: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    skipped: Tensor,
    lookup: Lookup | None,
    starts: Tensor | None = None,
) -> tuple[Signature, tuple[Tensor | None, ...]]:
    """The form of an ascent, and its tensors."""
    step = (delta, grad, mask, skipped, starts)
    if lookup is None:
        return ASCEND, step
    return ASCEND_BY_POSITION if lookup.slot is None else ASCEND_BY_SLOT, step + lookup.tensors()


_MOMENTS = "moments! wide:delta [M, *P, D] contiguous -- the moments of each element of delta"
_MOMENTS_OF_ROWS = _MOMENTS.replace("*P", "R")
MOMENT_STEP, MOMENT_STEP_BY_POSITION, MOMENT_STEP_BY_SLOT = (
    Signature("moment_step", f"{table}\n{moments}")
    for table, moments in ((_STEP, _MOMENTS), (_STEP + _BY_POSITION, _MOMENTS), (_BY_SLOT, _MOMENTS_OF_ROWS))
)


def moment_step(
    delta: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    skipped: Tensor,
    moments: Tensor,
    lookup: Lookup | None,
    starts: Tensor | None = None,
) -> tuple[Signature, tuple[Tensor | None, ...]]:
    """The form of a step by moments, and its tensors: an ascent's, and the moments."""
    form, step = ascend(delta, grad, mask, skipped, lookup, starts)
    forms = {ASCEND: MOMENT_STEP, ASCEND_BY_POSITION: MOMENT_STEP_BY_POSITION, ASCEND_BY_SLOT: MOMENT_STEP_BY_SLOT}
    return forms[form], (*step, moments)


TABLE_STEP = Signature(
    "table_step",
    """
    delta!    wide         [R, D]   contiguous
    room!     same:delta   [R, D]   contiguous  -- room must have delta's shape
    skipped!  int64        []       contiguous  -- it is 0-d
    weight    goes:delta   [V, D]   rows
    ids       index        [*I]     copied
    embedded! same:weight  [*I, D]  contiguous
    grad      goes:delta   [#I, D]  rows-copied
    slot      int64        [#I]     copied      -- groups and ids must be of the same positions
    order     int64        [#I]     contiguous
    starts    int64        [R+1]    contiguous  -- one more than delta has rows
    stops     int64        [R]      contiguous  -- one for each row of delta
    """,
)
_LOOKUP = """
    weight    float        [V, D]   rows
    ids       index        [*I]     copied
"""
GATHER = Signature("gather_perturb", _LOOKUP)
GATHER_BY_POSITION = Signature("gather_perturb", f"{_LOOKUP}\n    delta wide:weight [*I, D] contiguous")
GATHER_BY_SLOT = Signature(
    "gather_perturb",
    f"""{_LOOKUP}
    delta     wide:weight  [R, D]   contiguous  -- with slot, delta must be [R, D]
    slot      int64        [*I]     copied
    """,
)
GATHER_BACKWARD = Signature(
    "gather_perturb_backward",
    """
    table_grad! float            [V, D]  own
    ids         index            [N]     copied
    order       int64            [N]     contiguous
    starts      int64            [S+1]   contiguous  -- as segments(ids) gives it, one more than there are segments
    grad        near:table_grad  [N, D]  rows-copied
    """,
    repeats=True,
)


def gather(
    weight: Tensor, ids: Tensor, delta: Tensor | None, slot: Tensor | None
) -> tuple[Signature, tuple[Tensor, ...]]:
    """The form of a lookup, and its tensors.

    Raises:
        ValueError: a slot without what it points into.
    """
    if slot is None:
        return (GATHER, (weight, ids)) if delta is None else (GATHER_BY_POSITION, (weight, ids, delta))
    if delta is None:
        raise ValueError("gather_perturb: slot says which row of delta to take, but delta is None")
    return GATHER_BY_SLOT, (weight, ids, delta, slot)


SEGMENTS = Signature(
    "segments",
    """
    ids     index        [N]     copied
    mask?   bool         [N]     copied
    """,
)
SEGMENT_SUM = Signature(
    "segment_sum",
    """
    values  float        [N, D]  rows-copied
    order   int64        [N]     contiguous
    stops   int64        [R]     contiguous
    starts  int64        [>=R]   contiguous  -- at least one for each of stops
    """,
)
DIVERGENCE = Signature(
    "divergence",
    """
    logits   float        [N, C]  rows
    target   same:logits  [N, C]  rows
    weights  wide:logits  [N]     contiguous
    """,
)
ROWS_TOUCHED = Signature("rows_touched", "table float [V, D] rows-copied")
ROWS_BACK_UP = Signature("rows_back_up", "table float [V, D] rows-copied\n rows? int64 [K] copied")
ROWS_RESTORE = Signature(
    "rows_restore",
    """
    table!   float       [V, D]  own
    saved    same:table  [V, D]  contiguous
    """,
)
SOME_ROWS_RESTORE = Signature(
    "rows_restore",
    """
    table!   float       [V, D]  own
    rows     int64       [K]     copied
    saved    same:table  [K, D]  contiguous
    """,
)
_ROWS_STEP = """
    table!   float       [V, D]  own
    grad     same:table  [V, D]  rows-copied
    skipped! int64       []      contiguous  -- it is 0-d
"""
ROWS_STEP = Signature("rows_step", f"{_ROWS_STEP}\n saved? same:table [V, D] contiguous")
SOME_ROWS_STEP = Signature(
    "rows_step",
    f"""{_ROWS_STEP}
    rows     int64       [K]     copied
    saved?   same:table  [K, D]  contiguous
    """,
)
GRADS_PAIR = Signature(
    "grads",
    """
    into!    float      [*P]  contiguous
    sources  same:into  [*P]  contiguous  -- a pair of tensors must have one shape
    """,
)
