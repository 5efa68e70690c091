// gather_perturb on the CPU: OpenMP over rows, the inner loop left to the vectoriser.
#include "gather_perturb_cpu.h"

#include "parallel.h"

namespace fastadv {
namespace {

// Clones cannot be templates, and a parallel region's body is cut out before clones are made: one function each.
FASTADV_CLONES void run(const GatherPerturb<float>& op, std::int64_t begin, std::int64_t end) {
  write_rows(op, begin, end);
}
FASTADV_CLONES void run(const GatherPerturb<double>& op, std::int64_t begin, std::int64_t end) {
  write_rows(op, begin, end);
}
FASTADV_CLONES void run(const GatherPerturb<BFloat16>& op, std::int64_t begin, std::int64_t end) {
  write_rows(op, begin, end);
}
FASTADV_CLONES void run(const GatherPerturb<Float16>& op, std::int64_t begin, std::int64_t end) {
  write_rows(op, begin, end);
}

}  // namespace

OutOfRange first_out_of_range(const GatherPerturbCall& call) {
  OutOfRange bad{-1, -1};
  call.visit([&](const auto& op) {
    for (std::int64_t n = 0; n < op.count && !bad.any(); ++n) {
      bad = {op.id_in_range(n) ? -1 : n, op.slot_in_range(n) ? -1 : n};
    }
  });
  return bad;
}

OutOfRange gather_perturb_cpu(const GatherPerturbCall& call, int threads) {
  const OutOfRange bad = first_out_of_range(call);
  if (bad.any()) return bad;
  call.visit([&](const auto& op) {
    parallel(op.count, op.dim, threads, [&](std::int64_t begin, std::int64_t end) { run(op, begin, end); });
  });
  return bad;
}

}  // namespace fastadv
