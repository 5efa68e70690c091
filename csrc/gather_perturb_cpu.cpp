// gather_perturb on the CPU: OpenMP over rows, the inner loop left to the vectoriser.
#include "gather_perturb_cpu.h"

#include <memory>

#include "parallel.h"

namespace fastadv {
namespace {

// `room` for one row.
template <class T>
FASTADV_HD void write_all(const GatherPerturb<T>& op, std::int64_t begin, std::int64_t end, T* room) {
  const std::size_t size = std::size_t(op.dim) * sizeof(T);
  for (std::int64_t n = begin; n < end; ++n) {
    if (op.adds(n)) op.row(n, 0, 1, room);
    memcpy(op.to(n), op.adds(n) ? room : op.from(n), size);
  }
}

// Clones cannot be templates, a parallel region's body is cut out before clones are made, and clones that other files
// see would be seen outside of the library too: two functions each.
#define CLONE_FOR(T)                                                                                   \
  FASTADV_CLONES void run(const GatherPerturb<T>& op, std::int64_t begin, std::int64_t end, T* room) { \
    write_all(op, begin, end, room);                                                                   \
  }
CLONE_FOR(float)
CLONE_FOR(double)
CLONE_FOR(BFloat16)
CLONE_FOR(Float16)
#undef CLONE_FOR

template <class T>
void with_room(const GatherPerturb<T>& op, std::int64_t begin, std::int64_t end) {
  if (op.dim == 0) return;
  const std::unique_ptr<T[]> room(new T[op.delta ? std::size_t(op.dim) : 0]);
  run(op, begin, end, room.get());
}

}  // namespace

void write_rows(const GatherPerturb<float>& op, std::int64_t begin, std::int64_t end) { with_room(op, begin, end); }
void write_rows(const GatherPerturb<double>& op, std::int64_t begin, std::int64_t end) { with_room(op, begin, end); }
void write_rows(const GatherPerturb<BFloat16>& op, std::int64_t begin, std::int64_t end) { with_room(op, begin, end); }
void write_rows(const GatherPerturb<Float16>& op, std::int64_t begin, std::int64_t end) { with_room(op, begin, end); }

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
    parallel(op.count, op.dim, threads, [&](std::int64_t begin, std::int64_t end) { write_rows(op, begin, end); });
  });
  return bad;
}

}  // namespace fastadv
