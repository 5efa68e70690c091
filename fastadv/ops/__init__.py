"""The contract: one file per op (schema, fake, eager version), and `dispatch`, which picks the backend."""

from fastadv.ops.ascend import ascend
from fastadv.ops.gather_perturb import gather_perturb
from fastadv.ops.segment_sum import Segments, segment_sum, segments

__all__ = ["Segments", "ascend", "gather_perturb", "segment_sum", "segments"]
