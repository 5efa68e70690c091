// rows on the CPU: one reduction and one pass that moves, over blocks of rows.
#include <atomic>

#include "ascend_cpu.h"
#include "rows.h"

namespace fastadv {
namespace {

// Whether a row holds anything but zeros of either sign: any bit but the sign's.
template <class Word>
INLINE inline bool holds_anything(const Word* row, std::int64_t dim) {
  constexpr Word magnitude = Word(~Word(0)) >> 1;
  for (std::int64_t first = 0; first < dim; first += kRun) {
    const std::int64_t count = std::min(dim - first, kRun);
    Word any = 0;
    for (std::int64_t i = 0; i < count; ++i) any |= row[first + i];
    if (any & magnitude) return true;
  }
  return false;
}

template <class Word>
struct Table {
  const Word* rows;
  std::int64_t stride, dim;
};

template <class T>
INLINE inline Sums products(const Rows<T>& op, std::int64_t begin, std::int64_t end) {
  typename Rows<T>::Real grads[kRun], deltas[kRun];
  const bool with_delta = op.rule.ball_of_l2();
  Sums sums;
  for (std::int64_t n = begin; n < end; ++n) {
    for (std::int64_t first = 0; first < op.dim; first += kRun) {
      const std::int64_t count = std::min(op.dim - first, kRun);
      const auto* g = widened(op.grad_row(n) + first, count, grads);
      add_products(g, g, count, sums.gg);
      if (!with_delta) continue;
      const T *at = op.table_row(n) + first, *from = op.saved_row(n) + first;
      for (std::int64_t i = 0; i < count; ++i) deltas[i] = Compute<T>::widen(at[i]) - Compute<T>::widen(from[i]);
      add_products(deltas, deltas, count, sums.dd);
      add_products(deltas, g, count, sums.dg);
    }
  }
  return sums;
}

template <class T>
INLINE inline Sums pass_over(const Rows<T>& op, Pass pass, const Move<typename Rows<T>::Real>& move, std::int64_t begin,
                             std::int64_t end) {
  using Real = typename Rows<T>::Real;
  if (pass == kProducts) return products(op, begin, end);
  Sums sums;
  for (std::int64_t n = begin; n < end; ++n) {
    const T *at = op.table_row(n), *g = op.grad_row(n), *from = op.saved_row(n);
    const auto grad = [&](std::int64_t i) INLINE { return Compute<T>::widen(g[i]); };
    const auto scaled = [&](std::int64_t i) INLINE { return grad(i) * move.along.inverse; };
    if (pass == kLargestGrad) add_largest<Real>(op.dim, sums, grad);
    if (pass == kSquaresOfGrad) add_squares<Real>(op.dim, sums, scaled);
    if (pass != kLargestMoved && pass != kSquaresOfMoved) continue;
    with_step(move, true, [&](const auto& step) INLINE {
      const auto moved = [&](std::int64_t i) INLINE { return op.moved(at[i], g[i], from[i], step); };
      const auto scaled_moved = [&](std::int64_t i) INLINE { return moved(i) * move.onto.inverse; };
      if (pass == kLargestMoved) add_largest<Real>(op.dim, sums, moved);
      if (pass == kSquaresOfMoved) add_squares<Real>(op.dim, sums, scaled_moved);
    });
  }
  return sums;
}

template <class T>
INLINE inline void move_rows(const Rows<T>& op, const Move<typename Rows<T>::Real>& move, std::int64_t begin,
                             std::int64_t end) {
  using C = Compute<T>;
  for (std::int64_t n = begin; n < end; ++n) {
    T* __restrict__ at = op.table_row(n);
    const T* __restrict__ g = op.grad_row(n);
    const T* __restrict__ from = op.saved_row(n);
    with_step(move, true, [&](const auto& step) INLINE {
      if (op.rule.ball == kNoBall) {
        for (std::int64_t i = 0; i < op.dim; ++i) at[i] = C::narrow(C::widen(at[i]) + step(C::widen(g[i])));
        return;
      }
      with_end(move, [&](const auto& project) INLINE {
        for (std::int64_t i = 0; i < op.dim; ++i) {
          at[i] = C::narrow(C::widen(from[i]) + project(op.moved(at[i], g[i], from[i], step)));
        }
      });
    });
  }
}

// Clones cannot be templates: one function each.
#define CLONES_FOR(T)                                                                                        \
  FASTADV_CLONES Sums pass(const Rows<T>& op, Pass which, const Move<typename Rows<T>::Real>& move,          \
                           std::int64_t begin, std::int64_t end) {                                           \
    return pass_over(op, which, move, begin, end);                                                           \
  }                                                                                                          \
  FASTADV_CLONES void apply(const Rows<T>& op, const Move<typename Rows<T>::Real>& move, std::int64_t begin, \
                            std::int64_t end) {                                                              \
    move_rows(op, move, begin, end);                                                                         \
  }
CLONES_FOR(float)
CLONES_FOR(double)
CLONES_FOR(BFloat16)
CLONES_FOR(Float16)
#undef CLONES_FOR

// marks[n] <- whether row n holds anything.
#define CLONE_FOR(Word)                                                                                             \
  FASTADV_CLONES void mark(const Table<Word>& table, std::int64_t begin, std::int64_t end, std::int64_t* marks) {   \
    for (std::int64_t n = begin; n < end; ++n) marks[n] = holds_anything(table.rows + n * table.stride, table.dim); \
  }
CLONE_FOR(std::uint16_t)
CLONE_FOR(std::uint32_t)
CLONE_FOR(std::uint64_t)
#undef CLONE_FOR

// One group on `threads` threads; `parts` has room for the sums of its blocks, if there is more than one thread.
// Returns whether its gradient is finite. Without a gradient nothing moves, not even onto the ball.
template <class T>
bool step_group(const Rows<T>& op, const Blocks& blocks, int threads, Sums* parts) {
  using Real = typename Rows<T>::Real;
  const auto reduce = [&](Pass which, const Move<Real>& move) {
    const auto sums_of = [&](std::int64_t b) { return pass(op, which, move, blocks.first(b), blocks.last(b)); };
    return add_in_order(blocks, op.dim, threads, parts, sums_of);
  };
  const Move<Real> move = plan(op.rule, reduce);
  if (move.step == Move<Real>::kStays) return move.finite;
  parallel(blocks.count(), blocks.rows * op.dim, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) apply(op, move, blocks.first(b), blocks.last(b));
  });
  return move.finite;
}

