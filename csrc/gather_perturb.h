// out[n] = round(W[ids[n]] + delta[n]), or + delta[slot[n]], or W[ids[n]] alone; and what that adds to W's gradient:
// the bodies that the CPU and CUDA share.
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
  const std::int64_t* slot;  // [count], -1 where nothing is added; or null
  std::int64_t slots;
  T* out;  // [count, dim]
  std::int64_t count;
  std::int64_t dim;

  FASTADV_HD bool id_in_range(std::int64_t n) const { return ids[n] >= 0 && ids[n] < rows; }
  FASTADV_HD bool slot_in_range(std::int64_t n) const { return !slot || (slot[n] >= -1 && slot[n] < slots); }

  // Elements first, first + step, ... of output row n. The sum is rounded once; a plain lookup moves bits.
  FASTADV_HD void row(std::int64_t n, std::int64_t first, std::int64_t step) const {
    const T* __restrict__ from = weight + ids[n] * row_stride;
    T* __restrict__ to = out + n * dim;
    if (!delta || (slot && slot[n] < 0)) {
      for (std::int64_t d = first; d < dim; d += step) to[d] = from[d];
      return;
    }
    const Sum* __restrict__ add = delta + (slot ? slot[n] : n) * dim;
    for (std::int64_t d = first; d < dim; d += step) {
      to[d] = Compute<T>::narrow(Compute<T>::widen(from[d]) + add[d]);
    }
  }
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

// grad[id] = round(grad[id] + the sum of passes[p][order[i]] over all p, and i in starts[s] .. starts[s + 1])
// where id = ids[order[starts[s]]]: the rows that a batch touches, and no others.
template <class T, class G>
struct GatherPerturbBackward {
  using Sum = typename Compute<T>::type;

  T* grad;  // [rows, dim], `row_stride` elements from row to row, inner stride 1
  std::int64_t row_stride, rows;
  const G* const* passes;              // each [count, dim]
  const std::int64_t* pass_strides;    // elements from row to row, inner stride 1
  std::int64_t pass_count, count;
  const std::int64_t* ids;     // [count]
  const std::int64_t* order;   // [count]
  const std::int64_t* starts;  // [segments + 1]
  std::int64_t segments, dim, padding_idx;

  FASTADV_HD bool empty(std::int64_t s) const { return starts[s] == starts[s + 1]; }
  FASTADV_HD std::int64_t id(std::int64_t s) const { return ids[order[starts[s]]]; }
  FASTADV_HD Sum at(std::int64_t p, std::int64_t i, std::int64_t d) const {
    return Compute<G>::widen(passes[p][order[i] * pass_strides[p] + d]);
  }
  FASTADV_HD void add(std::int64_t s, std::int64_t d, Sum sum) const {
    T& to = grad[id(s) * row_stride + d];
    to = Compute<T>::narrow(Compute<T>::widen(to) + sum);
  }
};

struct GatherPerturbBackwardCall {
  int dtype, pass_dtype;
  std::uintptr_t grad;
  std::int64_t row_stride, rows;
  std::uintptr_t passes, pass_strides;
  std::int64_t pass_count, count;
  std::uintptr_t ids, order, starts;
  std::int64_t segments, dim, padding_idx;

  template <class T, class G>
  GatherPerturbBackward<T, G> as() const {
    return {reinterpret_cast<T*>(grad),
            row_stride,
            rows,
            reinterpret_cast<const G* const*>(passes),
            reinterpret_cast<const std::int64_t*>(pass_strides),
            pass_count,
            count,
            reinterpret_cast<const std::int64_t*>(ids),
            reinterpret_cast<const std::int64_t*>(order),
            reinterpret_cast<const std::int64_t*>(starts),
            segments,
            dim,
            padding_idx};
  }

  // The passes have the table's dtype, or the one that it is computed in.
  template <class F>
  void visit(F&& visit) const {
    visit_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      if (pass_dtype == dtype) return visit(as<T, T>());
      visit(as<T, typename Compute<T>::type>());
    });
  }
};

// The first position whose id, or whose slot, points outside; -1: none.
struct OutOfRange {
  std::int64_t id_at, slot_at;
};

// Checks every index before it reads a row; touches nothing if one is out of range.
OutOfRange gather_perturb_cpu(const GatherPerturbCall& call, int threads);

// False, and nothing written, if an index points outside.
bool gather_perturb_backward_cpu(const GatherPerturbBackwardCall& call, int threads);

#ifdef FASTADV_WITH_CUDA
// Out of range: that row is zeros and *flag becomes 1. Returns null, or what CUDA says went wrong.
const char* gather_perturb_cuda(const GatherPerturbCall& call, int device, std::uintptr_t stream, std::uintptr_t flag);
#endif

}  // namespace fastadv
