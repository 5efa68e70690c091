"""The contract: one file per op (schema, fake, eager version), and `dispatch`, which picks the backend."""

from fastadv.arguments.segments import Segments
from fastadv.ops import grads, rows
from fastadv.ops.ascend import ascend
from fastadv.ops.divergence import divergence
from fastadv.ops.gather_perturb import gather_perturb, gather_perturb_backward
from fastadv.ops.moment_step import moment_step
from fastadv.ops.segment_sum import segment_sum, segments
from fastadv.ops.table_step import table_step

__all__ = [
    "Segments",
    "ascend",
    "divergence",
    "gather_perturb",
    "gather_perturb_backward",
    "grads",
    "moment_step",
    "rows",
    "segment_sum",
    "segments",
    "table_step",
]
