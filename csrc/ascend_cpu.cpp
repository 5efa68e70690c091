// ascend on the CPU: passes over blocks of rows, whose sums are added in order whatever the number of threads.
#include "ascend_cpu.h"
#include "table_step.h"

#include <atomic>

namespace fastadv {
namespace {

constexpr std::int64_t kAhead = 8;  // rows that are asked for before they are needed

// Asks for a piece of a row that is needed soon: the rows of a table, and the positions of a word, are apart, so the
// processor cannot guess them.
template <class T>
INLINE inline void fetch(const T* piece, std::int64_t count) {
  for (std::int64_t d = 0; d < count; d += 64 / std::int64_t(sizeof(T))) __builtin_prefetch(piece + d);
}

template <class G>
INLINE inline Sums products(const Ascend<G>& op, std::int64_t begin, std::int64_t end) {
  typename Ascend<G>::Real room[kRun];
  const bool with_delta = op.rule.ball_of_l2();
  Sums sums;
  for (std::int64_t n = begin; n < end; ++n) {
    const bool live = op.live(n);
    for (std::int64_t first = 0; first < op.dim; first += kRun) {
      const std::int64_t count = std::min(op.dim - first, kRun);
      const auto* d = op.delta_row(n) + first;
      if (with_delta) add_products(d, d, count, sums.dd);
      if (!live) continue;
      const auto* g = widened(op.grad_row(n) + first, count, room);
      add_products(g, g, count, sums.gg);
      if (with_delta) add_products(d, g, count, sums.dg);
    }
  }
  return sums;
}

template <class G>
INLINE inline Sums pass_over(const Ascend<G>& op, Pass pass, const Move<typename Ascend<G>::Real>& move,
                             std::int64_t begin, std::int64_t end) {
  using Real = typename Ascend<G>::Real;
  if (pass == kProducts) return products(op, begin, end);
  Sums sums;
  for (std::int64_t n = begin; n < end; ++n) {
    const Real* d = op.delta_row(n);
    const G* g = op.grad_row(n);
    const auto grad = [&](std::int64_t i) INLINE { return Compute<G>::widen(g[i]); };
    const auto scaled = [&](std::int64_t i) INLINE { return grad(i) * move.along.inverse; };
    if (pass == kLargestGrad && op.live(n)) add_largest<Real>(op.dim, sums, grad);
    if (pass == kSquaresOfGrad && op.live(n)) add_squares<Real>(op.dim, sums, scaled);
    if (pass != kLargestMoved && pass != kSquaresOfMoved) continue;
    with_step(move, op.live(n), [&](const auto& step) INLINE {
      const auto moved = [&](std::int64_t i) INLINE { return d[i] + step(grad(i)); };
      const auto scaled_moved = [&](std::int64_t i) INLINE { return moved(i) * move.onto.inverse; };
      if (pass == kLargestMoved) add_largest<Real>(op.dim, sums, moved);
      if (pass == kSquaresOfMoved) add_squares<Real>(op.dim, sums, scaled_moved);
    });
  }
  return sums;
}

template <class G>
INLINE inline void move_rows(const Ascend<G>& op, const Move<typename Ascend<G>::Real>& move, std::int64_t begin,
                             std::int64_t end) {
  for (std::int64_t n = begin; n < end; ++n) {
    auto* __restrict__ d = op.delta_row(n);
    const G* __restrict__ g = op.grad_row(n);
    with_step(move, op.live(n), [&](const auto& step) INLINE {
      with_end(move, [&](const auto& project) INLINE {
        for (std::int64_t i = 0; i < op.dim; ++i) d[i] = project(d[i] + step(Compute<G>::widen(g[i])));
      });
    });
  }
}

// One row, by way of `room`, from which the C library copies without first reading what it overwrites.
template <class T>
INLINE inline void gather_row(const GatherPerturb<T>& op, std::int64_t n, T* __restrict__ room) {
  if (op.adds(n)) {
    op.row(n, 0, 1, room);
    memcpy(op.to(n), room, std::size_t(op.dim) * sizeof(T));
  } else {
    memcpy(op.to(n), op.from(n), std::size_t(op.dim) * sizeof(T));
  }
}

template <class T>
INLINE inline void gather_rows(const GatherPerturb<T>& op, std::int64_t begin, std::int64_t end) {
  const std::unique_ptr<T[]> room(new T[std::size_t(op.dim)]);
  for (std::int64_t n = begin; n < end; ++n) gather_row(op, n, room.get());
}

// Where the positions of a word are: order[starts[s]] .. order[starts[s + 1]].
struct Positions {
  const std::int64_t *order, *starts;
  std::int64_t words;
};

// The positions of words begin .. end - 1. A word's row is computed once, while one further on is on its way.
template <class T>
INLINE inline void gather_words(const GatherPerturb<T>& op, const Positions& at, std::int64_t begin, std::int64_t end) {
  const std::unique_ptr<T[]> room(new T[std::size_t(op.dim)]);
  const std::size_t size = std::size_t(op.dim) * sizeof(T);
  for (std::int64_t s = begin; s < end; ++s) {
    const T* next = op.from(at.order[at.starts[std::min(s + kAhead, at.words - 1)]]);
    bool ready = false;
    for (std::int64_t i = at.starts[s]; i < at.starts[s + 1]; ++i) {
      const std::int64_t n = at.order[i];
      if (!op.adds(n)) {
        memcpy(op.to(n), op.from(n), size);
        continue;
      }
      if (!ready) {
        fetch(next, op.dim);
        op.row(n, 0, 1, room.get());
        ready = true;
      }
      memcpy(op.to(n), room.get(), size);
    }
  }
}

// The sums of segments begin .. end - 1, in the order of positions.
template <class G>
INLINE inline void sum_rows(const SegmentSum<G>& op, std::int64_t begin, std::int64_t end) {
  for (std::int64_t s = begin; s < end; ++s) {
    std::fill_n(op.out + s * op.dim, op.dim, 0);
    for (std::int64_t i = op.starts[s]; i < op.stops[s]; ++i) {
      const G* next = op.values + op.order[std::min(i + kAhead, op.count - 1)] * op.row_stride;
      for (std::int64_t first = 0; first < op.dim; first += kRun) {
        const int count = int(std::min(op.dim - first, kRun));
        fetch(next + first, count);
        add_row(op.out + s * op.dim + first, op.values + op.order[i] * op.row_stride + first, count);
      }
    }
  }
}

// Clones cannot be templates: one function each.
#define CLONES_FOR(G)                                                                                     \
  FASTADV_CLONES Sums pass(const Ascend<G>& op, Pass which, const Move<typename Ascend<G>::Real>& move,   \
                           std::int64_t begin, std::int64_t end) {                                        \
    return pass_over(op, which, move, begin, end);                                                        \
  }                                                                                                       \
  FASTADV_CLONES void apply(const Ascend<G>& op, const Move<typename Ascend<G>::Real>& move,              \
                            std::int64_t begin, std::int64_t end) {                                       \
    move_rows(op, move, begin, end);                                                                      \
  }                                                                                                       \
  FASTADV_CLONES void gather(const GatherPerturb<G>& op, std::int64_t begin, std::int64_t end) {          \
    gather_rows(op, begin, end);                                                                          \
  }                                                                                                       \
  FASTADV_CLONES void gather(const GatherPerturb<G>& op, const Positions& at, std::int64_t begin,         \
                             std::int64_t end) {                                                          \
    gather_words(op, at, begin, end);                                                                     \
  }                                                                                                       \
  FASTADV_CLONES void sum(const SegmentSum<G>& op, std::int64_t begin, std::int64_t end) {                \
    sum_rows(op, begin, end);                                                                             \
  }
CLONES_FOR(float)
CLONES_FOR(double)
CLONES_FOR(BFloat16)
CLONES_FOR(Float16)
#undef CLONES_FOR

// What is done with a block of rows before the first pass over it, and after it has moved, while it is in cache.
struct Beside {
  const SegmentSumCall* sums = nullptr;          // their gradient is a sum over positions
  const GatherPerturbCall* embedding = nullptr;  // their positions are looked up
  Positions at{nullptr, nullptr, 0};             // and are these; no order: row n is position n

