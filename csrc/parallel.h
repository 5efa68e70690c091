// Cuts a loop over OpenMP threads. Which thread computes what never changes a result.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastadv {

constexpr std::int64_t kGrain = 32768;  // elements below which another thread costs more than it brings
constexpr int kMostThreads = 1024;      // a process that asks for more threads than it gets is ended by libgomp

#ifdef _OPENMP
// Calls work(part, parts) on each of `threads` threads. No exception may leave a thread (that would end the process):
// the first one is kept, and thrown when all threads are back.
template <class F>
void on_threads(int threads, const F& work) {
  std::exception_ptr error;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
#pragma omp parallel num_threads(std::min(threads, kMostThreads))
  {
    try {
      work(omp_get_thread_num(), omp_get_num_threads());
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}
#endif

// Calls body(begin, end) on even parts of 0 .. count, on at most `threads` threads; an item has `size` elements.
template <class F>
void parallel(std::int64_t count, std::int64_t size, int threads, const F& body) {
#ifdef _OPENMP
  if (threads > 1 && count > 1 && count * size > kGrain) {
    return on_threads(threads, [&](std::int64_t part, std::int64_t parts) {
      body(count * part / parts, count * (part + 1) / parts);
    });
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
    std::atomic<std::int64_t> next{0};
    return on_threads(threads, [&](int, int) {
      for (std::int64_t begin; (begin = next.fetch_add(piece, std::memory_order_relaxed)) < count;) {
        body(begin, std::min(begin + piece, count));
      }
    });
  }
#endif
  (void)piece, (void)size, (void)threads;
  body(0, count);
}

}  // namespace fastadv
