// gather_perturb_backward on the CPU: threads take segments as they get free; a row of the table is one segment's.
#include "gather_perturb_backward.h"
#include "parallel.h"

namespace fastadv {
namespace {

constexpr int kTile = 512;           // columns whose sums stay in the first cache
constexpr std::int64_t kPiece = 16;  // segments that a thread takes at a time
constexpr std::int64_t kPage = 4096;

// A write to every page of a row that changes nothing. A gradient that was just made has pages without memory: read
// before it is written, each costs two faults, and with the second all cores have to forget what the first one mapped.
void touch(void* row, std::int64_t bytes) {
  auto* const begin = static_cast<unsigned char*>(row);
  for (std::int64_t at = 0; at < bytes; at += kPage) __atomic_fetch_or(begin + at, 0, __ATOMIC_RELAXED);
  if (bytes > 0) __atomic_fetch_or(begin + bytes - 1, 0, __ATOMIC_RELAXED);
}

template <class T>
FASTADV_HD void segments_of(const GatherPerturbBackward<T>& op, std::int64_t begin, std::int64_t end) {
  for (std::int64_t s = begin; s < end; ++s) {
    if (op.empty(s) || op.id(s) == op.padding) continue;
    touch(op.table_grad + op.id(s) * op.row_stride, op.dim * std::int64_t(sizeof(T)));
    for (std::int64_t d = 0; d < op.dim; d += kTile) {
      op.template columns<kTile>(s, d, int(op.dim - d < kTile ? op.dim - d : kTile));
    }
  }
}

// One function per type: see gather_perturb_cpu.cpp.
FASTADV_CLONES void run(const GatherPerturbBackward<float>& op, std::int64_t begin, std::int64_t end) {
  segments_of(op, begin, end);
}
FASTADV_CLONES void run(const GatherPerturbBackward<double>& op, std::int64_t begin, std::int64_t end) {
  segments_of(op, begin, end);
}
FASTADV_CLONES void run(const GatherPerturbBackward<BFloat16>& op, std::int64_t begin, std::int64_t end) {
  segments_of(op, begin, end);
}
FASTADV_CLONES void run(const GatherPerturbBackward<Float16>& op, std::int64_t begin, std::int64_t end) {
  segments_of(op, begin, end);
}

// Ids that rise are also different: no two threads write one row.
template <class T>
BadBackward first_bad(const GatherPerturbBackward<T>& op) {
  for (std::int64_t i = 0; i < op.count; ++i) {
    if (!op.position_in_range(i)) return {i, -1, -1, -1};
  }
  std::int64_t last = -1;
  for (std::int64_t s = 0; s < op.rows; ++s) {
    if (!op.segment_in_range(s)) return {-1, s, -1, -1};
    if (op.empty(s)) continue;
    if (!op.id_in_range(s)) return {-1, -1, op.order[op.starts[s]], -1};
    if (op.id(s) <= last) return {-1, -1, -1, s};
    last = op.id(s);
  }
  return {-1, -1, -1, -1};
}

}  // namespace

BadBackward gather_perturb_backward_cpu(const GatherPerturbBackwardCall& call, int threads) {
  BadBackward bad{-1, -1, -1, -1};
  call.visit([&](const auto& op) {
    bad = first_bad(op);
    if (bad.any()) return;
    const std::int64_t size = op.count * op.dim * op.grad_count;
    parallel_uneven(op.rows, kPiece, size, threads, [&](std::int64_t begin, std::int64_t end) { run(op, begin, end); });
  });
  return bad;
}

}  // namespace fastadv
