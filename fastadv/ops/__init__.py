"""The contract: one file per op (schema, fake, eager version), and `dispatch`, which picks the backend."""

from fastadv.ops.ascend import ascend
from fastadv.ops.gather_perturb import gather_perturb, gather_perturb_backward
from fastadv.ops.rows import rows_back_up, rows_restore, rows_step, rows_touched
from fastadv.ops.segment_sum import Segments, segment_sum, segments

__all__ = [
    "Segments",
    "ascend",
    "gather_perturb",
    "gather_perturb_backward",
    "rows_back_up",
    "rows_restore",
    "rows_step",
    "rows_touched",
    "segment_sum",
    "segments",
]
