// Shared by all ops: storage types, their conversions, and the macros that let one body serve host and device.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTADV_HD __host__ __device__ __forceinline__
#else
#define FASTADV_HD inline __attribute__((always_inline))
#endif

// One more copy of a hot loop for AVX2, picked by the dynamic loader: the binary stays portable and still uses
// the wider registers. The copies add and multiply in the same order, and AVX2 alone brings no fused
// multiply-add, so their results are the same bits. A sanitizer cannot run before the loader has resolved them. No copy
// may throw: GCC takes for granted that what picks one does not, and leaves out who would catch it. So memory that is
// needed comes from the caller.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(__AVX2__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define FASTADV_CLONES __attribute__((target_clones("default", "avx2")))
#else
#define FASTADV_CLONES
#endif

namespace fastadv {

// The codes by which Python names the dtype of a buffer (fastadv/arguments/tensors.py has the same list).
enum Dtype { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

FASTADV_HD std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTADV_HD float float_of(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// In what a dtype is computed: float32, and float64 for float64. `widen` is exact; `narrow` rounds to nearest,
// ties to even, and keeps a NaN a NaN. Selections instead of branches, so that the loops vectorise, and no float32
// denormals on the way, so that flush-to-zero mode changes nothing.
template <class T>
struct Compute {
  using type = T;
  static FASTADV_HD T widen(T value) { return value; }
  static FASTADV_HD T narrow(T value) { return value; }
};

template <>
struct Compute<BFloat16> {
  using type = float;
  static FASTADV_HD float widen(BFloat16 value) { return float_of(std::uint32_t(value.bits) << 16); }
  static FASTADV_HD BFloat16 narrow(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t quiet_nan = (bits >> 16) | 0x40u;
    return {std::uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
  }
};

template <>
struct Compute<Float16> {
  using type = float;
  static FASTADV_HD float widen(Float16 value) {
    const std::uint32_t sign = std::uint32_t(value.bits & 0x8000u) << 16;
    const std::uint32_t magnitude = value.bits & 0x7fffu;
    const std::uint32_t normal = (magnitude << 13) + (112u << 23);  // the exponent's bias goes from 15 to 127
    const std::uint32_t special = (magnitude << 13) | 0x7f800000u;
    const std::uint32_t denormal = bits_of(float(std::int32_t(magnitude)) * 0x1p-24f);
    const std::uint32_t finite = magnitude < 0x400u ? denormal : normal;
    return float_of(sign | (magnitude >= 0x7c00u ? special : finite));
  }
  static FASTADV_HD Float16 narrow(float value) {
    const std::uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
    const std::uint32_t bits = bits_of(value) & 0x7fffffffu;
    const std::uint32_t normal = ((bits + 0xfffu + ((bits >> 13) & 1u)) >> 13) - (112u << 10);
    // Below the smallest normal half: at 0.5 a float's last place is 2^-24, the spacing of half denormals.
    const std::uint32_t denormal = bits_of(float_of(bits) + 0.5f) - 0x3f000000u;
    const std::uint32_t finite = bits < 0x38800000u ? denormal : normal;
    const std::uint32_t bounded = bits >= 0x477ff000u ? 0x7c00u : finite;  // 65520 and more round to infinity
    const std::uint32_t quiet_nan = 0x7e00u | ((bits >> 13) & 0x3ffu);
    return {std::uint16_t(sign | (bits > 0x7f800000u ? quiet_nan : bounded))};
  }
};

// Calls `visit` with a value of the type that a dtype code names.
template <class F>
void visit_dtype(int dtype, F&& visit) {
  switch (dtype) {
    case kFloat64: return visit(double{});
    case kBFloat16: return visit(BFloat16{});
    case kFloat16: return visit(Float16{});
    default: return visit(float{});
  }
}

}  // namespace fastadv
