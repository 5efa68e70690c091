// segment_sum on the CPU: threads take segments as they get free, since padding or "the" makes some of them long.
#include "parallel.h"
#include "segment_sum.h"

namespace fastadv {
namespace {

constexpr int kTile = 1024;          // columns whose sums stay in the first cache
constexpr std::int64_t kPiece = 16;  // segments that a thread takes at a time
constexpr int kMostBits = 11;        // of a digit: the counts stay in the first cache
constexpr int kMostDigits = 1 << kMostBits;

template <class T>
FASTADV_HD void segments_of(const SegmentSum<T>& op, std::int64_t begin, std::int64_t end) {
  for (std::int64_t s = begin; s < end; ++s) {
    for (std::int64_t d = 0; d < op.dim; d += kTile) {
      op.template columns<kTile>(s, d, int(op.dim - d < kTile ? op.dim - d : kTile));
    }
  }
}

// One function per type: see gather_perturb_cpu.cpp.
FASTADV_CLONES void run(const SegmentSum<float>& op, std::int64_t begin, std::int64_t end) {
  segments_of(op, begin, end);
}
FASTADV_CLONES void run(const SegmentSum<double>& op, std::int64_t begin, std::int64_t end) {
  segments_of(op, begin, end);
}
FASTADV_CLONES void run(const SegmentSum<BFloat16>& op, std::int64_t begin, std::int64_t end) {
  segments_of(op, begin, end);
}
FASTADV_CLONES void run(const SegmentSum<Float16>& op, std::int64_t begin, std::int64_t end) {
  segments_of(op, begin, end);
}

template <class T>
BadPlan first_outside(const SegmentSum<T>& op) {
  for (std::int64_t i = 0; i < op.count; ++i) {
    if (!op.position_in_range(i)) return {i, -1};
  }
  for (std::int64_t s = 0; s < op.rows; ++s) {
    if (!op.segment_in_range(s)) return {-1, s};
  }
  return {-1, -1};
}

// The plan. A key is (id, masked) in one number, so that one sort does both.
struct Sorter {
  const std::int64_t* ids;
  const std::uint8_t* mask;
  std::int64_t count;

  bool masked(std::int64_t n) const { return mask && !mask[n]; }
  std::uint64_t key(std::int64_t n) const { return 2 * std::uint64_t(ids[n]) + masked(n); }

  // One stable pass: positions `from` (null: 0, 1, ...) into `to`, by the digit of their keys at `shift`.
  void pass(const std::int64_t* from, std::int64_t* to, int shift, int bits) const {
    std::int64_t next[kMostDigits] = {};
    const std::uint64_t low = (std::uint64_t(1) << bits) - 1;
    for (std::int64_t n = 0; n < count; ++n) ++next[key(n) >> shift & low];
    std::int64_t before = 0;
    for (std::uint64_t digit = 0; digit <= low; ++digit) {
      const std::int64_t here = next[digit];
      next[digit] = before;
      before += here;
    }
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t n = from ? from[i] : i;
      to[next[key(n) >> shift & low]++] = n;
    }
  }

  // Sorts into `order`; `other` is room that the passes need.
  void sort(std::int64_t vocabulary, std::int64_t* order, std::int64_t* other) const {
    int width = 1;
    while (width < 64 && (2 * std::uint64_t(vocabulary) - 1) >> width) ++width;
    const int passes = (width + kMostBits - 1) / kMostBits, bits = (width + passes - 1) / passes;
    const std::int64_t* from = nullptr;
    for (int left = passes; left > 0; --left) {
      std::int64_t* to = left % 2 ? order : other;  // the last one into `order`
      pass(from, to, (passes - left) * bits, bits);
      from = to;
    }
  }
};

}  // namespace

BadPlan first_outside(const SegmentSumCall& call) {
  BadPlan bad{-1, -1};
  call.visit([&](const auto& op) { bad = first_outside(op); });
  return bad;
}

BadPlan segment_sum_cpu(const SegmentSumCall& call, int threads) {
  const BadPlan bad = first_outside(call);
  if (bad.any()) return bad;
  call.visit([&](const auto& op) {
    const std::int64_t size = (op.count + op.rows) * op.dim;
    parallel_uneven(op.rows, kPiece, size, threads, [&](std::int64_t begin, std::int64_t end) { run(op, begin, end); });
  });
  return bad;
}

std::int64_t segments_cpu(const SegmentsCall& call) {
  const auto room = [](std::uintptr_t address) { return reinterpret_cast<std::int64_t*>(address); };
  const Sorter sorter{room(call.ids), reinterpret_cast<const std::uint8_t*>(call.mask), call.count};
  for (std::int64_t n = 0; n < call.count; ++n) {
    if (sorter.ids[n] < 0 || sorter.ids[n] >= call.vocabulary) return n;
  }
  std::int64_t *slot = room(call.slot), *order = room(call.order), *starts = room(call.starts),
               *stops = room(call.stops);
  if (call.count > 0) sorter.sort(call.vocabulary, order, slot);
  std::int64_t s = -1;
  for (std::int64_t i = 0; i < call.count; ++i) {
    const std::int64_t n = order[i];
    if (i == 0 || sorter.ids[n] != sorter.ids[order[i - 1]]) {
      ++s;
      starts[s] = stops[s] = i;
    }
    const bool masked = sorter.masked(n);
    if (!masked) stops[s] = i + 1;
    slot[n] = masked ? -1 : s;
  }
  for (++s; s < call.rows; ++s) starts[s] = stops[s] = call.count;
  starts[call.rows] = call.count;
  return -1;
}

}  // namespace fastadv