  void before(std::int64_t begin, std::int64_t end) const {
    if (sums) sums->visit([&](const auto& op) { sum(op, begin, end); });
  }
  void after(std::int64_t begin, std::int64_t end) const {
    if (!embedding) return;
    embedding->visit([&](const auto& op) {
      if (at.order) gather(op, at, begin, end);
      else gather(op, begin, end);
    });
  }
};

// One group on `threads` threads; `parts` has room for the sums of its blocks, if there is more than one thread.
// Returns whether its gradient is finite.
template <class G>
bool step_group(const Ascend<G>& op, const Beside& beside, const Blocks& blocks, int threads, Sums* parts) {
  using Real = typename Ascend<G>::Real;
  bool first = true;
  const auto reduce = [&](Pass which, const Move<Real>& move) {
    const auto sums_of = [&](std::int64_t b) {
      if (first) beside.before(blocks.first(b), blocks.last(b));
      return pass(op, which, move, blocks.first(b), blocks.last(b));
    };
    const Sums sums = add_in_order(blocks, op.dim, threads, parts, sums_of);
    first = false;
    return sums;
  };
  const Move<Real> move = plan(op.rule, reduce);
  const std::int64_t size = (blocks.end - blocks.begin) * op.dim;
  parallel_uneven(blocks.count(), 1, size, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) {
      apply(op, move, blocks.first(b), blocks.last(b));
      beside.after(blocks.first(b), blocks.last(b));
    }
  });
  return move.finite;
}

