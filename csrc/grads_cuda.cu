// grads on CUDA: one launch for all tensors. They are cut into chunks; a block looks up whose chunk it has.
#include "cuda_device.h"
#include "cuda_pack.h"
#include "grads.h"

namespace fastadv {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMostBlocks = 1 << 16;

template <class T, class Each>
__device__ void over_chunk(T* into, const T* source, std::int64_t count, Each each) {
  constexpr std::int64_t kWidth = Pack<T>::kWidth;
  const std::int64_t packs = are_aligned(into, source) ? count / kWidth : 0;
  auto* to = reinterpret_cast<Pack<T>*>(into);
  const auto* from = reinterpret_cast<const Pack<T>*>(source);
  for (std::int64_t i = threadIdx.x; i < packs; i += kThreads) {
    Pack<T> mine = to[i];
    const Pack<T> other = from[i];
    for (int k = 0; k < kWidth; ++k) mine.values[k] = each(mine.values[k], other.values[k]);
    to[i] = mine;
  }
  for (std::int64_t i = packs * kWidth + threadIdx.x; i < count; i += kThreads) into[i] = each(into[i], source[i]);
}

template <class T>
__device__ void part(const GradsEntry& entry, GradsKind kind, double number, std::int64_t first, std::int64_t count) {
  using Real = typename Compute<T>::type;
  T* into = reinterpret_cast<T*>(entry.into) + first;
  const T* source = reinterpret_cast<const T*>(entry.source) + first;
  if (kind == kCopyGrads) {
    over_chunk(into, source, count, [](T, T other) { return other; });
  } else {
    const bool sum = kind == kAccumulateGrads;
    const Grads<T> op{Real(sum ? 1 : number), Real(sum ? number : 1 - number)};
    over_chunk(into, source, count, [&](T mine, T other) { return op.blend(mine, other); });
  }
}

// The entry that a chunk belongs to: the last that begins at it or before.
__device__ const GradsEntry& owner(const GradsEntry* entries, std::int64_t count, std::int64_t chunk) {
  std::int64_t low = 0, high = count;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (entries[middle].first_chunk <= chunk ? low : high) = middle;
  }
  return entries[low];
}

__global__ void __launch_bounds__(kThreads) grads_kernel(const GradsEntry* entries, std::int64_t entry_count,
                                                         std::int64_t chunks, GradsKind kind, double number) {
  for (std::int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const GradsEntry& entry = owner(entries, entry_count, chunk);
    const std::int64_t first = (chunk - entry.first_chunk) * kGradsChunk, left = entry.count - first;
    const std::int64_t count = left < kGradsChunk ? left : kGradsChunk;
    switch (entry.dtype) {
      case kFloat64: part<double>(entry, kind, number, first, count); break;
      case kBFloat16: part<BFloat16>(entry, kind, number, first, count); break;
      case kFloat16: part<Float16>(entry, kind, number, first, count); break;
      default: part<float>(entry, kind, number, first, count);
    }
  }
}

}  // namespace

const char* grads_cuda(std::uintptr_t entries, std::int64_t entry_count, std::int64_t chunks, GradsKind kind,
                       double number, const OnDevice& on) {
  if (chunks == 0) return nullptr;  // an empty grid is a launch error
  return on.run([&](cudaStream_t stream) {
    const int blocks = int(chunks < kMostBlocks ? chunks : kMostBlocks);
    grads_kernel<<<blocks, kThreads, 0, stream>>>(reinterpret_cast<const GradsEntry*>(entries), entry_count, chunks,
                                                  kind, number);
  });
}

}  // namespace fastadv
