// gather_perturb_backward on CUDA: a block per segment, striding over the grid, and a thread per column: no atomics.
#include "cuda_device.h"
#include "gather_perturb_backward.h"

namespace fastadv {
namespace {

constexpr int kMostThreads = 256;
constexpr std::int64_t kMostBlocks = 1 << 16;

template <class T>
__device__ bool in_range(const GatherPerturbBackward<T>& op, std::int64_t s) {
  if (!op.segment_in_range(s)) return false;
  for (std::int64_t i = op.starts[s]; i < op.starts[s + 1]; ++i) {
    if (!op.position_in_range(i)) return false;
  }
  return op.empty(s) || op.id_in_range(s);
}

template <class T>
__global__ void gather_perturb_backward_kernel(const GatherPerturbBackward<T> op, int* flag) {
  for (std::int64_t s = blockIdx.x; s < op.rows; s += gridDim.x) {
    if (!in_range(op, s)) {
      if (threadIdx.x == 0) *flag = 1;  // every writer writes the same value
      continue;
    }
    if (op.empty(s) || op.id(s) == op.padding) continue;
    for (std::int64_t d = threadIdx.x; d < op.dim; d += blockDim.x) op.template columns<1>(s, d, 1);
  }
}

}  // namespace

const char* gather_perturb_backward_cuda(const GatherPerturbBackwardCall& call, int device, std::uintptr_t stream,
                                         std::uintptr_t flag) {
  if (call.rows == 0 || call.dim == 0) return nullptr;  // an empty grid is a launch error
  DeviceScope scope(device);
  if (scope.status() != cudaSuccess) return message(scope.status());
  const int threads = call.dim < kMostThreads ? int((call.dim + 31) / 32 * 32) : kMostThreads;
  const int blocks = int(call.rows < kMostBlocks ? call.rows : kMostBlocks);
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  const auto mark = reinterpret_cast<int*>(flag);
  call.visit([&](const auto& op) { gather_perturb_backward_kernel<<<blocks, threads, 0, on>>>(op, mark); });
  const cudaError_t launched = cudaGetLastError();
  const cudaError_t left = scope.leave();
  return message(launched != cudaSuccess ? launched : left);
}

}  // namespace fastadv
