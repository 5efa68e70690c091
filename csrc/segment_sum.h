// out[s] = the sum of values[order[i]] over i in starts[s] .. stops[s], in that order: the body that CPU and CUDA share.
#pragma once

#include "common.h"

namespace fastadv {

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

  FASTADV_HD Sum at(std::int64_t i, std::int64_t d) const {
    return Compute<T>::widen(values[order[i] * row_stride + d]);
  }
};

// The call as it arrives from Python.
struct SegmentSumCall {
  int dtype;
  std::uintptr_t values;
  std::int64_t row_stride, count;
  std::uintptr_t order, starts, stops, out;
  std::int64_t rows, dim;

  template <class T>
  SegmentSum<T> as() const {
    return {reinterpret_cast<const T*>(values),
            row_stride,
            count,
            reinterpret_cast<const std::int64_t*>(order),
            reinterpret_cast<const std::int64_t*>(starts),
            reinterpret_cast<const std::int64_t*>(stops),
            reinterpret_cast<typename Compute<T>::type*>(out),
            rows,
            dim};
  }

  template <class F>
  void visit(F&& visit) const {
    visit_dtype(dtype, [&](auto zero) { visit(as<decltype(zero)>()); });
  }
};

// False, and nothing written, if an index points outside.
bool segment_sum_cpu(const SegmentSumCall& call, int threads);

// Groups equal ids by a radix sort: see fastadv/ops/segment_sum.py for what the outputs hold.
struct SegmentsCall {
  std::uintptr_t ids, mask;  // [count] int64; [count] bool, or null
  std::int64_t count, vocabulary;
  std::uintptr_t slot, order, starts, stops;  // [count], [count], [rows + 1], [rows]
  std::int64_t rows;
};

// The first position whose id is out of range, and nothing written; -1: none.
std::int64_t segments_cpu(const SegmentsCall& call);

#ifdef FASTADV_WITH_CUDA
const char* segment_sum_cuda(const SegmentSumCall& call, int device, std::uintptr_t stream);
#endif

}  // namespace fastadv
