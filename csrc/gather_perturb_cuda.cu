// gather_perturb on CUDA: a block per row, striding over the grid, around the body that the CPU runs.
#include "cuda_device.h"
#include "gather_perturb.h"

namespace fastadv {
namespace {

constexpr int kMostThreads = 256;
constexpr std::int64_t kMostBlocks = 1 << 16;

template <class T>
__global__ void gather_perturb_kernel(const GatherPerturb<T> op, int* flag) {
  for (std::int64_t n = blockIdx.x; n < op.count; n += gridDim.x) {
    if (op.id_in_range(n) && op.slot_in_range(n)) {
      op.row(n, threadIdx.x, blockDim.x);
      continue;
    }
    for (std::int64_t d = threadIdx.x; d < op.dim; d += blockDim.x) op.out[n * op.dim + d] = T{};
    if (threadIdx.x == 0) *flag = 1;  // every writer writes the same value
  }
}

}  // namespace

const char* gather_perturb_cuda(const GatherPerturbCall& call, int device, std::uintptr_t stream, std::uintptr_t flag) {
  if (call.count == 0 || call.dim == 0) return nullptr;  // an empty grid is a launch error
  DeviceScope scope(device);
  if (scope.status() != cudaSuccess) return message(scope.status());
  const int threads = call.dim < kMostThreads ? int((call.dim + 31) / 32 * 32) : kMostThreads;
  const int blocks = int(call.count < kMostBlocks ? call.count : kMostBlocks);
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  const auto mark = reinterpret_cast<int*>(flag);
  call.visit([&](const auto& op) { gather_perturb_kernel<<<blocks, threads, 0, on>>>(op, mark); });
  const cudaError_t launched = cudaGetLastError();
  const cudaError_t left = scope.leave();
  return message(launched != cudaSuccess ? launched : left);
}

}  // namespace fastadv
