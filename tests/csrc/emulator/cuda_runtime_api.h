// Stands in for CUDA's header where the kernels run on the CPU: the language's words, and the calls of the runtime.
// build.py turns what no macro can say, launches and shared memory, into calls of emulator.h.
#pragma once

#include "emulator.h"

struct alignas(16) int4 {
  int x, y, z, w;
};

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

#define __syncthreads() emulator::barrier(__LINE__)
#define __shfl_xor_sync(mask, value, distance) emulator::shuffle_xor(mask, value, distance, __LINE__)

// Threads are never interrupted between two points where they wait.
template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* devices) { return *devices = 1, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return emulator::clear_error() ? cudaErrorLaunchFailure : cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return emulator::last_error(); }
