// Shared by ascend, table_step and rows on the CPU: sums in lanes, the choice of step and ball, blocks of rows.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>

#include "ascend.h"
#include "lanes.h"
#include "parallel.h"

namespace fastadv {

constexpr std::int64_t kBlock = 16384;  // elements to a block, about: its sums are one term of the group's

// A run of gradients in Real: the row itself, or a copy in `room`.
INLINE inline const float* widened(const float* from, std::int64_t, float*) { return from; }
INLINE inline const double* widened(const double* from, std::int64_t, double*) { return from; }
template <class G>
INLINE inline const float* widened(const G* from, std::int64_t count, float* room) {
  for (std::int64_t i = 0; i < count; ++i) room[i] = Compute<G>::widen(from[i]);
  return room;
}

// The largest magnitude, and the sum of squares, of element(0) .. element(dim - 1).
template <class Real, class F>
INLINE inline void add_largest(std::int64_t dim, Sums& sums, const F& element) {
  auto largest = magnitude(Real(0));
  for (std::int64_t i = 0; i < dim; ++i) largest = std::max(largest, magnitude(Real(element(i))));
  sums.largest = std::max(sums.largest, std::int64_t(largest));
}
template <class Real, class F>
INLINE inline void add_squares(std::int64_t dim, Sums& sums, const F& element) {
  Real room[kRun];
  for (std::int64_t first = 0; first < dim; first += kRun) {
    const std::int64_t count = std::min(dim - first, kRun);
    for (std::int64_t i = 0; i < count; ++i) room[i] = element(first + i);
    add_products(room, room, count, sums.gg);
  }
}

// Calls visit with the step of row n.
template <class Real, class F>
INLINE inline void with_step(const Move<Real>& move, bool live, const F& visit) {
  if (!live || move.step == Move<Real>::kStays) return visit(Zero<Real>{});
  if (move.step == Move<Real>::kSigns) return visit(Sign<Real>{move.along.length});
  visit(move.along);
}

// Calls visit with the projection.
template <class Real, class F>
INLINE inline void with_end(const Move<Real>& move, const F& visit) {
  if (move.end == Move<Real>::kKeep) return visit(Same<Real>{});
  if (move.end == Move<Real>::kClamp) return visit(Clamp<Real>{move.onto.length});
  visit(move.onto);
}

// The rows of a group in blocks, the same ones for any number of threads.
struct Blocks {
  std::int64_t begin, end, rows;
  std::int64_t count() const { return (end - begin + rows - 1) / rows; }
  std::int64_t first(std::int64_t block) const { return begin + block * rows; }
  std::int64_t last(std::int64_t block) const { return std::min(first(block) + rows, end); }
};

// The sums of a group's blocks, added in order; `parts` has room for them if there is more than one thread.
template <class F>
Sums add_in_order(const Blocks& blocks, std::int64_t dim, int threads, Sums* parts, const F& sums_of) {
  Sums total;
  if (threads == 1) {
    for (std::int64_t b = 0; b < blocks.count(); ++b) total += sums_of(b);
    return total;
  }
  parallel(blocks.count(), blocks.rows * dim, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) parts[b] = sums_of(b);
  });
  for (std::int64_t b = 0; b < blocks.count(); ++b) total += parts[b];
  return total;
}

// Moves delta, and calls after(begin, end) on rows that have just moved, while they are in cache.
using AfterRows = std::function<void(std::int64_t begin, std::int64_t end)>;
void move_rows(const AscendCall& call, int threads, const AfterRows& after);

}  // namespace fastadv
