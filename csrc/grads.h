// The gradients of all parameters in one call: into <- source, into + w source, or d into + (1 - d) source.
#pragma once

#include <vector>

#include "common.h"
#include "cuda_device.h"

namespace fastadv {

// The codes by which Python names them (fastadv/native/grads.py has the same).
enum GradsKind { kCopyGrads = 0, kAccumulateGrads = 1, kAverageGrads = 2 };

template <class T>
struct Grads {
  using Real = typename Compute<T>::type;

  Real keep, take;  // into <- keep into + take source

  FASTADV_HD T blend(T into, T source) const {
    return Compute<T>::narrow(keep * Compute<T>::widen(into) + take * Compute<T>::widen(source));
  }
};

// One pair of tensors.
struct GradsPair {
  int dtype;
  std::uintptr_t into, source;
  std::int64_t count;
};

// Where the elements of all tensors lie, in a row, for one call.
class GradsPlan {
 public:
  void add(const GradsPair& pair);

  // `number` is the weight w of a sum, the decay d of an average.
  void run_cpu(GradsKind kind, double number, int threads) const;

 private:
  std::vector<GradsPair> pairs_;
  std::vector<std::int64_t> starts_{0};  // starts_[i]: the elements before pair i
};

// On a GPU the plan is a table in the device's memory, which Python has put there: rows of five int64.
struct GradsEntry {
  std::int64_t dtype, into, source, count, first_chunk;  // chunks of kGradsChunk elements, counted over all entries
};

constexpr std::int64_t kGradsChunk = 1 << 14;

#ifdef FASTADV_WITH_CUDA
// Returns null, or what CUDA says went wrong.
const char* grads_cuda(std::uintptr_t entries, std::int64_t entry_count, std::int64_t chunks, GradsKind kind,
                       double number, const OnDevice& on);
#endif

}  // namespace fastadv
