// Makes a device current for a scope and puts the caller's back.
#pragma once

#include <cuda_runtime_api.h>

namespace fastadv {

class DeviceScope {
 public:
  explicit DeviceScope(int device) : device_(device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && previous_ != device_) status_ = cudaSetDevice(device_);
    entered_ = status_ == cudaSuccess;
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  ~DeviceScope() { leave(); }

  cudaError_t status() const { return status_; }

  // Restores the device now, so that the caller can see a failure to do so.
  cudaError_t leave() {
    if (!entered_) return cudaSuccess;
    entered_ = false;
    return previous_ == device_ ? cudaSuccess : cudaSetDevice(previous_);
  }

 private:
  int device_;
  int previous_ = 0;
  bool entered_ = false;
  cudaError_t status_;
};

inline const char* message(cudaError_t status) { return status == cudaSuccess ? nullptr : cudaGetErrorString(status); }

}  // namespace fastadv
