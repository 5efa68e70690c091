// ascend on the CPU: passes over blocks of rows, whose sums are added in order whatever the number of threads.
#include "ascend_cpu.h"

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

}  // namespace

void move_rows(const AscendCall& call, int threads, const AfterRows& after) {
  call.visit([&](const auto& op) {
    const std::int64_t skipped = each_group(op, threads, [&](const Blocks& blocks, int on, Sums* parts) {
      return step_group(op, after, blocks, on, parts);
    });
    if (skipped) *reinterpret_cast<std::int64_t*>(call.skipped) += skipped;
  });
}

OutOfRange ascend_cpu(const AscendCall& call, const GatherPerturbCall* embedding, int threads) {
  return and_embed(embedding, threads, [&](const AfterRows& after) { move_rows(call, threads, after); });
}

}  // namespace fastadv
