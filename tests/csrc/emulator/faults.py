"""Faults to plant in csrc/: each is a change of its text that compiles, and that a check must find."""

from __future__ import annotations

from tests.csrc.emulator.build import Patch

ROWS, GRADS, REDUCE, PACK, OP = "rows_cuda.cu", "grads_cuda.cu", "cuda_reduce.h", "cuda_pack.h", "rows.h"

FAULTS = {
    "the barrier before the partial sums": Patch(
        REDUCE, "  __syncthreads();  // an earlier result has been read\n", ""
    ),
    "the barrier behind the partial sums": Patch(REDUCE, "  __syncthreads();\n  double result", "  double result"),
    "a shuffle too few": Patch(REDUCE, "int distance = 16;", "int distance = 8;"),
    "a warp too few": Patch(REDUCE, "warp < kThreads / 32;", "warp < kThreads / 32 - 1;"),
    "a thread that leaves a loop with barriers": Patch(
        ROWS,
        "    if (a == 0) continue;",
        "    if (a == 0 || (op.rule.ball == kUnitBall && threadIdx.x == 77)) continue;",
    ),
    "a barrier that a thread leaves out": Patch(
        REDUCE, "  __syncthreads();  // an", "  if (threadIdx.x != 7) __syncthreads();  // an"
    ),
    "a launch of nothing": Patch(ROWS, "  if (call.count == 0 || call.dim == 0) return nullptr;  // an", "  // an"),
    "a warp that leaves before a barrier": Patch(
        ROWS, "  Found found;\n  for", "  Found found;\n  if (threadIdx.x / 32 == 3) return;\n  for"
    ),
    "a part that nobody reads": Patch(ROWS, "part < gridDim.x;", "part + 1 < gridDim.x;"),
    "parts beyond the block's threads": Patch(ROWS, "part < gridDim.x;", "part < gridDim.x && part < kThreads;"),
    "rows beyond the blocks": Patch(
        ROWS, "n += gridDim.x) {\n    if (row_exists(op", "n += op.count) {\n    if (row_exists(op"
    ),
    "parts in the place of others": Patch(ROWS, "kLargest, kSize }", "kLargest, kSize = kLargest }"),
    "a pack beyond the row": Patch(
        PACK,
        "if (aligned && first + Pack<T>::kWidth <= dim) {\n",
        "if (aligned) {\n",
    ),
    "a row's last element": Patch(PACK, "if (first + k < dim)", "if (first + k + 1 < dim)"),
    "what lies behind a row": Patch(PACK, "first + k < dim ? row[first + k] : T{}", "row[first + k]"),
    "rows that are half aligned": Patch(PACK, "| ...) % 16 == 0", "| ...) % 8 == 0"),
    "blocks that wait for the first": Patch(
        ROWS,
        "  const Found found = over_parts(parts);\n",
        "  Found found = over_parts(parts);\n"
        "  double& total = const_cast<double*>(parts)[5 * kMostBlocks - 1];\n"
        "  blockIdx.x == 0 ? total = found.uu : found.uu = total;\n",
    ),
    "a bound forgotten": Patch(ROWS, "if (row >= 0 && row < table_rows)", "if (row >= 0)"),
    "a row's distance": Patch(OP, "table + row(n) * table_stride", "table + row(n) * dim"),
    "saved rows that lie like the table's": Patch(OP, "saved + n * dim", "saved + row(n) * dim"),
    "every thread counts": Patch(ROWS, "if (threadIdx.x == 0 && !(found.uu", "if (!(found.uu"),
    "words longer than the distance of rows": Patch(ROWS, "| std::uint64_t(apart);", ";"),
    "a chunk's tail": Patch(GRADS, "+ threadIdx.x; i < count;", "+ threadIdx.x; packs == 0 && i < count;"),
    "a chunk's owner": Patch(GRADS, "first_chunk <= chunk", "first_chunk < chunk"),
    "packs that are not aligned": Patch(GRADS, "are_aligned(into, source) ? count / kWidth : 0", "count / kWidth"),
}

# Those that the emulator itself refuses: with these words.
REFUSED = {
    "a thread that leaves a loop with barriers": "thread 77 is not at the shuffle of line",
    "a barrier that a thread leaves out": "waits at line .* and others at line",
    "a launch of nothing": "a launch of 0 blocks",
    "packs that are not aligned": "not aligned to 16 bytes",
    "rows that are half aligned": "not aligned to 16 bytes",
}
