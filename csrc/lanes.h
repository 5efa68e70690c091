// Sums in lanes on the CPU: several at once in a precision's own registers, the rest in double.
#pragma once

#include <cstdint>
#include <cstring>

#define INLINE __attribute__((always_inline))

namespace fastadv {

constexpr std::int64_t kRun = 256;  // elements that are added up in their own precision, in lanes, before double

// What both GCC and Clang make of a vector register or two, whatever the width of the machine's.
template <class Real>
struct Vector {
  typedef Real type __attribute__((vector_size(32)));
  static constexpr int kWidth = 32 / sizeof(Real);
};

// sum += x[0] y[0] + ... + x[count - 1] y[count - 1], for at most kRun: a lane adds up 8 floats, or 16 doubles.
template <class Real>
INLINE inline void add_products(const Real* x, const Real* y, std::int64_t count, double& sum) {
  constexpr int kWidth = Vector<Real>::kWidth, kSide = 4;
  typename Vector<Real>::type lanes[kSide] = {}, a, b;
  std::int64_t i = 0;
  for (; i + kSide * kWidth <= count; i += kSide * kWidth) {
    for (int k = 0; k < kSide; ++k) {
      memcpy(&a, x + i + k * kWidth, sizeof a);
      memcpy(&b, y + i + k * kWidth, sizeof b);
      lanes[k] += a * b;
    }
  }
  lanes[0] = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  double low = 0, high = 0;
  for (int l = 0; l < kWidth; l += 2) low += double(lanes[0][l]), high += double(lanes[0][l + 1]);
  for (; i < count; ++i) low += double(x[i]) * double(y[i]);
  sum += low + high;
}

// sum += x[0] + ... + x[count - 1], for at most kRun.
template <class Real>
INLINE inline void add_run(const Real* x, std::int64_t count, double& sum) {
  constexpr int kWidth = Vector<Real>::kWidth, kSide = 2;
  typename Vector<Real>::type lanes[kSide] = {}, part;
  std::int64_t i = 0;
  for (; i + kSide * kWidth <= count; i += kSide * kWidth) {
    for (int k = 0; k < kSide; ++k) {
      memcpy(&part, x + i + k * kWidth, sizeof part);
      lanes[k] += part;
    }
  }
  lanes[0] += lanes[1];
  for (int l = 0; l < kWidth; ++l) sum += double(lanes[0][l]);
  for (; i < count; ++i) sum += double(x[i]);
}

}  // namespace fastadv
