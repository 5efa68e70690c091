// moment_step on the CPU: a group is looked at, moved and projected block by block; a row that is a group never leaves
// the first cache meanwhile.
#include <cmath>

#include "ascend_cpu.h"
#include "moment_step.h"

namespace fastadv {
namespace {

template <class G>
struct MomentStep {
  using Real = typename Ascend<G>::Real;

  Ascend<G> step;
  Real *first, *second;
  Real left_first, new_first, left_second, new_second, keep, rate, root, guard;

  explicit MomentStep(const MomentStepCall& call)
      : step(call.step.as<G>()),
        first(reinterpret_cast<Real*>(call.first)),
        second(reinterpret_cast<Real*>(call.second)),
        left_first(Real(call.by.first)),
        new_first(Real(1 - call.by.first)),
        left_second(Real(call.by.second)),
        new_second(Real(1 - call.by.second)),
        keep(Real(call.by.keep)),
        rate(Real(call.by.rate)),
        root(Real(call.by.root)),
        guard(Real(call.by.guard)) {}
};

// The bits of the largest magnitude in the gradient of some rows.
template <class G>
INLINE inline Sums largest_of(const Ascend<G>& op, std::int64_t begin, std::int64_t end) {
  Sums sums;
  for (std::int64_t n = begin; n < end; ++n) {
    const G* g = op.grad_row(n);
    if (op.live(n)) {
      add_largest<typename Ascend<G>::Real>(op.dim, sums,
                                            [&](std::int64_t i) INLINE { return Compute<G>::widen(g[i]); });
    }
  }
  return sums;
}

// A row's step, whose gradient grad(i) is, and whose next first moment next(m, g); then `project`.
template <class G, class Grad, class Next, class Project>
INLINE inline void move_row(const MomentStep<G>& op, std::int64_t n, const Grad& grad, const Next& next,
                            const Project& project) {
  using Real = typename Ascend<G>::Real;
  Real* __restrict__ d = op.step.delta_row(n);
  Real* __restrict__ v = op.second + n * op.step.dim;
  for (std::int64_t i = 0; i < op.step.dim; ++i) {
    const Real g = grad(i);
    v[i] = op.left_second * v[i] + op.new_second * g * g;
    d[i] = project(op.keep * d[i] + op.rate * (next(i, g) / (std::sqrt(v[i]) / op.root + op.guard)));
  }
}

template <class G, class Grad, class Project>
INLINE inline void move_row(const MomentStep<G>& op, std::int64_t n, const Grad& grad, const Project& project) {
  using Real = typename Ascend<G>::Real;
  if (!op.first) return move_row(op, n, grad, [](std::int64_t, Real g) INLINE { return g; }, project);
  Real* __restrict__ m = op.first + n * op.step.dim;
  const auto next = [&](std::int64_t i, Real g) INLINE { return m[i] = op.left_first * m[i] + op.new_first * g; };
  move_row(op, n, grad, next, project);
}

template <class G>
INLINE inline void move_rows(const MomentStep<G>& op, std::int64_t begin, std::int64_t end) {
  using Real = typename Ascend<G>::Real;
  const auto& rule = op.step.rule;
  for (std::int64_t n = begin; n < end; ++n) {
    const G* __restrict__ from = op.step.grad_row(n);
    const auto to = [&](const auto& project) INLINE {
      if (op.step.live(n))
        return move_row(op, n, [&](std::int64_t i) INLINE { return Compute<G>::widen(from[i]); }, project);
      move_row(op, n, [](std::int64_t) INLINE { return Real(0); }, project);
    };
    if (rule.ball == kLinfBall) {
      to(Clamp<Real>{rule.epsilon});
    } else {
      to(Same<Real>{});
    }
  }
}

// The squares of some rows of delta times `inverse`, and the largest magnitude.
template <class Real>
INLINE inline Sums measure(const Real* delta, std::int64_t count, Real inverse) {
  Sums sums;
  add_largest<Real>(count, sums, [&](std::int64_t i) INLINE { return delta[i]; });
  add_squares<Real>(count, sums, [&](std::int64_t i) INLINE { return delta[i] * inverse; });
  return sums;
}

template <class Real, class Project>
INLINE inline void bring(Real* __restrict__ delta, std::int64_t count, const Project& project) {
  for (std::int64_t i = 0; i < count; ++i) delta[i] = project(delta[i]);
}

// Clones cannot be templates: one function each.
#define CLONES_FOR(G)                                                                       \
  FASTADV_CLONES Sums look(const MomentStep<G>& op, std::int64_t begin, std::int64_t end) { \
    return largest_of(op.step, begin, end);                                                 \
  }                                                                                         \
  FASTADV_CLONES void move(const MomentStep<G>& op, std::int64_t begin, std::int64_t end) { move_rows(op, begin, end); }
CLONES_FOR(float)
CLONES_FOR(double)
CLONES_FOR(BFloat16)
CLONES_FOR(Float16)
#undef CLONES_FOR
#define CLONES_FOR(Real)                                                                                            \
  FASTADV_CLONES Sums sizes(const Real* delta, std::int64_t count, Real inverse) {                                  \
    return measure(delta, count, inverse);                                                                          \
  }                                                                                                                 \
  FASTADV_CLONES void resized(Real* delta, std::int64_t count, const Resize<Real>& by) { bring(delta, count, by); } \
  FASTADV_CLONES void clamped(Real* delta, std::int64_t count, const Clamp<Real>& by) { bring(delta, count, by); }
CLONES_FOR(float)
CLONES_FOR(double)
#undef CLONES_FOR

// What brings a group onto the l2 ball, of which the sums of the plain squares are known; `again(inverse)` takes those
// of scaled ones. `outside`: whether it is not there yet.
template <class Real, class F>
Resize<Real> onto_ball(Real epsilon, const Sums& plain, bool& outside, const F& again) {
  Resize<Real> onto;
  if (safe<Real>(plain.gg)) {
    onto = resize(epsilon, Real(std::sqrt(plain.gg)));
  } else {
    onto = resize(epsilon, Limits<Real>::value(plain.largest));
    if (plain.largest > 0) onto.norm = Real(std::sqrt(again(onto.inverse).gg));
  }
  outside = onto.norm > epsilon * onto.inverse;
  return onto;
}

// One group on `threads` threads; returns whether its gradient is finite.
template <class G>
bool step_group(const MomentStep<G>& op, const AfterRows& after, const Blocks& blocks, int threads, Sums* parts) {
  using Real = typename Ascend<G>::Real;
  const auto& rule = op.step.rule;
  const std::int64_t dim = op.step.dim;
  const auto add_up = [&](const auto& of) {
    return add_in_order(blocks, dim, threads, parts,
                        [&](std::int64_t b) { return of(blocks.first(b), blocks.last(b)); });
  };
  const auto measured = [&](Real inverse) {
    return add_up([&](std::int64_t begin, std::int64_t end) {
      return sizes(op.step.delta_row(begin), (end - begin) * dim, inverse);
    });
  };
  const bool finite = add_up([&](std::int64_t begin, std::int64_t end) { return look(op, begin, end); }).largest <
                      Limits<Real>::kInfinity;
  const bool by_norm = rule.ball == kL2Ball;
  const auto moved = [&](std::int64_t begin, std::int64_t end) {
    if (finite) move(op, begin, end);
    return by_norm ? sizes(op.step.delta_row(begin), (end - begin) * dim, Real(1)) : Sums();
  };
  const Sums plain = add_up(moved);
  bool outside = false;
  const auto onto = by_norm ? onto_ball(rule.epsilon, plain, outside, measured) : Resize<Real>{0, 1, 1};
  const bool clamps = !finite && rule.ball == kLinfBall;
  if (!outside && !clamps && !after) return finite;
  parallel(blocks.count(), blocks.rows * dim, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) {
      Real* delta = op.step.delta_row(blocks.first(b));
      const std::int64_t count = (blocks.last(b) - blocks.first(b)) * dim;
      if (outside) resized(delta, count, onto);
      if (clamps) clamped(delta, count, Clamp<Real>{rule.epsilon});
      if (after) after(blocks.first(b), blocks.last(b));
    }
  });
  return finite;
}

template <class G>
std::int64_t step_groups(const MomentStep<G>& op, const AfterRows& after, int threads) {
  return each_group(op.step, threads, [&](const Blocks& blocks, int on, Sums* parts) {
    return step_group(op, after, blocks, on, parts);
  });
}

void move_all(const MomentStepCall& call, int threads, const AfterRows& after) {
  visit_dtype(call.step.dtype, [&](auto zero) {
    const std::int64_t skipped = step_groups(MomentStep<decltype(zero)>(call), after, threads);
    if (skipped) *reinterpret_cast<std::int64_t*>(call.step.skipped) += skipped;
  });
}

}  // namespace

OutOfRange moment_step_cpu(const MomentStepCall& call, const GatherPerturbCall* embedding, int threads) {
  return and_embed(embedding, threads, [&](const AfterRows& after) { move_all(call, threads, after); });
}

}  // namespace fastadv
