// G[id_s] = round(G[id_s] + sum of grad[order[i]] over all grads and all i in starts[s] .. starts[s + 1]). id_s is the
// id of the segment's first position, and rises from segment to segment.
#pragma once

#include "segment_sum.h"

namespace fastadv {

constexpr int kMostGrads = 64;  // a kernel takes them by value

struct GradRows {
  const void* rows;         // [count, dim], inner stride 1
  std::int64_t row_stride;  // elements
  bool wide;                // in the dtype of the sum, not in the table's
};

template <class T>
struct GatherPerturbBackward {
  using Sum = typename Compute<T>::type;

  T* table_grad;  // [vocabulary, dim], `row_stride` elements from row to row, inner stride 1
  std::int64_t row_stride;
  std::int64_t vocabulary;
  GradRows grads[kMostGrads];
  int grad_count;
  const std::int64_t* ids;     // [count]
  const std::int64_t* order;   // [count]
  const std::int64_t* starts;  // [rows + 1]
  std::int64_t rows;
  std::int64_t count;
  std::int64_t dim;
  std::int64_t padding;  // the row that gets nothing, or -1

  FASTADV_HD bool position_in_range(std::int64_t i) const { return order[i] >= 0 && order[i] < count; }
  FASTADV_HD bool segment_in_range(std::int64_t s) const {
    return starts[s] >= 0 && starts[s] <= starts[s + 1] && starts[s + 1] <= count;
  }
  FASTADV_HD bool empty(std::int64_t s) const { return starts[s] == starts[s + 1]; }
  FASTADV_HD std::int64_t id(std::int64_t s) const { return ids[order[starts[s]]]; }
  FASTADV_HD bool id_in_range(std::int64_t s) const { return id(s) >= 0 && id(s) < vocabulary; }

  // Columns first .. first + width of a segment that is not empty; width is at most kTile.
  template <int kTile>
  FASTADV_HD void columns(std::int64_t s, std::int64_t first, int width) const {
    Sum sum[kTile];
    for (int d = 0; d < width; ++d) sum[d] = 0;
    for (int g = 0; g < grad_count; ++g) {
      for (std::int64_t i = starts[s]; i < starts[s + 1]; ++i) {
        const std::int64_t from = order[i] * grads[g].row_stride + first;
        if (grads[g].wide)
          add_row(sum, static_cast<const Sum*>(grads[g].rows) + from, width);
        else
          add_row(sum, static_cast<const T*>(grads[g].rows) + from, width);
      }
    }
    T* __restrict__ to = table_grad + id(s) * row_stride + first;
    for (int d = 0; d < width; ++d) to[d] = Compute<T>::narrow(Compute<T>::widen(to[d]) + sum[d]);
  }
};

// The call as it arrives from Python: addresses and a dtype code.
struct GatherPerturbBackwardCall {
  int dtype;
  std::uintptr_t table_grad;
  std::int64_t row_stride, vocabulary;
  GradRows grads[kMostGrads];
  int grad_count;
  std::uintptr_t ids, order, starts;
  std::int64_t rows, count, dim, padding;

  template <class T>
  GatherPerturbBackward<T> as() const {
    const auto indices = [](std::uintptr_t address) { return reinterpret_cast<const std::int64_t*>(address); };
    GatherPerturbBackward<T> op{};
    op.table_grad = reinterpret_cast<T*>(table_grad);
    op.row_stride = row_stride, op.vocabulary = vocabulary;
    for (int g = 0; g < grad_count; ++g) op.grads[g] = grads[g];
    op.grad_count = grad_count;
    op.ids = indices(ids), op.order = indices(order), op.starts = indices(starts);
    op.rows = rows, op.count = count, op.dim = dim, op.padding = padding;
    return op;
  }

  // Calls `visit` with the typed form.
  template <class F>
  void visit(F&& visit) const {
    visit_dtype(dtype, [&](auto zero) { visit(as<decltype(zero)>()); });
  }
};

// The first entry of `order`, the first segment or the first segment's id that is outside, or the first segment whose
// id does not rise; -1: none.
struct BadBackward {
  std::int64_t position_at, segment_at, id_at, fall_at;
  bool any() const { return position_at >= 0 || segment_at >= 0 || id_at >= 0 || fall_at >= 0; }
};

// Checks the plan before it reads a row; writes nothing if it is bad.
BadBackward gather_perturb_backward_cpu(const GatherPerturbBackwardCall& call, int threads);

}  // namespace fastadv
