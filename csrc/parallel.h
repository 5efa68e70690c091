// Cuts a loop over OpenMP threads. Which thread computes what never changes a result.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastadv {

constexpr std::int64_t kGrain = 32768;  // elements below which another thread costs more than it brings

// Calls body(begin, end) on even parts of 0 .. count, on at most `threads` threads; an item has `size` elements.
template <class F>
void parallel(std::int64_t count, std::int64_t size, int threads, const F& body) {
#ifdef _OPENMP
  if (threads > 1 && count > 1 && count * size > kGrain) {
#pragma omp parallel num_threads(threads)
    {
      const std::int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
      body(count * part / parts, count * (part + 1) / parts);
    }
    return;
  }
#endif
  (void)threads, (void)size;
  body(0, count);
}

// The same for items of uneven size: threads take `piece` of them at a time, as they get free. `size` is of them all.
template <class F>
void parallel_uneven(std::int64_t count, std::int64_t piece, std::int64_t size, int threads, const F& body) {
#ifdef _OPENMP
  if (threads > 1 && count > piece && size > kGrain) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (std::int64_t begin = 0; begin < count; begin += piece) {
      body(begin, begin + piece < count ? begin + piece : count);
    }
    return;
  }
#endif
  (void)piece, (void)size, (void)threads;
  body(0, count);
}

}  // namespace fastadv
