// rows on CUDA: copies, and a step whose norms are over each row (one launch) or over all of them (two; a third for the
// unit ball). Nothing but the count of skipped groups is atomic, so that results repeat bit for bit.
//
// Sums are in double. The squares of floats are exact there and neither over- nor underflow, so that what ascend.h does
// in several passes for the CPU is one here; for double tables squares beyond 1e308 are not finite, and nothing moves.
#include <climits>

#include "cuda_device.h"
#include "cuda_pack.h"
#include "cuda_reduce.h"
#include "rows.h"

namespace fastadv {
namespace {

// Blocks of a launch over all rows: fixed, so that sums do not depend on the device ...
constexpr int kMostBlocks = kRowsParts;
// ... and of a multiprocessor at a time: 96 of them have all of a launch. A thread has 64 registers then, or 80, which
// packs of eight need where a row is a group.
constexpr int kBlocks = 8;
template <class T>
constexpr int kBlocksByRow = sizeof(T) == 2 ? 6 : kBlocks;
enum { kUU, kDU, kDD, kLargest, kSize };

// Copies

template <class Word>
__global__ void copy_kernel(RowsCall call, std::int64_t words, std::int64_t stride, bool back, int* flag) {
  const auto rows = reinterpret_cast<const std::int64_t*>(call.rows);
  for (std::int64_t n = blockIdx.x; n < call.count; n += gridDim.x) {
    const std::int64_t row = rows ? rows[n] : n;
    if (row < 0 || row >= call.table_rows) {
      if (threadIdx.x == 0) *flag = 1;  // every writer writes the same value
      continue;
    }
    Word* table = reinterpret_cast<Word*>(call.table) + row * stride;
    Word* saved = reinterpret_cast<Word*>(call.saved) + n * words;
    for (std::int64_t i = threadIdx.x; i < words; i += blockDim.x) {
      (back ? table : saved)[i] = (back ? saved : table)[i];
    }
  }
}

// The longest words, of at most 16 bytes, that rows and their distance are made of.
template <class F>
void visit_words(const RowsCall& call, F&& visit) {
  const std::int64_t bytes = call.dim * call.element_size(), apart = call.table_stride * call.element_size();
  const std::uint64_t all = call.table | call.saved | std::uint64_t(bytes) | std::uint64_t(apart);
  if (all % 16 == 0) return visit(int4{}, bytes / 16, apart / 16);
  if (all % 8 == 0) return visit(std::int64_t{}, bytes / 8, apart / 8);
  if (all % 4 == 0) return visit(std::int32_t{}, bytes / 4, apart / 4);
  visit(std::int16_t{}, bytes / 2, apart / 2);
}

// A step. Pack p of a row belongs to thread p % kThreads, wherever the row lies: sums are the same, whether a pack is
// one access or, in a row that is not aligned, many. Behind the row's end it holds zeros, which change no sum.

template <class T>
constexpr std::int64_t kWidth = Pack<T>::kWidth;

template <class T>
__device__ double widen(T value) {
  return Compute<T>::widen(value);
}

template <class T>
__device__ double direction(const Rows<T>& op, T grad) {  // before it is brought to length; NaN where not finite
  const double g = widen(grad);
  return op.rule.direction == kAlongSign ? double(g > 0) - double(g < 0) + (g - g) : g;
}

template <class T>
__device__ double goal(const Rows<T>& op, double a, T at, T grad) {  // without a ball
  return widen(at) + a * direction(op, grad);
}

struct Found {
  double uu = 0, du = 0, dd = 0, largest = 0;
};

template <class T>
__device__ void add_row(const Rows<T>& op, std::int64_t n, Found& found) {
  const bool l2 = op.rule.ball == kL2Ball, largest = op.rule.direction == kAlongMax;
  const T *at = op.table_row(n), *grad = op.grad_row(n), *from = op.saved_row(n);
  const bool aligned = are_aligned(at, grad, from);
  for (std::int64_t i = threadIdx.x * kWidth<T>; i < op.dim; i += kThreads * kWidth<T>) {
    const Pack<T> grads = load_pack(grad, i, op.dim, aligned);
    Pack<T> ats{}, froms{};
    if (l2) ats = load_pack(at, i, op.dim, aligned), froms = load_pack(from, i, op.dim, aligned);
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) {
      const double u = direction(op, grads.values[k]), delta = widen(ats.values[k]) - widen(froms.values[k]);
      found.uu += u * u, found.du += delta * u, found.dd += delta * delta;
      if (largest) found.largest = Larger()(found.largest, fabs(u));
    }
  }
}

__device__ Found over_block(Found found) {
  return {over_block(found.uu, Add()), over_block(found.du, Add()), over_block(found.dd, Add()),
          over_block(found.largest, Larger())};
}

// What a group's sums say: `factor` multiplies u, and is 0 where nothing moves.
template <class T>
__device__ double factor(const Rows<T>& op, const Found& found) {
  if (!(found.uu > 0 && found.uu < INFINITY)) return 0;
  const double size = op.rule.direction == kAlongL2    ? sqrt(found.uu)
                      : op.rule.direction == kAlongMax ? found.largest
                                                       : 1;
  return double(op.rule.step) / size;
}

// The size, as the unit ball measures it, of the rows that this thread sees: a sum of squares, or the largest element.
template <class T>
__device__ void add_size(const Rows<T>& op, std::int64_t n, double a, double& size) {
  const T *at = op.table_row(n), *grad = op.grad_row(n), *from = op.saved_row(n);
  const bool aligned = are_aligned(at, grad, from);
  for (std::int64_t i = threadIdx.x * kWidth<T>; i < op.dim; i += kThreads * kWidth<T>) {
    const Pack<T> ats = load_pack(at, i, op.dim, aligned), grads = load_pack(grad, i, op.dim, aligned);
    const Pack<T> froms = load_pack(from, i, op.dim, aligned);
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) {
      const double m = goal(op, a, ats.values[k], grads.values[k]) - widen(froms.values[k]);
      size = op.rule.direction == kAlongL2 ? size + m * m : Larger()(size, fabs(m));
    }
  }
}

