// Where a launch goes: a device, a stream and the flag for indices out of range, as Python names them.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#endif

namespace fastadv {

struct OnDevice {
  int device;
  std::uintptr_t stream;
  std::uintptr_t flag;  // int32: becomes 1 where an index is out of range

#ifdef __CUDACC__
  int* flag_at() const { return reinterpret_cast<int*>(flag); }

  // Calls `launch(stream)` with the device current, and the caller's afterwards. Returns null, or what went wrong.
  template <class F>
  const char* run(F&& launch) const {
    int before = 0;
    cudaError_t status = cudaGetDevice(&before);
    if (status == cudaSuccess && before != device) status = cudaSetDevice(device);
    if (status != cudaSuccess) return cudaGetErrorString(status);
    launch(reinterpret_cast<cudaStream_t>(stream));
    status = cudaGetLastError();
    const cudaError_t back = before == device ? cudaSuccess : cudaSetDevice(before);
    if (status == cudaSuccess) status = back;
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  }
#endif
};

}  // namespace fastadv
