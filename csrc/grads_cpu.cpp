// grads on the CPU: even parts of the elements of all tensors, wherever one tensor ends and the next begins.
#include <algorithm>

#include "grads.h"
#include "parallel.h"

namespace fastadv {
namespace {

template <class T>
FASTADV_HD void blend_all(const Grads<T>& op, T* __restrict__ into, const T* __restrict__ source, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) into[i] = op.blend(into[i], source[i]);
}

// Clones cannot be templates: one function each.
#define CLONE_FOR(T)                                                                            \
  FASTADV_CLONES void blend(const Grads<T>& op, T* into, const T* source, std::int64_t count) { \
    blend_all(op, into, source, count);                                                         \
  }
CLONE_FOR(float)
CLONE_FOR(double)
CLONE_FOR(BFloat16)
CLONE_FOR(Float16)
#undef CLONE_FOR

// Elements first .. first + count of one pair.
template <class T>
void part(const GradsPair& pair, GradsKind kind, double number, std::int64_t first, std::int64_t count) {
  using Real = typename Compute<T>::type;
  T* into = reinterpret_cast<T*>(pair.into) + first;
  const T* source = reinterpret_cast<const T*>(pair.source) + first;
  if (kind == kCopyGrads) {
    memcpy(into, source, std::size_t(count) * sizeof(T));
  } else {
    const bool sum = kind == kAccumulateGrads;
    blend(Grads<T>{Real(sum ? 1 : number), Real(sum ? number : 1 - number)}, into, source, count);
  }
}

}  // namespace

void GradsPlan::add(const GradsPair& pair) {
  if (pair.count == 0) return;
  pairs_.push_back(pair);
  starts_.push_back(starts_.back() + pair.count);
}

void GradsPlan::run_cpu(GradsKind kind, double number, int threads) const {
  parallel(starts_.back(), 1, threads, [&](std::int64_t begin, std::int64_t end) {
    std::size_t i = std::size_t(std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin()) - 1;
    for (; begin < end; ++i) {
      const GradsPair& pair = pairs_[i];
      const std::int64_t first = begin - starts_[i], count = std::min(end, starts_[i + 1]) - begin;
      switch (pair.dtype) {
        case kFloat64: part<double>(pair, kind, number, first, count); break;
        case kBFloat16: part<BFloat16>(pair, kind, number, first, count); break;
        case kFloat16: part<Float16>(pair, kind, number, first, count); break;
        default: part<float>(pair, kind, number, first, count);
      }
      begin += count;
    }
  });
}

}  // namespace fastadv
