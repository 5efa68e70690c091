// Packs of 16 bytes, the most that a thread reads or writes in one access.
#pragma once

#include <cstdint>

namespace fastadv {

template <class T>
struct alignas(16) Pack {
  static constexpr int kWidth = 16 / sizeof(T);
  T values[kWidth];
};

// Whether all of them point to multiples of 16 bytes; null does.
template <class... T>
__device__ bool are_aligned(const T*... pointers) {
  return (reinterpret_cast<std::uintptr_t>(pointers) | ...) % 16 == 0;
}

// The elements of a row from `first` on, with zeros behind its end; in one access where the row is `aligned`.
template <class T>
__device__ Pack<T> load_pack(const T* row, std::int64_t first, std::int64_t dim, bool aligned) {
  if (aligned && first + Pack<T>::kWidth <= dim) return *reinterpret_cast<const Pack<T>*>(row + first);
  Pack<T> pack;
#pragma unroll
  for (int k = 0; k < Pack<T>::kWidth; ++k) pack.values[k] = first + k < dim ? row[first + k] : T{};
  return pack;
}

// The reverse; nothing is written behind the end.
template <class T>
__device__ void store_pack(T* row, std::int64_t first, std::int64_t dim, bool aligned, const Pack<T>& pack) {
  if (aligned && first + Pack<T>::kWidth <= dim) {
    *reinterpret_cast<Pack<T>*>(row + first) = pack;
    return;
  }
#pragma unroll
  for (int k = 0; k < Pack<T>::kWidth; ++k) {
    if (first + k < dim) row[first + k] = pack.values[k];
  }
}

}  // namespace fastadv
