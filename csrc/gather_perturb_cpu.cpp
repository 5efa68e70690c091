// gather_perturb on the CPU: OpenMP over rows, the inner loop left to the vectoriser.
#include "gather_perturb.h"
#include "parallel.h"
#include "segments.h"

namespace fastadv {
namespace {

template <class T>
FASTADV_HD void rows_of(const GatherPerturb<T>& op, std::int64_t begin, std::int64_t end) {
  for (std::int64_t n = begin; n < end; ++n) op.row(n, 0, 1);
}

// Clones cannot be templates, and a parallel region's body is cut out before clones are made: one function each.
FASTADV_CLONES void run(const GatherPerturb<float>& op, std::int64_t begin, std::int64_t end) {
  rows_of(op, begin, end);
}
FASTADV_CLONES void run(const GatherPerturb<double>& op, std::int64_t begin, std::int64_t end) {
  rows_of(op, begin, end);
}
FASTADV_CLONES void run(const GatherPerturb<BFloat16>& op, std::int64_t begin, std::int64_t end) {
  rows_of(op, begin, end);
}
FASTADV_CLONES void run(const GatherPerturb<Float16>& op, std::int64_t begin, std::int64_t end) {
  rows_of(op, begin, end);
}

template <class T>
OutOfRange first_out_of_range(const GatherPerturb<T>& op) {
  for (std::int64_t n = 0; n < op.count; ++n) {
    if (!op.id_in_range(n)) return {n, -1};
    if (!op.slot_in_range(n)) return {-1, n};
  }
  return {-1, -1};
}

// Sums in blocks of columns that stay in registers and L1, then one read and one write of the table's row.
template <class T, class G>
FASTADV_HD void segments_of(const GatherPerturbBackward<T, G>& op, std::int64_t begin, std::int64_t end) {
  typename Compute<T>::type sum[kColumns];
  for (std::int64_t s = begin; s < end; ++s) {
    if (op.empty(s) || op.id(s) == op.padding_idx) continue;
    for (std::int64_t first = 0; first < op.dim; first += kColumns) {
      const std::int64_t width = op.dim - first < kColumns ? op.dim - first : kColumns;
      for (std::int64_t d = 0; d < width; ++d) sum[d] = 0;
      for (std::int64_t p = 0; p < op.pass_count; ++p) {
        for (std::int64_t i = op.starts[s]; i < op.starts[s + 1]; ++i) {
          for (std::int64_t d = 0; d < width; ++d) sum[d] += op.at(p, i, first + d);
        }
      }
      for (std::int64_t d = 0; d < width; ++d) op.add(s, first + d, sum[d]);
    }
  }
}

#define FASTADV_BACKWARD(T, G)                                                                                   \
  FASTADV_CLONES void run(const GatherPerturbBackward<T, G>& op, std::int64_t begin, std::int64_t end) { \
    segments_of(op, begin, end);                                                                                 \
  }
FASTADV_BACKWARD(float, float)
FASTADV_BACKWARD(double, double)
FASTADV_BACKWARD(BFloat16, BFloat16)
FASTADV_BACKWARD(BFloat16, float)
FASTADV_BACKWARD(Float16, Float16)
FASTADV_BACKWARD(Float16, float)
#undef FASTADV_BACKWARD

}  // namespace

OutOfRange gather_perturb_cpu(const GatherPerturbCall& call, int threads) {
  OutOfRange bad{-1, -1};
  call.visit([&](const auto& op) {
    bad = first_out_of_range(op);
    if (bad.id_at >= 0 || bad.slot_at >= 0) return;
    parallel(op.count, op.dim, threads, [&](std::int64_t begin, std::int64_t end) { run(op, begin, end); });
  });
  return bad;
}

bool gather_perturb_backward_cpu(const GatherPerturbBackwardCall& call, int threads) {
  bool good = true;
  call.visit([&](const auto& op) {
    good = are_segments(op.order, op.count, op.starts, op.starts + 1, op.segments) &&
           all_below(op.ids, op.count, op.rows);
    if (!good) return;
    by_position(op.starts, op.segments, op.count, op.dim, threads,
                [&](std::int64_t begin, std::int64_t end) { run(op, begin, end); });
  });
  return good;
}

}  // namespace fastadv
