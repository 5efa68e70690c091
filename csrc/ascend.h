// delta <- ball(m), m = delta + step * d(g), group by group: the formula and the algebra that the CPU and CUDA share.
//
//   direction  d(g)          ball   m becomes
//   l2         g / |g|       l2     epsilon m / |m| where |m| > epsilon
//   sign       sign(g)       linf   m within [-epsilon, epsilon]
//   max        g / max|g|    unit   epsilon m / |m|, or epsilon m / max|m| after sign and max
//                            none   m
//
// A division by |x| is one of x / scale by |x| / scale, scale a power of two: exact, and nothing over- or underflows.
// Where the sum of plain squares is safe it gives the norm; where it is not, that of the squares of x / scale does.
#pragma once

#include <cmath>

#include "common.h"
#include "gather_perturb.h"

namespace fastadv {

// The codes by which Python names them (calls.h reads fastadv/arguments/rule.py's in this order).
enum Direction { kAlongL2 = 0, kAlongSign = 1, kAlongMax = 2, kAlongAdam = 3, kAlongAdamW = 4, kAlongRmsprop = 5 };
enum Ball { kL2Ball = 0, kLinfBall = 1, kUnitBall = 2, kNoBall = 3 };

template <class Real>
struct Resize {  // x brought to `length`: norm is that of x * inverse
  Real length, inverse, norm;
  FASTADV_HD Real operator()(Real x) const { return length * (x * inverse) / norm; }
};

template <class Real>
struct Sign {
  Real length;
  FASTADV_HD Real operator()(Real x) const { return length * (Real(x > 0) - Real(x < 0)); }
};

template <class Real>
struct Zero {  // no gradient, or none that is there or is a number
  FASTADV_HD Real operator()(Real) const { return 0; }
};

template <class Real>
struct Clamp {
  Real radius;
  FASTADV_HD Real operator()(Real x) const {
    const Real low = x < -radius ? -radius : x;
    return low > radius ? radius : low;
  }
};

template <class Real>
struct Same {
  FASTADV_HD Real operator()(Real x) const { return x; }
};

// The bits of magnitudes are in the order of the magnitudes, infinity and then NaN above every number.
FASTADV_HD std::int32_t magnitude(float x) { return std::int32_t(bits_of(x) & 0x7fffffffu); }
FASTADV_HD std::int64_t magnitude(double x) {
  std::int64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffffffffffff;
}

template <class Real>
struct Limits;

template <>
struct Limits<float> {
  static constexpr std::int64_t kInfinity = 0x7f800000;
  static constexpr int kMantissa = 23, kMost = 253;  // 253: the largest exponent whose inverse is no denormal
  static constexpr double kTiny = 0x1p-90, kHuge = 0x1p90;
  static FASTADV_HD float value(std::int64_t bits) { return float_of(std::uint32_t(bits)); }
};

template <>
struct Limits<double> {
  static constexpr std::int64_t kInfinity = 0x7ff0000000000000;
  static constexpr int kMantissa = 52, kMost = 2045;
  static constexpr double kTiny = 0x1p-900, kHuge = 0x1p900;
  static FASTADV_HD double value(std::int64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
};

// 1 / scale for values whose largest magnitude has these bits.
template <class Real>
FASTADV_HD Real inverse_scale(std::int64_t largest) {
  using L = Limits<Real>;
  const std::int64_t exponent = largest >> L::kMantissa;
  const std::int64_t bounded = exponent < 1 ? 1 : exponent > L::kMost ? L::kMost : exponent;
  return L::value((L::kMost + 1 - bounded) << L::kMantissa);
}

// Whether a sum of squares can have lost nothing that matters.
template <class Real>
FASTADV_HD bool safe(double squares) {
  return squares > Limits<Real>::kTiny && squares < Limits<Real>::kHuge;
}

// What one pass over a group finds.
struct Sums {
  double gg = 0, dg = 0, dd = 0;  // of squares and products of gradient and delta; gg: also of the squares of m
  std::int64_t largest = 0;       // bits of the largest magnitude
  FASTADV_HD void operator+=(const Sums& other) {
    gg += other.gg, dg += other.dg, dd += other.dd;
    if (other.largest > largest) largest = other.largest;
  }
};

enum Pass { kProducts, kLargestGrad, kSquaresOfGrad, kLargestMoved, kSquaresOfMoved };

template <class Real>
struct Rule {
  Real step, epsilon;
  Direction direction;
  Ball ball;
  FASTADV_HD bool ball_of_l2() const { return ball == kL2Ball || (ball == kUnitBall && direction == kAlongL2); }
};

// What happens to every element of a group.
template <class Real>
struct Move {
  enum { kStays, kSigns, kResizes } step = kStays;
  enum { kKeep, kClamp, kResize } end = kKeep;
  bool finite = true;
  Resize<Real> along{0, 1, 1}, onto{0, 1, 1};
};

// Brings to `length` what has this norm, or this largest magnitude.
template <class Real>
FASTADV_HD Resize<Real> resize(Real length, Real size) {
  const Real inverse = inverse_scale<Real>(magnitude(size));
  return {length, inverse, size == 0 ? Real(1) : size * inverse};
}

// Fills in the step. Returns whether `sums` holds the plain sums, and they are safe.
template <class Real, class Reduce>
FASTADV_HD bool plan_step(const Rule<Real>& rule, const Reduce& reduce, Move<Real>& move, Sums& sums) {
  if (rule.direction == kAlongL2) {
    sums = reduce(kProducts, move);
    if (safe<Real>(sums.gg)) {
      move.step = Move<Real>::kResizes;
      move.along = resize(rule.step, Real(std::sqrt(sums.gg)));
      return true;
    }
  }
  const std::int64_t largest = reduce(kLargestGrad, move).largest;
  move.finite = largest < Limits<Real>::kInfinity;
  if (!move.finite || largest == 0) return false;
  move.step = rule.direction == kAlongSign ? Move<Real>::kSigns : Move<Real>::kResizes;
  move.along = resize(rule.step, Limits<Real>::value(largest));
  if (rule.direction == kAlongL2) move.along.norm = Real(std::sqrt(reduce(kSquaresOfGrad, move).gg));
  return false;
}

// |m|^2 for an l2 step m = delta + a g/|g|: dd + 2 a dg/|g| + a^2. 0: unknown, since much cancels (delta is near
// -a g/|g|), or a sum is missing or not safe.
template <class Real>
FASTADV_HD double squares_after(const Rule<Real>& rule, const Move<Real>& move, bool plain, const Sums& sums) {
  if (rule.direction != kAlongL2 || (!plain && move.step != Move<Real>::kStays)) return 0;
  const double a = plain ? double(rule.step) : 0;
  const double squares = plain ? sums.dd + 2 * a * (sums.dg / std::sqrt(sums.gg)) + a * a : sums.dd;
  return safe<Real>(squares) && squares > (sums.dd + a * a) / 16 ? squares : 0;
}

// `reduce(pass, move)` makes a pass over the group: l2 steps into l2 balls need one, everything else usual one or two.
template <class Real, class Reduce>
FASTADV_HD Move<Real> plan(const Rule<Real>& rule, const Reduce& reduce) {
  Move<Real> move;
  Sums sums;
  const bool plain = plan_step(rule, reduce, move, sums);
  move.onto.length = rule.epsilon;
  if (rule.ball == kLinfBall) move.end = Move<Real>::kClamp;
  if (rule.ball == kLinfBall || rule.ball == kNoBall) return move;
  const double squares = squares_after(rule, move, plain, sums);
  if (squares > 0) {
    move.onto = resize(rule.epsilon, Real(std::sqrt(squares)));
  } else {
    const std::int64_t largest = reduce(kLargestMoved, move).largest;
    move.onto = resize(rule.epsilon, Limits<Real>::value(largest));
    if (rule.ball_of_l2() && largest > 0) move.onto.norm = Real(std::sqrt(reduce(kSquaresOfMoved, move).gg));
  }
  const bool outside = move.onto.norm > rule.epsilon * move.onto.inverse;
  move.end = rule.ball == kUnitBall || outside ? Move<Real>::kResize : Move<Real>::kKeep;
  return move;
}

// One step for groups of `rows` rows, or for runs of rows of any length: group g from starts[g] to starts[g + 1].
template <class G>
struct Ascend {
  using Real = typename Compute<G>::type;

