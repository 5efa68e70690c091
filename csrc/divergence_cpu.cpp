// divergence on the CPU: threads take rows. A row is read three times, the last two from cache: for its largest logits,
// for e to the power of each, and for what follows from those.
#include <algorithm>
#include <memory>

#include "divergence.h"
#include "lanes.h"
#include "parallel.h"

namespace fastadv {
namespace {

// Bits of numbers in the order of the numbers, NaN above all: the compiler finds the largest of integers many at once.
INLINE inline std::int32_t ordered(float x) {
  std::int32_t bits;
  x = x != x ? NAN : x;  // the positive one
  memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
INLINE inline std::int64_t ordered(double x) {
  std::int64_t bits;
  x = x != x ? NAN : x;
  memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 63) & 0x7fffffffffffffff);
}
INLINE inline float number(std::int32_t order) {
  order ^= (order >> 31) & 0x7fffffff;
  float x;
  memcpy(&x, &order, sizeof x);
  return x;
}
INLINE inline double number(std::int64_t order) {
  order ^= (order >> 63) & 0x7fffffffffffffff;
  double x;
  memcpy(&x, &order, sizeof x);
  return x;
}

template <class T>
struct Rows {
  using Real = typename Compute<T>::type;

  const T *logits, *target;
  std::int64_t logits_stride, target_stride;
  const Real* weights;
  Real* values;
  T *grad_logits, *grad_target;
  std::int64_t count, classes;

