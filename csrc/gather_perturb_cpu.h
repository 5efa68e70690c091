// A row of gather_perturb on the CPU, which every op that embeds writes in the same way.
#pragma once

#include <memory>

#include "gather_perturb.h"

namespace fastadv {

// Rows begin .. end - 1, each by way of a row that stays in the first cache: what the C library copies from there, it
// writes without reading first what it overwrites.
template <class T>
FASTADV_HD void write_rows(const GatherPerturb<T>& op, std::int64_t begin, std::int64_t end) {
  const std::size_t size = std::size_t(op.dim) * sizeof(T);
  if (size == 0) return;
  const std::unique_ptr<T[]> room(new T[std::size_t(op.dim)]);
  for (std::int64_t n = begin; n < end; ++n) {
    if (op.adds(n)) op.row(n, 0, 1, room.get());
    memcpy(op.to(n), op.adds(n) ? room.get() : op.from(n), size);
  }
}

}  // namespace fastadv
