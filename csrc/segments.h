// What loops over segments of positions share on the CPU: the check of their bounds, and an even cut over threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "parallel.h"

namespace fastadv {

constexpr std::int64_t kColumns = 256;  // how many columns are summed at a time

// Whether 0 <= index < bound, for all of them.
inline bool all_below(const std::int64_t* indices, std::int64_t count, std::int64_t bound) {
  bool good = true;
  for (std::int64_t n = 0; n < count; ++n) good &= indices[n] >= 0 && indices[n] < bound;
  return good;
}

// Whether every position is one of `count`, and segments follow each other: starts[s] <= stops[s] <= starts[s + 1].
inline bool are_segments(const std::int64_t* order, std::int64_t count, const std::int64_t* starts,
                         const std::int64_t* stops, std::int64_t segments) {
  std::int64_t before = 0;
  for (std::int64_t s = 0; s < segments; ++s) {
    if (starts[s] < before || stops[s] < starts[s]) return false;
    before = stops[s];
  }
  return before <= count && all_below(order, count, count);
}

// Calls body(begin, end) on ranges of segments that hold about equally many positions each.
template <class F>
void by_position(const std::int64_t* starts, std::int64_t segments, std::int64_t positions, std::int64_t dim,
                 int threads, const F& body) {
  // The segment in which the n-th position lies, cut so that every segment belongs to one range.
  const auto cut = [&](std::int64_t n) {
    return n == 0 ? 0 : n == positions ? segments : std::lower_bound(starts, starts + segments, n) - starts;
  };
  if (positions == 0) return body(0, segments);
  parallel(positions, dim, threads, [&](std::int64_t begin, std::int64_t end) { body(cut(begin), cut(end)); });
}

}  // namespace fastadv