  explicit Rows(const DivergenceCall& call)
      : logits(reinterpret_cast<const T*>(call.logits)),
        target(reinterpret_cast<const T*>(call.target)),
        logits_stride(call.logits_stride),
        target_stride(call.target_stride),
        weights(reinterpret_cast<const Real*>(call.weights)),
        values(reinterpret_cast<Real*>(call.values)),
        grad_logits(reinterpret_cast<T*>(call.grad_logits)),
        grad_target(reinterpret_cast<T*>(call.grad_target)),
        count(call.count),
        classes(call.classes) {}
};

// Calls visit(first, count) on runs of a row.
template <class F>
INLINE inline void runs(std::int64_t classes, const F& visit) {
  for (std::int64_t first = 0; first < classes; first += kRun)
    visit(first, int(std::min<std::int64_t>(classes - first, kRun)));
}

template <class T>
INLINE inline typename Compute<T>::type largest(const T* row, std::int64_t classes) {
  auto most = ordered(Compute<T>::widen(row[0]));
  for (std::int64_t i = 1; i < classes; ++i) most = std::max(most, ordered(Compute<T>::widen(row[i])));
  return number(most);
}

// logits and target of a row, their difference where both may be infinite, and the room for what e to their power is.
template <class T>
struct Row {
  using Real = typename Compute<T>::type;
  const T *a, *b;
  Real *x, *y;
  INLINE Real left(std::int64_t i) const { return Compute<T>::widen(a[i]); }
  INLINE Real right(std::int64_t i) const { return Compute<T>::widen(b[i]); }
  INLINE Real gap(std::int64_t i) const { return left(i) == right(i) ? Real(0) : left(i) - right(i); }
};

// What a row's classes share: p = x * per_p, q = y * per_q, r = gap + shift. Not `defined`: one of the two has no
// softmax, since it has NaN or +inf, or nothing but -inf.
template <class Real>
struct Scales {
  Real per_p, per_q, shift;
  bool defined;
  Whole<Real> whole;
};

template <class T>
INLINE inline Scales<typename Compute<T>::type> exponentials(const Row<T>& row, std::int64_t classes) {
  using Real = typename Compute<T>::type;
  const Real most_a = largest(row.a, classes), most_b = largest(row.b, classes);
  double sum_x = 0, sum_y = 0, sum_xr = 0, sum_yr = 0;
  runs(classes, [&](std::int64_t first, int count) INLINE {
    Real xr[kRun], yr[kRun];
    Real* __restrict__ x = row.x + first, * __restrict__ y = row.y + first;
    for (int i = 0; i < count; ++i) {
      const Real a = row.left(first + i), b = row.right(first + i), gap = a == b ? Real(0) : a - b;
      const Real ex = exponential(a - most_a), ey = exponential(b - most_b);
      x[i] = ex, y[i] = ey;
      xr[i] = times_log(ex, gap), yr[i] = times_log(ey, gap);
    }
    add_run(x, count, sum_x), add_run(y, count, sum_y), add_run(xr, count, sum_xr), add_run(yr, count, sum_yr);
  });
  const double shift = (double(most_b) - double(most_a)) + (std::log(sum_y) - std::log(sum_x));
  return {Real(1 / sum_x),
          Real(1 / sum_y),
          Real(shift),
          sum_x > 0 && sum_y > 0,
          {Real(sum_xr / sum_x + shift), Real(-sum_yr / sum_y - shift)}};
}

template <class T>
INLINE inline Class<typename Compute<T>::type> at(const Row<T>& row, const Scales<typename Compute<T>::type>& scales,
                                                  std::int64_t i) {
  return {row.x[i] * scales.per_p, row.y[i] * scales.per_q, row.gap(i) + scales.shift};
}

template <class T>
INLINE inline Whole<typename Compute<T>::type> against_mean(const Row<T>& row,
                                                            const Scales<typename Compute<T>::type>& scales,
                                                            std::int64_t classes) {
  using Real = typename Compute<T>::type;
  double p = 0, q = 0;
  runs(classes, [&](std::int64_t first, int count) INLINE {
    Real pu[kRun], qv[kRun];
    for (int i = 0; i < count; ++i) {
      const auto c = at(row, scales, first + i);
      pu[i] = times_log(c.p, c.p_over_mean()), qv[i] = times_log(c.q, c.q_over_mean());
    }
    add_run(pu, count, p), add_run(qv, count, q);
  });
  return {Real(p), Real(q)};
}

// The last pass: values and gradients. `each` gives them for class i.
template <class T, class F>
INLINE inline void finish(const Rows<T>& op, std::int64_t n, typename Compute<T>::type weight, const F& each) {
  using Real = typename Compute<T>::type;
  double sum = 0;
  runs(op.classes, [&](std::int64_t first, int count) INLINE {
    Real terms[kRun], left[kRun], right[kRun];
    for (int i = 0; i < count; ++i) each(first + i, terms[i], left[i], right[i]);
    add_run(terms, count, sum);
    const auto store = [&](T* to, const Real* from) INLINE {
      if (to == nullptr) return;
      T* __restrict__ place = to + n * op.classes + first;
      for (int i = 0; i < count; ++i) place[i] = Compute<T>::narrow(weight * from[i]);
    };
    store(op.grad_logits, left), store(op.grad_target, right);
  });
  op.values[n] = Real(sum) * weight;
}

template <class T, DivergenceKind kKind>
INLINE inline void row_of(const Rows<T>& op, std::int64_t n, typename Compute<T>::type* room) {
  using Real = typename Compute<T>::type;
  const Row<T> row{op.logits + n * op.logits_stride, op.target + n * op.target_stride, room, room + op.classes};
  if (kKind == kMse) {
    const Real share = Real(1) / Real(op.classes);
    return finish(op, n, op.weights[n], [&](std::int64_t i, Real& value, Real& left, Real& right) INLINE {
      const Real gap = row.gap(i);
      value = gap * gap * share, left = 2 * gap * share, right = -left;
    });
  }
  auto scales = exponentials(row, op.classes);
  if (kKind == kJs) scales.whole = against_mean(row, scales, op.classes);
  finish(op, n, scales.defined ? op.weights[n] : Real(NAN),
         [&](std::int64_t i, Real& value, Real& left, Real& right) INLINE {
           const auto c = at(row, scales, i);
           value = value_of(kKind, c);
           left = logits_gradient(kKind, c, scales.whole);
           right = target_gradient(kKind, c, scales.whole);
         });
}

template <class T>
INLINE inline void nothing(const Rows<T>& op, std::int64_t n) {
  op.values[n] = 0;
  for (T* grad : {op.grad_logits, op.grad_target}) {
    if (grad) std::fill_n(grad + n * op.classes, op.classes, Compute<T>::narrow(0));
  }
}

// `room` for two numbers a class, which mse does not need.
template <class T, DivergenceKind kKind>
INLINE inline void rows_of(const Rows<T>& op, std::int64_t begin, std::int64_t end, typename Compute<T>::type* room) {
  for (std::int64_t n = begin; n < end; ++n) {
    if (op.weights[n] == 0 || op.classes == 0) {
      nothing(op, n);
    } else {
      row_of<T, kKind>(op, n, room);
    }
  }
}

// Clones cannot be templates: one function each.
#define CLONE_FOR(T, name, kind)                                                                                       \
  FASTADV_CLONES void name(const Rows<T>& op, std::int64_t begin, std::int64_t end, typename Compute<T>::type* room) { \
    rows_of<T, kind>(op, begin, end, room);                                                                            \
  }
#define CLONES_FOR(T)                      \
  CLONE_FOR(T, symmetric_kl, kSymmetricKl) \
  CLONE_FOR(T, kl, kKl)                    \
  CLONE_FOR(T, js, kJs)                    \
  CLONE_FOR(T, mse, kMse)
CLONES_FOR(float)
CLONES_FOR(double)
CLONES_FOR(BFloat16)
CLONES_FOR(Float16)
#undef CLONES_FOR
#undef CLONE_FOR

template <class T>
void run(const Rows<T>& op, DivergenceKind kind, std::int64_t begin, std::int64_t end) {
  using Real = typename Compute<T>::type;
  const std::unique_ptr<Real[]> room(new Real[std::size_t(kind == kMse ? 0 : 2 * op.classes)]);
  switch (kind) {
    case kKl: return kl(op, begin, end, room.get());
    case kJs: return js(op, begin, end, room.get());
    case kMse: return mse(op, begin, end, room.get());
    default: return symmetric_kl(op, begin, end, room.get());
  }
}

}  // namespace

void divergence_cpu(const DivergenceCall& call, int threads) {
  visit_dtype(call.dtype, [&](auto zero) {
    const Rows<decltype(zero)> op(call);
    parallel(op.count, 8 * op.classes, threads,
             [&](std::int64_t begin, std::int64_t end) { run(op, DivergenceKind(call.kind), begin, end); });
  });
}

}  // namespace fastadv
