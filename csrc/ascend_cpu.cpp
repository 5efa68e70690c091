// ascend on the CPU: passes over blocks of rows, whose sums are added in order whatever the number of threads.
#include "ascend_cpu.h"

#include <atomic>

#include "gather_perturb_cpu.h"

namespace fastadv {
namespace {

template <class G>
INLINE inline Sums products(const Ascend<G>& op, std::int64_t begin, std::int64_t end) {
  typename Ascend<G>::Real room[kRun];
  const bool with_delta = op.rule.ball_of_l2();
  Sums sums;
  for (std::int64_t n = begin; n < end; ++n) {
    const bool live = op.live(n);
    for (std::int64_t first = 0; first < op.dim; first += kRun) {
      const std::int64_t count = std::min(op.dim - first, kRun);
      const auto* d = op.delta_row(n) + first;
      if (with_delta) add_products(d, d, count, sums.dd);
      if (!live) continue;
      const auto* g = widened(op.grad_row(n) + first, count, room);
      add_products(g, g, count, sums.gg);
      if (with_delta) add_products(d, g, count, sums.dg);
    }
  }
  return sums;
}

template <class G>
INLINE inline Sums pass_over(const Ascend<G>& op, Pass pass, const Move<typename Ascend<G>::Real>& move,
                             std::int64_t begin, std::int64_t end) {
  using Real = typename Ascend<G>::Real;
  if (pass == kProducts) return products(op, begin, end);
  Sums sums;
  for (std::int64_t n = begin; n < end; ++n) {
    const Real* d = op.delta_row(n);
    const G* g = op.grad_row(n);
    const auto grad = [&](std::int64_t i) INLINE { return Compute<G>::widen(g[i]); };
    const auto scaled = [&](std::int64_t i) INLINE { return grad(i) * move.along.inverse; };
    if (pass == kLargestGrad && op.live(n)) add_largest<Real>(op.dim, sums, grad);
    if (pass == kSquaresOfGrad && op.live(n)) add_squares<Real>(op.dim, sums, scaled);
    if (pass != kLargestMoved && pass != kSquaresOfMoved) continue;
    with_step(move, op.live(n), [&](const auto& step) INLINE {
      const auto moved = [&](std::int64_t i) INLINE { return d[i] + step(grad(i)); };
      const auto scaled_moved = [&](std::int64_t i) INLINE { return moved(i) * move.onto.inverse; };
      if (pass == kLargestMoved) add_largest<Real>(op.dim, sums, moved);
      if (pass == kSquaresOfMoved) add_squares<Real>(op.dim, sums, scaled_moved);
    });
  }
  return sums;
}

template <class G>
INLINE inline void apply_rows(const Ascend<G>& op, const Move<typename Ascend<G>::Real>& move, std::int64_t begin,
                              std::int64_t end) {
  for (std::int64_t n = begin; n < end; ++n) {
    auto* __restrict__ d = op.delta_row(n);
    const G* __restrict__ g = op.grad_row(n);
    with_step(move, op.live(n), [&](const auto& step) INLINE {
      with_end(move, [&](const auto& project) INLINE {
        for (std::int64_t i = 0; i < op.dim; ++i) d[i] = project(d[i] + step(Compute<G>::widen(g[i])));
      });
    });
  }
}

// Clones cannot be templates: one function each.
#define CLONES_FOR(G)                                                                                            \
  FASTADV_CLONES Sums pass(const Ascend<G>& op, Pass which, const Move<typename Ascend<G>::Real>& move,          \
                           std::int64_t begin, std::int64_t end) {                                               \
    return pass_over(op, which, move, begin, end);                                                               \
  }                                                                                                              \
  FASTADV_CLONES void apply(const Ascend<G>& op, const Move<typename Ascend<G>::Real>& move, std::int64_t begin, \
                            std::int64_t end) {                                                                  \
    apply_rows(op, move, begin, end);                                                                            \
  }
CLONES_FOR(float)
CLONES_FOR(double)
CLONES_FOR(BFloat16)
CLONES_FOR(Float16)
#undef CLONES_FOR

// One group on `threads` threads; `parts` has room for the sums of its blocks, if there is more than one thread.
// Returns whether its gradient is finite.
template <class G>
bool step_group(const Ascend<G>& op, const AfterRows& after, const Blocks& blocks, int threads, Sums* parts) {
  using Real = typename Ascend<G>::Real;
  const auto reduce = [&](Pass which, const Move<Real>& move) {
    const auto sums_of = [&](std::int64_t b) { return pass(op, which, move, blocks.first(b), blocks.last(b)); };
    return add_in_order(blocks, op.dim, threads, parts, sums_of);
  };
  const Move<Real> move = plan(op.rule, reduce);
  parallel(blocks.count(), blocks.rows * op.dim, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) {
      apply(op, move, blocks.first(b), blocks.last(b));
      if (after) after(blocks.first(b), blocks.last(b));
    }
  });
  return move.finite;
}

template <class G>
std::int64_t step_groups(const Ascend<G>& op, const AfterRows& after, int threads) {
  if (op.groups == 0 || op.first(op.groups) == 0) return 0;
  const std::int64_t rows = std::max<std::int64_t>(kBlock / std::max<std::int64_t>(op.dim, 1), 1);
  const auto blocks = [&](std::int64_t g) { return Blocks{op.first(g), op.first(g + 1), rows}; };
  std::atomic<std::int64_t> skipped{0};
  if (op.groups >= threads) {
    parallel_uneven(op.groups, 1, op.first(op.groups) * op.dim, threads, [&](std::int64_t begin, std::int64_t end) {
      std::int64_t mine = 0;
      for (std::int64_t g = begin; g < end; ++g) mine += !step_group(op, after, blocks(g), 1, nullptr);
      skipped += mine;
    });
    return skipped;
  }
  std::int64_t most = 0;
  for (std::int64_t g = 0; g < op.groups; ++g) most = std::max(most, blocks(g).count());
  const std::unique_ptr<Sums[]> parts(new Sums[std::size_t(most)]);
  for (std::int64_t g = 0; g < op.groups; ++g) skipped += !step_group(op, after, blocks(g), threads, parts.get());
  return skipped;
}

}  // namespace

void move_rows(const AscendCall& call, int threads, const AfterRows& after) {
  call.visit([&](const auto& op) {
    const std::int64_t skipped = step_groups(op, after, threads);
    if (skipped) *reinterpret_cast<std::int64_t*>(call.skipped) += skipped;
  });
}

OutOfRange ascend_cpu(const AscendCall& call, const GatherPerturbCall* embedding, int threads) {
  if (!embedding || embedding->count == 0) {
    move_rows(call, threads, nullptr);
    return {-1, -1};
  }
  const OutOfRange bad = first_out_of_range(*embedding);
  if (bad.any()) return bad;
  embedding->visit([&](const auto& op) {
    const auto write = [&](std::int64_t begin, std::int64_t end) { write_rows(op, begin, end); };
    move_rows(call, threads, op.slot ? AfterRows() : write);
    if (op.slot) parallel(op.count, op.dim, threads, write);
  });
  return bad;
}

}  // namespace fastadv
