// How far apart the distributions of two rows of logits are, and the gradients of that: the formulas.
//
//   p = softmax(logits), q = softmax(target), r = log p - log q, all by class
//
//   kind           D                         dD / dlogits                dD / dtarget
//   kl             sum q (-r)                p - q                       q (-r - KL(q|p))
//   symmetric_kl   sum (p - q) r             p (r - KL(p|q)) + p - q     q (-r - KL(q|p)) + q - p
//   js             (sum p u + sum q v) / 2   p (u - sum p u) / 2         q (v - sum q v) / 2
//   mse            sum (a - b)^2 / classes   2 (a - b) / classes         2 (b - a) / classes
//
// with u = log p - log m, v = log q - log m, m = (p + q) / 2. Written as they stand, the sums cancel where p is close
// to q; sum q (-r) is the sum of q (e^r - 1 - r), of which no term is negative, and a shift of all r by the rounding
// error of a log-sum-exp moves it by the square of that error alone.
#pragma once

#include <cmath>

#include "common.h"

namespace fastadv {

// The codes by which Python names them (fastadv/arguments/kinds.py has the same list).
enum DivergenceKind { kSymmetricKl = 0, kKl = 1, kJs = 2, kMse = 3 };

template <class Real>
struct Exponential;

template <>
struct Exponential<float> {
  using Bits = std::uint32_t;
  static constexpr int kMantissa = 23, kTerms = 8, kSmallTerms = 6;  // of the series of e^x, and of (e^x - 1 - x) / x^2
  static constexpr float kLeast = -87;                               // below, e^x counts as zero
  static constexpr float kRounder = 0x1.8p23f;                       // added to x, it leaves the nearest integer
  static constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -2.1219444005469059e-4f;  // high times n is exact
};

template <>
struct Exponential<double> {
  using Bits = std::uint64_t;
  static constexpr int kMantissa = 52, kTerms = 14, kSmallTerms = 13;
  static constexpr double kLeast = -708;
  static constexpr double kRounder = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42fefap-1, kLn2Low = 0x1.cf79abc9e3b39p-40;
};

// 1 / (first (first + 1) ... (first + k - 1)): for first = 1, 1 / k!.
template <class Real>
constexpr Real one_over(int first, int k) {
  double product = 1;
  for (int i = 0; i < k; ++i) product *= first + i;
  return Real(1 / product);
}

// 1 + x / first + x^2 / (first (first + 1)) + ..., first = kFirst: for 1 that is e^x.
template <class Real, int kTerms, int kFirst>
FASTADV_HD Real series(Real x) {
  constexpr auto kFactors = [] {
    struct {
      Real at[kTerms];
    } factors = {};
    for (int k = 0; k < kTerms; ++k) factors.at[k] = one_over<Real>(kFirst, k);
    return factors;
  }();
  Real sum = kFactors.at[kTerms - 1];
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; --k) sum = kFactors.at[k] + x * sum;
  return sum;
}

// e^x for x <= 0: 2^n e^f with n the nearest integer to x / ln 2. Without a branch, so that loops over it vectorise.
template <class Real>
FASTADV_HD Real exponential(Real x) {
  using E = Exponential<Real>;
  const Real bounded = x < E::kLeast ? E::kLeast : x;
  const Real rounded = bounded * Real(1.4426950408889634) + E::kRounder;
  const Real n = rounded - E::kRounder;
  const Real f = (bounded - n * E::kLn2High) - n * E::kLn2Low;
  typename E::Bits bits;
  memcpy(&bits, &rounded, sizeof bits);
  bits <<= E::kMantissa;  // n, where the exponent is
  const Real one = 1;
  typename E::Bits power;
  memcpy(&power, &one, sizeof power);
  power += bits;
  Real scale;
  memcpy(&scale, &power, sizeof scale);
  const Real result = scale * series<Real, E::kTerms, 1>(f);
  return x < E::kLeast ? Real(0) : result;
}