  Real* delta;    // [groups * rows, dim]
  const G* grad;  // likewise, `grad_stride` elements from row to row, inner stride 1
  std::int64_t grad_stride;
  const bool* mask;            // [groups * rows]: where there is a gradient; or null
  const std::int64_t* starts;  // [groups + 1]; or null
  std::int64_t groups, rows, dim;
  Rule<Real> rule;

  FASTADV_HD std::int64_t first(std::int64_t g) const { return starts ? starts[g] : g * rows; }

  FASTADV_HD bool live(std::int64_t n) const { return !mask || mask[n]; }
  FASTADV_HD Real* delta_row(std::int64_t n) const { return delta + n * dim; }
  FASTADV_HD const G* grad_row(std::int64_t n) const { return grad + n * grad_stride; }
};

// The call as it arrives from Python: addresses and codes.
struct AscendCall {
  int dtype;  // of the gradient; delta's is the one that it is computed in
  std::uintptr_t delta, grad;
  std::int64_t grad_stride;
  std::uintptr_t mask, starts;
  std::int64_t groups, rows, dim;
  double step, epsilon;
  int direction, ball;
  std::uintptr_t skipped;  // int64: counts the groups with a gradient that is not finite

  template <class G>
  Ascend<G> as() const {
    using Real = typename Compute<G>::type;
    return {reinterpret_cast<Real*>(delta),
            reinterpret_cast<const G*>(grad),
            grad_stride,
            reinterpret_cast<const bool*>(mask),
            reinterpret_cast<const std::int64_t*>(starts),
            groups,
            rows,
            dim,
            {Real(step), Real(epsilon), Direction(direction), Ball(ball)}};
  }

  // Calls `visit` with the typed form.
  template <class F>
  void visit(F&& visit) const {
    visit_dtype(dtype, [&](auto zero) { visit(as<decltype(zero)>()); });
  }
};

// Moves delta; with `embedding` (gather_perturb's call for the moved delta) writes the next forward's input as well. A
// slot of -1 adds nothing. Checks every index before it writes anything, and touches nothing if one is out of range.
OutOfRange ascend_cpu(const AscendCall& call, const GatherPerturbCall* embedding, int threads);

}  // namespace fastadv
