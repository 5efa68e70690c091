// segment_sum on CUDA: a block per segment, striding over the grid, and a thread per column, so that nothing is atomic.
#include "cuda_device.h"
#include "segment_sum.h"

namespace fastadv {
namespace {

constexpr int kMostThreads = 256;
constexpr std::int64_t kMostBlocks = 1 << 16;

template <class T>
__device__ bool in_range(const SegmentSum<T>& op, std::int64_t s) {
  if (!op.segment_in_range(s)) return false;
  for (std::int64_t i = op.starts[s]; i < op.stops[s]; ++i) {
    if (!op.position_in_range(i)) return false;
  }
  return true;
}

template <class T>
__global__ void segment_sum_kernel(const SegmentSum<T> op, int* flag) {
  for (std::int64_t s = blockIdx.x; s < op.rows; s += gridDim.x) {
    const bool good = in_range(op, s);
    for (std::int64_t d = threadIdx.x; d < op.dim; d += blockDim.x) {
      if (good)
        op.template columns<1>(s, d, 1);
      else
        op.out[s * op.dim + d] = 0;
    }
    if (!good && threadIdx.x == 0) *flag = 1;  // every writer writes the same value
  }
}

}  // namespace

const char* segment_sum_cuda(const SegmentSumCall& call, int device, std::uintptr_t stream, std::uintptr_t flag) {
  if (call.rows == 0 || call.dim == 0) return nullptr;  // an empty grid is a launch error
  DeviceScope scope(device);
  if (scope.status() != cudaSuccess) return message(scope.status());
  const int threads = call.dim < kMostThreads ? int((call.dim + 31) / 32 * 32) : kMostThreads;
  const int blocks = int(call.rows < kMostBlocks ? call.rows : kMostBlocks);
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  const auto mark = reinterpret_cast<int*>(flag);
  call.visit([&](const auto& op) { segment_sum_kernel<<<blocks, threads, 0, on>>>(op, mark); });
  const cudaError_t launched = cudaGetLastError();
  const cudaError_t left = scope.leave();
  return message(launched != cudaSuccess ? launched : left);
}

}  // namespace fastadv