// (e^r - 1 - r) / r^2 for small r.
template <class Real>
FASTADV_HD Real second_order(Real r) {
  return Real(0.5) * series<Real, Exponential<Real>::kSmallTerms, 3>(r);
}

// p log, and zero where p is zero and the logarithm infinite. Here as below both sides of a choice are computed first:
// so the compiler may make it a selection.
template <class Real>
FASTADV_HD Real times_log(Real p, Real log) {
  const Real product = p * log;
  return p == 0 ? Real(0) : product;
}

// One class of a row.
template <class Real>
struct Class {
  Real p, q, r;

  FASTADV_HD bool close() const { return r < Real(0.25) && r > Real(-0.25); }
  // p - q, without the cancellation.
  FASTADV_HD Real difference() const {
    const Real near = q * (r + r * r * second_order(r)), far = p - q;
    return close() ? near : far;
  }
  // A term of KL(q|p): q (e^r - 1 - r).
  FASTADV_HD Real excess() const {
    const Real near = q * (r * r * second_order(r)), far = p - q - times_log(q, r);
    return close() ? near : far;
  }
  // A term of both: (p - q) r.
  FASTADV_HD Real symmetric() const {
    const Real gap = difference(), product = gap * r;
    return gap == 0 ? Real(0) : product;
  }

  // log(1 + e^-|r|) = 2 atanh(t / (2 + t)), t = e^-|r|.
  FASTADV_HD Real softplus() const {
    const Real least = p < q ? p : q, most = p < q ? q : p;
    const Real ratio = least / most, t = most > 0 ? ratio : Real(0), s = t / (2 + t), ss = s * s;
    Real sum = 0;
#pragma GCC unroll 20
    for (int k = sizeof(Real) == 8 ? 37 : 15; k > 0; k -= 2) sum = sum * ss + Real(1) / Real(k);
    return 2 * s * sum;
  }
  static constexpr Real kLn2 = Real(0.69314718055994531);
  FASTADV_HD Real p_over_mean() const { return kLn2 - softplus() + (r < 0 ? r : Real(0)); }  // log p - log m
  FASTADV_HD Real q_over_mean() const { return kLn2 - softplus() - (r < 0 ? Real(0) : r); }
};

// What the gradients need to know of the whole row: KL(p|q) and KL(q|p), or for js the same against the mean.
template <class Real>
struct Whole {
  Real p, q;
};

template <class Real>
FASTADV_HD Real value_of(DivergenceKind kind, const Class<Real>& c) {
  if (kind == kKl) return c.excess();
  if (kind == kSymmetricKl) return c.symmetric();
  return Real(0.5) * (times_log(c.p, c.p_over_mean()) + times_log(c.q, c.q_over_mean()));
}

template <class Real>
FASTADV_HD Real logits_gradient(DivergenceKind kind, const Class<Real>& c, const Whole<Real>& whole) {
  if (kind == kKl) return c.difference();
  if (kind == kSymmetricKl) return times_log(c.p, c.r - whole.p) + c.difference();
  return Real(0.5) * times_log(c.p, c.p_over_mean() - whole.p);
}

template <class Real>
FASTADV_HD Real target_gradient(DivergenceKind kind, const Class<Real>& c, const Whole<Real>& whole) {
  if (kind == kKl) return times_log(c.q, -c.r - whole.q);
  if (kind == kSymmetricKl) return times_log(c.q, -c.r - whole.q) - c.difference();
  return Real(0.5) * times_log(c.q, c.q_over_mean() - whole.q);
}

// The call as it arrives from Python: addresses and codes.
struct DivergenceCall {
  int dtype;
  std::uintptr_t logits, target;  // [count, classes], strides from row to row, inner stride 1
  std::int64_t logits_stride, target_stride;
  std::uintptr_t weights;                   // [count]; a row whose weight is zero is not read
  std::uintptr_t values;                    // [count], weighted
  std::uintptr_t grad_logits, grad_target;  // [count, classes], weighted; null: not wanted
  std::int64_t count, classes;
  int kind;
};

void divergence_cpu(const DivergenceCall& call, int threads);

}  // namespace fastadv