template <class G>
std::int64_t step_groups(const Ascend<G>& op, const Beside& beside, int threads) {
  if (op.groups == 0 || op.rows == 0) return 0;
  const std::int64_t rows = std::max<std::int64_t>(kBlock / std::max<std::int64_t>(op.dim, 1), 1);
  const auto blocks = [&](std::int64_t g) { return Blocks{g * op.rows, (g + 1) * op.rows, rows}; };
  std::atomic<std::int64_t> skipped{0};
  if (op.groups >= threads) {
    const std::int64_t size = op.groups * op.rows * op.dim, piece = std::max<std::int64_t>(rows / op.rows, 1);
    parallel_uneven(op.groups, piece, size, threads, [&](std::int64_t begin, std::int64_t end) {
      std::int64_t mine = 0;
      for (std::int64_t g = begin; g < end; ++g) mine += !step_group(op, beside, blocks(g), 1, nullptr);
      skipped += mine;
    });
    return skipped;
  }
  const std::unique_ptr<Sums[]> parts(new Sums[std::size_t(blocks(0).count())]);
  for (std::int64_t g = 0; g < op.groups; ++g) skipped += !step_group(op, beside, blocks(g), threads, parts.get());
  return skipped;
}

void step(const AscendCall& call, const Beside& beside, int threads) {
  call.visit([&](const auto& op) {
    const std::int64_t skipped = step_groups(op, beside, threads);
    if (skipped) *reinterpret_cast<std::int64_t*>(call.skipped) += skipped;
  });
}

OutOfRange first_out_of_range(const GatherPerturbCall& call) {
  const auto ids = reinterpret_cast<const std::int64_t*>(call.ids);
  const auto slot = reinterpret_cast<const std::int64_t*>(call.slot);
  for (std::int64_t n = 0; n < call.count; ++n) {
    if (ids[n] < 0 || ids[n] >= call.rows) return {n, -1};
    if (slot && (slot[n] < -1 || slot[n] >= call.slots)) return {-1, n};
  }
  return {-1, -1};
}

// The first segment that does not begin where the one before it ends: every position must have its row.
std::int64_t first_gap(const SegmentSumCall& call) {
  const auto starts = reinterpret_cast<const std::int64_t*>(call.starts);
  const auto stops = reinterpret_cast<const std::int64_t*>(call.stops);
  if (starts[0] != 0) return 0;
  for (std::int64_t s = 0; s < call.rows; ++s) {
    if (stops[s] > starts[s + 1]) return s;
  }
  return starts[call.rows] == call.count ? -1 : call.rows;
}

}  // namespace

OutOfRange ascend_cpu(const AscendCall& call, const GatherPerturbCall* embedding, int threads) {
  if (embedding && embedding->count == 0) embedding = nullptr;  // an empty slot has no address to tell the forms apart
  if (embedding) {
    const OutOfRange bad = first_out_of_range(*embedding);
    if (bad.id_at >= 0 || bad.slot_at >= 0) return bad;
  }
  Beside beside;
  if (embedding && !embedding->slot) beside.embedding = embedding;
  step(call, beside, threads);
  if (embedding && embedding->slot) {
    parallel(embedding->count, embedding->dim, threads, [&](std::int64_t begin, std::int64_t end) {
      embedding->visit([&](const auto& op) { gather(op, begin, end); });
    });
  }
  return {-1, -1};
}

TableStepFault table_step_cpu(const AscendCall& call, const SegmentSumCall& sums, const GatherPerturbCall& embedding,
                              int threads) {
  TableStepFault fault{first_outside(sums), first_out_of_range(embedding)};
  if (!fault.plan.any()) fault.plan.segment_at = first_gap(sums);
  if (fault.any()) return fault;
  const auto indices = [](std::uintptr_t address) { return reinterpret_cast<const std::int64_t*>(address); };
  step(call, {&sums, &embedding, {indices(sums.order), indices(sums.starts), sums.rows}}, threads);
  return fault;
}

}  // namespace fastadv
