// out[s] = sum of values[order[i]] over i in starts[s] .. stops[s], in that order; and the plan itself.
#pragma once

#include "common.h"

namespace fastadv {

// sum += row, element by element: how every op here adds up, so that the order of positions is the order of the sum.
template <class T>
FASTADV_HD void add_row(typename Compute<T>::type* __restrict__ sum, const T* __restrict__ row, int width) {
  for (int d = 0; d < width; ++d) sum[d] += Compute<T>::widen(row[d]);
}

// The same for the first row of a sum, which starts at zero.
template <class T>
FASTADV_HD void set_row(typename Compute<T>::type* __restrict__ sum, const T* __restrict__ row, int width) {
  for (int d = 0; d < width; ++d) sum[d] = 0 + Compute<T>::widen(row[d]);
}

template <class T>
struct SegmentSum {
  using Sum = typename Compute<T>::type;

  const T* values;  // [count, dim], `row_stride` elements from row to row, inner stride 1
  std::int64_t row_stride;
  std::int64_t count;
  const std::int64_t* order;   // [count]
  const std::int64_t* starts;  // [rows]
  const std::int64_t* stops;   // [rows]
  Sum* out;                    // [rows, dim]
  std::int64_t rows;
  std::int64_t dim;

  FASTADV_HD bool position_in_range(std::int64_t i) const { return order[i] >= 0 && order[i] < count; }
  FASTADV_HD bool segment_in_range(std::int64_t s) const {
    return starts[s] >= 0 && starts[s] <= stops[s] && stops[s] <= count;
  }

  // Columns first .. first + width of segment s; width is at most kTile.
  template <int kTile>
  FASTADV_HD void columns(std::int64_t s, std::int64_t first, int width) const {
    const std::int64_t begin = starts[s], end = stops[s];
    const auto row = [&](std::int64_t i) { return values + order[i] * row_stride + first; };
    Sum* __restrict__ to = out + s * dim + first;
    if (end - begin == 1) return set_row(to, row(begin), width);  // most words
    Sum sum[kTile];
    for (int d = 0; d < width; ++d) sum[d] = 0;
    for (std::int64_t i = begin; i < end; ++i) add_row(sum, row(i), width);
    for (int d = 0; d < width; ++d) to[d] = sum[d];
  }
};

// The call as it arrives from Python: addresses and a dtype code.
struct SegmentSumCall {
  int dtype;
  std::uintptr_t values;
  std::int64_t row_stride, count;
  std::uintptr_t order, starts, stops, out;
  std::int64_t rows, dim;

  template <class T>
  SegmentSum<T> as() const {
    using Sum = typename Compute<T>::type;
    const auto indices = [](std::uintptr_t address) { return reinterpret_cast<const std::int64_t*>(address); };
    return {reinterpret_cast<const T*>(values), row_stride, count, indices(order), indices(starts), indices(stops),
            reinterpret_cast<Sum*>(out),        rows,       dim};
  }

  // Calls `visit` with the typed form.
  template <class F>
  void visit(F&& visit) const {
    visit_dtype(dtype, [&](auto zero) { visit(as<decltype(zero)>()); });
  }
};

// The first entry of `order`, or the first segment, that points outside; -1: none.
struct BadPlan {
  std::int64_t position_at, segment_at;
  bool any() const { return position_at >= 0 || segment_at >= 0; }
};

BadPlan first_outside(const SegmentSumCall& call);

// Checks the plan before it reads a row; writes nothing if it points outside.
BadPlan segment_sum_cpu(const SegmentSumCall& call, int threads);

// Positions sorted by (id, masked, position), and where each id's begin and end: see fastadv/ops/segment_sum.py.
struct SegmentsCall {
  std::uintptr_t ids, mask;  // [count] int64; [count] bool, or null: nothing is masked
  std::int64_t vocabulary, count;
  std::uintptr_t slot, order, starts, stops;  // [count], [count], [rows + 1], [rows]
  std::int64_t rows;
};

// The first position whose id is outside the table, and nothing has been written then; -1: none.
std::int64_t segments_cpu(const SegmentsCall& call);

}  // namespace fastadv
