// Rows of a table in place: which of them hold anything, copies of them, and a step within a ball around the copies.
//
//   table[n] <- saved[n] + ball(table[n] - saved[n] + step * d(grad[n]))
//   table[n] <- table[n] + step * d(grad[n])                                without a ball
//
// ascend.h has the directions d, the balls and their algebra; here delta is table - saved, which nothing stores.
#pragma once

#include "ascend.h"
#include "cuda_device.h"

namespace fastadv {

template <class T>
struct Rows {
  using Real = typename Compute<T>::type;

  T* table;  // [.., dim], `table_stride` elements from row to row, inner stride 1
  std::int64_t table_stride;
  const T* grad;  // likewise, `grad_stride` elements from row to row
  std::int64_t grad_stride;
  const T* saved;            // [count, dim], or null where there is no ball
  const std::int64_t* rows;  // [count], strictly ascending: the rows that move; or null: the first `count`
  std::int64_t count, dim;
  Rule<Real> rule;

  FASTADV_HD std::int64_t row(std::int64_t n) const { return rows ? rows[n] : n; }
  FASTADV_HD T* table_row(std::int64_t n) const { return table + row(n) * table_stride; }
  FASTADV_HD const T* grad_row(std::int64_t n) const { return grad + row(n) * grad_stride; }
  FASTADV_HD const T* saved_row(std::int64_t n) const { return saved ? saved + n * dim : nullptr; }

  // Where the step leads from `at`, as distance from `from`.
  template <class Step>
  static FASTADV_HD Real moved(T at, T grad, T from, const Step& step) {
    return (Compute<T>::widen(at) + step(Compute<T>::widen(grad))) - Compute<T>::widen(from);
  }
};

// The call as it arrives from Python: addresses and a dtype code. Every op needs some of it.
struct RowsCall {
  int dtype;
  std::uintptr_t table;
  std::int64_t table_stride, table_rows;
  std::uintptr_t grad;
  std::int64_t grad_stride;
  std::uintptr_t saved, rows;
  std::int64_t count, dim;

  std::int64_t element_size() const { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }
};

struct RowsRule {
  double step, epsilon;
  int direction, ball;
  bool by_row;             // a norm for each row, not one over all of them
  std::uintptr_t skipped;  // int64: counts the groups with a gradient that is not finite
};

// Calls `visit` with the typed form.
template <class F>
void visit(const RowsCall& call, const RowsRule& rule, F&& visitor) {
  const auto as = [&](auto element) {
    using T = decltype(element);
    using Real = typename Compute<T>::type;
    return Rows<T>{reinterpret_cast<T*>(call.table),
                   call.table_stride,
                   reinterpret_cast<const T*>(call.grad),
                   call.grad_stride,
                   reinterpret_cast<const T*>(call.saved),
                   reinterpret_cast<const std::int64_t*>(call.rows),
                   call.count,
                   call.dim,
                   {Real(rule.step), Real(rule.epsilon), Direction(rule.direction), Ball(rule.ball)}};
  };
  switch (call.dtype) {
    case kFloat64: return visitor(as(double()));
    case kBFloat16: return visitor(as(BFloat16()));
    case kFloat16: return visitor(as(Float16()));
    default: return visitor(as(float()));
  }
}

// The first of `rows` that the table does not have, or that is not above the one before it; -1: none.
std::int64_t rows_first_bad(const RowsCall& call);

// Writes the rows of the table that hold anything but zeros to `found`, which has room for all; returns how many.
std::int64_t rows_touched_cpu(const RowsCall& call, std::int64_t* found, int threads);

// saved <- the rows, or (back) the rows <- saved.
void rows_copy_cpu(const RowsCall& call, bool back, int threads);

void rows_step_cpu(const RowsCall& call, const RowsRule& rule, int threads);

constexpr int kRowsParts = 768;  // of a step over all rows: one wave, on an A100 too; each has room for five doubles

#ifdef FASTADV_WITH_CUDA
// A row that the table does not have is left out, and the flag is set. Both return null, or what CUDA says went wrong.
const char* rows_copy_cuda(const RowsCall& call, bool back, const OnDevice& on);
const char* rows_step_cuda(const RowsCall& call, const RowsRule& rule, std::uintptr_t parts, const OnDevice& on);
#endif

}  // namespace fastadv
