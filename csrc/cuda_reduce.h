// Reductions over a block, in an order that is always the same; every thread gets the result.
#pragma once

namespace fastadv {

constexpr int kThreads = 128;  // as many as packs (cuda_pack.h) in a row of 1,024 elements of 16 bits

struct Add {
  __device__ double operator()(double a, double b) const { return a + b; }
};

struct Larger {  // of two that are not NaN
  __device__ double operator()(double a, double b) const { return a > b ? a : b; }
};

// All of the block's kThreads threads take part. 0 must not change a result.
template <class Op>
__device__ double over_block(double value, Op op) {
  __shared__ double warps[kThreads / 32];
  for (int distance = 16; distance > 0; distance /= 2) value = op(value, __shfl_xor_sync(~0u, value, distance));
  __syncthreads();  // an earlier result has been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double result = warps[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) result = op(result, warps[warp]);
  return result;
}

}  // namespace fastadv