template <class T>
__device__ double size_over_block(const Rows<T>& op, double size) {
  return op.rule.direction == kAlongL2 ? over_block(size, Add()) : over_block(size, Larger());
}

// What a moved element is multiplied with to lie on the unit ball; `size` is what add_size found ...
template <class T>
__device__ double onto_unit(const Rows<T>& op, double size) {
  const double norm = op.rule.direction == kAlongL2 ? sqrt(size) : size;
  return norm > 0 ? op.rule.epsilon / norm : 1;
}

// ... and on every other.
template <class T>
__device__ double onto(const Rows<T>& op, const Found& found, double a) {
  if (op.rule.ball != kL2Ball) return 1;
  const double squares = found.dd + 2 * a * found.du + a * a * found.uu, epsilon = op.rule.epsilon;
  const double norm = squares > 0 ? sqrt(squares) : 0;
  return norm > epsilon ? epsilon / norm : 1;
}

template <class T>
__device__ void move_row(const Rows<T>& op, std::int64_t n, double a, double by) {
  using Real = typename Rows<T>::Real;
  T* at = op.table_row(n);
  const T *grad = op.grad_row(n), *from = op.saved_row(n);
  const bool aligned = are_aligned(at, grad, from), bounded = op.rule.ball != kNoBall;
  const double most = op.rule.ball == kLinfBall ? double(op.rule.epsilon) : INFINITY;
  for (std::int64_t i = threadIdx.x * kWidth<T>; i < op.dim; i += kThreads * kWidth<T>) {
    Pack<T> ats = load_pack(at, i, op.dim, aligned), froms{};
    const Pack<T> grads = load_pack(grad, i, op.dim, aligned);
    if (bounded) froms = load_pack(from, i, op.dim, aligned);
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) {
      const double end = goal(op, a, ats.values[k], grads.values[k]), center = widen(froms.values[k]);
      const double held = center + by * Clamp<double>{most}(end - center);
      ats.values[k] = Compute<T>::narrow(Real(bounded ? held : end));
    }
    store_pack(at, i, op.dim, aligned, ats);
  }
}

template <class T>
__device__ bool row_exists(const Rows<T>& op, std::int64_t n, std::int64_t table_rows, int* flag) {
  const std::int64_t row = op.row(n);
  if (row >= 0 && row < table_rows) return true;
  if (threadIdx.x == 0) *flag = 1;  // every writer writes the same value
  return false;
}

__device__ void count_skipped(std::int64_t* skipped) {  // whole numbers add up to the same in any order
  atomicAdd(reinterpret_cast<unsigned long long*>(skipped), 1ull);
}

// A block for each row, which is a group.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksByRow<T>)
    by_row_kernel(const Rows<T> op, std::int64_t table_rows, std::int64_t* skipped, int* flag) {
  for (std::int64_t n = blockIdx.x; n < op.count; n += gridDim.x) {
    if (!row_exists(op, n, table_rows, flag)) continue;
    Found found;
    add_row(op, n, found);
    found = over_block(found);
    const double a = factor(op, found);
    if (threadIdx.x == 0 && !(found.uu < INFINITY)) count_skipped(skipped);
    if (a == 0) continue;
    double by = onto(op, found, a);
    if (op.rule.ball == kUnitBall) {
      double size = 0;
      add_size(op, n, a, size);
      by = onto_unit(op, size_over_block(op, size));
    }
    move_row(op, n, a, by);
  }
}

