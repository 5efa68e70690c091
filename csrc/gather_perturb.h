// out[n] = round(W[ids[n]] + delta[n]), or + delta[slot[n]], or W[ids[n]] alone: the body of the op.
// A slot of -1 adds nothing.
#pragma once

#include "common.h"

namespace fastadv {

template <class T>
struct GatherPerturb {
  using Sum = typename Compute<T>::type;

  const T* weight;  // [rows, dim], `row_stride` elements from row to row, inner stride 1
  std::int64_t row_stride;
  std::int64_t rows;
  const std::int64_t* ids;   // [count]
  const Sum* delta;          // [count, dim], or [slots, dim] with `slot`, or null
  const std::int64_t* slot;  // [count] or null
  std::int64_t slots;
  T* out;  // [count, dim]
  std::int64_t count;
  std::int64_t dim;

  FASTADV_HD bool id_in_range(std::int64_t n) const { return ids[n] >= 0 && ids[n] < rows; }
  FASTADV_HD bool slot_in_range(std::int64_t n) const { return !slot || (slot[n] >= -1 && slot[n] < slots); }

  FASTADV_HD const T* from(std::int64_t n) const { return weight + ids[n] * row_stride; }
  FASTADV_HD T* to(std::int64_t n) const { return out + n * dim; }
  FASTADV_HD bool adds(std::int64_t n) const { return delta && !(slot && slot[n] < 0); }

  // Elements first, first + step, ... of output row n, into `result`. The sum is rounded once; a lookup moves bits.
  FASTADV_HD void row(std::int64_t n, std::int64_t first, std::int64_t step, T* __restrict__ result) const {
    const T* __restrict__ word = from(n);
    if (adds(n)) {
      const Sum* __restrict__ add = delta + (slot ? slot[n] : n) * dim;
      for (std::int64_t d = first; d < dim; d += step) {
        result[d] = Compute<T>::narrow(Compute<T>::widen(word[d]) + add[d]);
      }
    } else {
      for (std::int64_t d = first; d < dim; d += step) result[d] = word[d];
    }
  }
  FASTADV_HD void row(std::int64_t n, std::int64_t first, std::int64_t step) const { row(n, first, step, to(n)); }
};

// The call as it arrives from Python: addresses and a dtype code.
struct GatherPerturbCall {
  int dtype;
  std::uintptr_t weight;
  std::int64_t row_stride, rows;
  std::uintptr_t ids, delta, slot;
  std::int64_t slots;
  std::uintptr_t out;
  std::int64_t count, dim;

  template <class T>
  GatherPerturb<T> as() const {
    using Sum = typename Compute<T>::type;
    return {reinterpret_cast<const T*>(weight),
            row_stride,
            rows,
            reinterpret_cast<const std::int64_t*>(ids),
            reinterpret_cast<const Sum*>(delta),
            reinterpret_cast<const std::int64_t*>(slot),
            slots,
            reinterpret_cast<T*>(out),
            count,
            dim};
  }

  // Calls `visit` with the typed form.
  template <class F>
  void visit(F&& visit) const {
    visit_dtype(dtype, [&](auto zero) { visit(as<decltype(zero)>()); });
  }
};

// The first position whose id, or whose slot, points outside; -1: none.
struct OutOfRange {
  std::int64_t id_at, slot_at;
  bool any() const { return id_at >= 0 || slot_at >= 0; }
};

OutOfRange first_out_of_range(const GatherPerturbCall& call);

// Checks every index before it reads a row; touches nothing if one is out of range.
OutOfRange gather_perturb_cpu(const GatherPerturbCall& call, int threads);

}  // namespace fastadv
