// gather_perturb on the CPU: OpenMP over rows, the inner loop left to the vectoriser.
#include "gather_perturb.h"
#include "parallel.h"

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

}  // namespace fastadv