// One group: every block leaves the sums of its rows ...
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sums_kernel(const Rows<T> op, std::int64_t table_rows, double* parts, int* flag) {
  Found found;
  for (std::int64_t n = blockIdx.x; n < op.count; n += gridDim.x) {
    if (row_exists(op, n, table_rows, flag)) add_row(op, n, found);
  }
  found = over_block(found);
  if (threadIdx.x != 0) return;
  double* mine = parts + blockIdx.x;
  mine[kUU * kMostBlocks] = found.uu, mine[kDU * kMostBlocks] = found.du;
  mine[kDD * kMostBlocks] = found.dd, mine[kLargest * kMostBlocks] = found.largest;
}

template <class Op>
__device__ double over_parts(const double* parts, int which, Op op) {
  double value = 0;
  for (int part = threadIdx.x; part < gridDim.x; part += kThreads) value = op(value, parts[which * kMostBlocks + part]);
  return over_block(value, op);
}

// ... and every block adds all of them up again.
__device__ Found over_parts(const double* parts) {
  return {over_parts(parts, kUU, Add()), over_parts(parts, kDU, Add()), over_parts(parts, kDD, Add()),
          over_parts(parts, kLargest, Larger())};
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    size_kernel(const Rows<T> op, std::int64_t table_rows, double* parts) {
  const double a = factor(op, over_parts(parts));
  double size = 0;
  for (std::int64_t n = blockIdx.x; n < op.count; n += gridDim.x) {
    if (op.row(n) >= 0 && op.row(n) < table_rows) add_size(op, n, a, size);
  }
  size = size_over_block(op, size);
  if (threadIdx.x == 0) parts[kSize * kMostBlocks + blockIdx.x] = size;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    move_kernel(const Rows<T> op, std::int64_t table_rows, const double* parts, std::int64_t* skipped) {
  const Found found = over_parts(parts);
  const double a = factor(op, found);
  if (blockIdx.x == 0 && threadIdx.x == 0 && !(found.uu < INFINITY)) count_skipped(skipped);
  if (a == 0) return;
  double by = onto(op, found, a);
  if (op.rule.ball == kUnitBall) {
    by = onto_unit(
        op, op.rule.direction == kAlongL2 ? over_parts(parts, kSize, Add()) : over_parts(parts, kSize, Larger()));
  }
  for (std::int64_t n = blockIdx.x; n < op.count; n += gridDim.x) {
    if (op.row(n) >= 0 && op.row(n) < table_rows) move_row(op, n, a, by);
  }
}

template <class T>
void launch_step(const Rows<T>& op, const RowsCall& call, const RowsRule& rule, double* parts, int* flag,
                 cudaStream_t on) {
  const auto skipped = reinterpret_cast<std::int64_t*>(rule.skipped);
  if (rule.by_row) {
    const int blocks = int(op.count < INT_MAX ? op.count : INT_MAX);
    by_row_kernel<<<blocks, kThreads, 0, on>>>(op, call.table_rows, skipped, flag);
    return;
  }
  const int blocks = int(op.count < kMostBlocks ? op.count : kMostBlocks);
  sums_kernel<<<blocks, kThreads, 0, on>>>(op, call.table_rows, parts, flag);
  if (op.rule.ball == kUnitBall) size_kernel<<<blocks, kThreads, 0, on>>>(op, call.table_rows, parts);
  move_kernel<<<blocks, kThreads, 0, on>>>(op, call.table_rows, parts, skipped);
}

}  // namespace

const char* rows_copy_cuda(const RowsCall& call, bool back, const OnDevice& on) {
  if (call.count == 0 || call.dim == 0) return nullptr;  // an empty grid is a launch error
  return on.run([&](cudaStream_t stream) {
    visit_words(call, [&](auto word, std::int64_t words, std::int64_t stride) {
      const int blocks = int(call.count < INT_MAX ? call.count : INT_MAX);
      const int threads = words < kThreads ? int((words + 31) / 32 * 32) : kThreads;
      copy_kernel<decltype(word)><<<blocks, threads, 0, stream>>>(call, words, stride, back, on.flag_at());
    });
  });
}

const char* rows_step_cuda(const RowsCall& call, const RowsRule& rule, std::uintptr_t parts, const OnDevice& on) {
  if (call.count == 0 || call.dim == 0) return nullptr;
  return on.run([&](cudaStream_t stream) {
    visit(call, rule,
          [&](const auto& op) { launch_step(op, call, rule, reinterpret_cast<double*>(parts), on.flag_at(), stream); });
  });
}

}  // namespace fastadv
