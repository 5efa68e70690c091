// Shared by ascend, table_step and rows on the CPU: sums in lanes, the choice of step and ball, blocks of rows.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>

#include "ascend.h"
#include "gather_perturb_cpu.h"
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

// Calls step(blocks, threads, parts) for each group, one after the other or all at once, and counts those of which it
// returns false.
template <class G, class F>
std::int64_t each_group(const Ascend<G>& op, int threads, const F& step) {
  if (op.groups == 0 || op.first(op.groups) == 0) return 0;
  const std::int64_t rows = std::max<std::int64_t>(kBlock / std::max<std::int64_t>(op.dim, 1), 1);
  const auto blocks = [&](std::int64_t g) { return Blocks{op.first(g), op.first(g + 1), rows}; };
  std::atomic<std::int64_t> refused{0};
  if (op.groups >= threads) {
    parallel_uneven(op.groups, 1, op.first(op.groups) * op.dim, threads, [&](std::int64_t begin, std::int64_t end) {
      std::int64_t mine = 0;
      for (std::int64_t g = begin; g < end; ++g) mine += !step(blocks(g), 1, nullptr);
      refused += mine;
    });
    return refused;
  }
  std::int64_t most = 0;
  for (std::int64_t g = 0; g < op.groups; ++g) most = std::max(most, blocks(g).count());
  const std::unique_ptr<Sums[]> parts(new Sums[std::size_t(most)]);
  for (std::int64_t g = 0; g < op.groups; ++g) refused += !step(blocks(g), threads, parts.get());
  return refused;
}

// after(begin, end) is called on rows that have just moved, while they are in cache.
using AfterRows = std::function<void(std::int64_t begin, std::int64_t end)>;

// Calls move(after), and writes the lookup of what it moves. Touches nothing if an index is out of range.
template <class F>
OutOfRange and_embed(const GatherPerturbCall* embedding, int threads, const F& move) {
  if (!embedding || embedding->count == 0) {
    move(AfterRows());
    return {-1, -1};
  }
  const OutOfRange bad = first_out_of_range(*embedding);
  if (bad.any()) return bad;
  embedding->visit([&](const auto& op) {
    const auto write = [&](std::int64_t begin, std::int64_t end) { write_rows(op, begin, end); };
    move(op.slot ? AfterRows() : AfterRows(write));
    if (op.slot) parallel(op.count, op.dim, threads, write);
  });
  return bad;
}

// Moves delta.
void move_rows(const AscendCall& call, int threads, const AfterRows& after);

}  // namespace fastadv