template <class T>
std::int64_t step_groups(const Rows<T>& op, bool by_row, int threads) {
  if (op.count == 0 || op.dim == 0) return 0;
  if (!by_row) {
    const Blocks blocks{0, op.count, std::max<std::int64_t>(kBlock / op.dim, 1)};
    const std::unique_ptr<Sums[]> parts(new Sums[std::size_t(blocks.count())]);
    return !step_group(op, blocks, threads, parts.get());
  }
  std::atomic<std::int64_t> skipped{0};
  parallel(op.count, op.dim, threads, [&](std::int64_t begin, std::int64_t end) {
    std::int64_t mine = 0;
    for (std::int64_t n = begin; n < end; ++n) mine += !step_group(op, Blocks{n, n + 1, 1}, 1, nullptr);
    skipped += mine;
  });
  return skipped;
}

}  // namespace

std::int64_t rows_first_bad(const RowsCall& call) {
  const auto rows = reinterpret_cast<const std::int64_t*>(call.rows);
  std::int64_t least = 0;
  for (std::int64_t n = 0; rows && n < call.count; least = rows[n] + 1, ++n) {
    if (rows[n] < least || rows[n] >= call.table_rows) return n;
  }
  return -1;
}

std::int64_t rows_touched_cpu(const RowsCall& call, std::int64_t* found, int threads) {
  const auto look = [&](auto word) {
    using Word = decltype(word);
    const Table<Word> table{reinterpret_cast<const Word*>(call.table), call.table_stride, call.dim};
    parallel(call.table_rows, call.dim, threads,
             [&](std::int64_t begin, std::int64_t end) { mark(table, begin, end, found); });
  };
  if (call.element_size() == 8) look(std::uint64_t());
  if (call.element_size() == 4) look(std::uint32_t());
  if (call.element_size() == 2) look(std::uint16_t());
  std::int64_t count = 0;
  for (std::int64_t n = 0; n < call.table_rows; ++n) {
    const std::int64_t touched = found[n];
    found[count] = n;  // the marks up to here have been read
    count += touched;
  }
  return count;
}

void rows_copy_cpu(const RowsCall& call, bool back, int threads) {
  const auto rows = reinterpret_cast<const std::int64_t*>(call.rows);
  const auto table = reinterpret_cast<char*>(call.table), saved = reinterpret_cast<char*>(call.saved);
  const std::int64_t bytes = call.dim * call.element_size(), stride = call.table_stride * call.element_size();
  parallel(bytes ? call.count : 0, call.dim, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      char *row = table + (rows ? rows[n] : n) * stride, *copy = saved + n * bytes;
      memcpy(back ? row : copy, back ? copy : row, std::size_t(bytes));
    }
  });
}

void rows_step_cpu(const RowsCall& call, const RowsRule& rule, int threads) {
  visit(call, rule, [&](const auto& op) {
    const std::int64_t skipped = step_groups(op, rule.by_row, threads);
    if (skipped) *reinterpret_cast<std::int64_t*>(rule.skipped) += skipped;
  });
}

}  // namespace fastadv
