// segments and segment_sum on the CPU: a radix sort, and OpenMP over segments.
#include "segment_sum.h"

#include <memory>

#include "segments.h"

namespace fastadv {
namespace {

template <class T>
FASTADV_HD void rows_of(const SegmentSum<T>& op, std::int64_t begin, std::int64_t end) {
  typename Compute<T>::type sum[kColumns];
  for (std::int64_t s = begin; s < end; ++s) {
    for (std::int64_t first = 0; first < op.dim; first += kColumns) {
      const std::int64_t width = op.dim - first < kColumns ? op.dim - first : kColumns;
      for (std::int64_t d = 0; d < width; ++d) sum[d] = 0;
      for (std::int64_t i = op.starts[s]; i < op.stops[s]; ++i) {
        for (std::int64_t d = 0; d < width; ++d) sum[d] += op.at(i, first + d);
      }
      for (std::int64_t d = 0; d < width; ++d) op.out[s * op.dim + first + d] = sum[d];
    }
  }
}

FASTADV_CLONES void run(const SegmentSum<float>& op, std::int64_t begin, std::int64_t end) { rows_of(op, begin, end); }
FASTADV_CLONES void run(const SegmentSum<double>& op, std::int64_t begin, std::int64_t end) {
  rows_of(op, begin, end);
}
FASTADV_CLONES void run(const SegmentSum<BFloat16>& op, std::int64_t begin, std::int64_t end) {
  rows_of(op, begin, end);
}
FASTADV_CLONES void run(const SegmentSum<Float16>& op, std::int64_t begin, std::int64_t end) {
  rows_of(op, begin, end);
}

struct Keyed {
  std::uint64_t key;
  std::int64_t position;
};

constexpr int kDigit = 11;  // bits per round: a vocabulary of two million takes two

// One stable round of counting sort by the digit that begins at bit `shift`.
void sort_digit(const Keyed* from, Keyed* to, std::int64_t count, int shift) {
  constexpr std::uint64_t kValues = 1u << kDigit;
  std::int64_t begins[kValues + 1] = {};
  const auto digit = [&](const Keyed& item) { return (item.key >> shift) & (kValues - 1); };
  for (std::int64_t n = 0; n < count; ++n) ++begins[digit(from[n]) + 1];
  for (std::uint64_t value = 0; value < kValues; ++value) begins[value + 1] += begins[value];
  for (std::int64_t n = 0; n < count; ++n) to[begins[digit(from[n])]++] = from[n];
}

}  // namespace

bool segment_sum_cpu(const SegmentSumCall& call, int threads) {
  bool good = true;
  call.visit([&](const auto& op) {
    good = are_segments(op.order, op.count, op.starts, op.stops, op.rows);
    if (!good) return;
    by_position(op.starts, op.rows, op.count, op.dim, threads,
                [&](std::int64_t begin, std::int64_t end) { run(op, begin, end); });
  });
  return good;
}

std::int64_t segments_cpu(const SegmentsCall& call) {
  const auto ids = reinterpret_cast<const std::int64_t*>(call.ids);
  const auto mask = reinterpret_cast<const bool*>(call.mask);
  const auto slot = reinterpret_cast<std::int64_t*>(call.slot), order = reinterpret_cast<std::int64_t*>(call.order);
  const auto starts = reinterpret_cast<std::int64_t*>(call.starts), stops = reinterpret_cast<std::int64_t*>(call.stops);
  for (std::int64_t n = 0; n < call.count; ++n) {
    if (ids[n] < 0 || ids[n] >= call.vocabulary) return n;
  }
  const std::unique_ptr<Keyed[]> memory(new Keyed[2 * call.count]);
  Keyed *items = memory.get(), *spare = items + call.count;
  for (std::int64_t n = 0; n < call.count; ++n) {
    items[n] = {2 * std::uint64_t(ids[n]) + (mask && !mask[n]), n};
  }
  for (int shift = 0; (2 * std::uint64_t(call.vocabulary) - 1) >> shift && shift < 64; shift += kDigit) {
    sort_digit(items, spare, call.count, shift);
    std::swap(items, spare);
  }
  std::int64_t row = -1;
  for (std::int64_t i = 0; i < call.count; ++i) {
    const bool masked = items[i].key & 1;
    if (i == 0 || items[i].key >> 1 != items[i - 1].key >> 1) {
      ++row;
      starts[row] = stops[row] = i;
    }
    if (!masked) stops[row] = i + 1;
    order[i] = items[i].position;
    slot[items[i].position] = masked ? -1 : row;
  }
  for (std::int64_t s = row + 1; s < call.rows; ++s) starts[s] = stops[s] = call.count;
  starts[call.rows] = call.count;
  return -1;
}

}  // namespace fastadv
