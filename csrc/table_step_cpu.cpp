// table_step on the CPU. What is long is read and written from front to back, and only words' rows, which the second
// or third cache holds, are met out of order: positions in the order of words would wait for memory at every row.
#include "ascend_cpu.h"
#include "table_step.h"

namespace fastadv {
namespace {

// The sums of words begin .. end - 1, in the order of positions.
template <class G>
FASTADV_HD void add_positions(const SegmentSum<G>& op, const std::int64_t* slot, std::int64_t begin, std::int64_t end) {
  const int width = int(op.dim);
  for (std::int64_t s = begin; s < end; ++s) {
    if (op.starts[s] == op.stops[s]) std::fill_n(op.out + s * op.dim, width, 0);
  }
  for (std::int64_t n = 0; n < op.count; ++n) {
    const std::int64_t s = slot[n];
    if (s < begin || s >= end) continue;
    const G* row = op.values + n * op.row_stride;
    if (op.order[op.starts[s]] == n) {
      set_row(op.out + s * op.dim, row, width);
    } else {
      add_row(op.out + s * op.dim, row, width);
    }
  }
}

// A word's embedding takes the place of its gradient, which has been used.
template <class T>
T* word_of(const GatherPerturb<T>& op, std::uintptr_t room, std::int64_t s) {
  using Sum = typename GatherPerturb<T>::Sum;
  return reinterpret_cast<T*>(reinterpret_cast<Sum*>(room) + s * op.dim);
}

// Where words are: position order[starts[s]] is the first one of word s, if it has any.
struct Words {
  const std::int64_t *order, *starts, *stops;
  std::uintptr_t room;
};

template <class T>
FASTADV_HD void embed_words(const GatherPerturb<T>& op, const Words& words, std::int64_t begin, std::int64_t end) {
  for (std::int64_t s = begin; s < end; ++s) {
    if (words.starts[s] < words.stops[s]) op.row(words.order[words.starts[s]], 0, 1, word_of(op, words.room, s));
  }
}

// Clones cannot be templates: one function each.
#define CLONES_FOR(T)                                                                                                \
  FASTADV_CLONES void add(const SegmentSum<T>& op, const std::int64_t* slot, std::int64_t begin, std::int64_t end) { \
    add_positions(op, slot, begin, end);                                                                             \
  }                                                                                                                  \
  FASTADV_CLONES void embed(const GatherPerturb<T>& op, const Words& words, std::int64_t begin, std::int64_t end) {  \
    embed_words(op, words, begin, end);                                                                              \
  }
CLONES_FOR(float)
CLONES_FOR(double)
CLONES_FOR(BFloat16)
CLONES_FOR(Float16)
#undef CLONES_FOR

// The first word of a thread, if words are shared out so that all threads have about as many positions.
std::int64_t first_word(const std::int64_t* starts, std::int64_t rows, std::int64_t position) {
  return std::lower_bound(starts, starts + rows, position) - starts;
}

void sum(const SegmentSumCall& call, const std::int64_t* slot, int threads) {
  call.visit([&](const auto& op) {
    parallel(op.count, op.dim, threads, [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t last = end == op.count ? op.rows : first_word(op.starts, op.rows, end);
      add(op, slot, first_word(op.starts, op.rows, begin), last);
    });
  });
}

template <class T>
void spread(const GatherPerturb<T>& op, std::uintptr_t room, int threads) {
  const std::size_t size = std::size_t(op.dim) * sizeof(T);
  if (size == 0) return;
  parallel(op.count, op.dim, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      memcpy(op.to(n), op.adds(n) ? word_of(op, room, op.slot[n]) : op.from(n), size);
    }
  });
}

// The first word that overlaps the next, or whose first position is not its own, or that has positions of other ids.
std::int64_t first_mixed(const Words& words, std::int64_t rows, const std::int64_t* ids, const std::int64_t* slot,
                         std::int64_t count) {
  for (std::int64_t s = 0; s < rows; ++s) {
    if (words.stops[s] > words.starts[s + 1]) return s;
    if (words.starts[s] < words.stops[s] && slot[words.order[words.starts[s]]] != s) return s;
  }
  for (std::int64_t n = 0; n < count; ++n) {
    const std::int64_t s = slot[n];
    if (s < 0) continue;
    if (words.starts[s] == words.stops[s] || ids[words.order[words.starts[s]]] != ids[n]) return s;
  }
  return -1;
}

}  // namespace

TableStepFault table_step_cpu(const AscendCall& call, const SegmentSumCall& sums, const GatherPerturbCall& embedding,
                              int threads) {
  const auto indices = [](std::uintptr_t address) { return reinterpret_cast<const std::int64_t*>(address); };
  const Words words{indices(sums.order), indices(sums.starts), indices(sums.stops), sums.out};
  const std::int64_t *ids = indices(embedding.ids), *slot = indices(embedding.slot);
  TableStepFault fault{first_outside(sums), first_out_of_range(embedding), -1};
  if (!fault.any()) fault.mixed_at = first_mixed(words, sums.rows, ids, slot, embedding.count);
  if (fault.any()) return fault;
  sum(sums, slot, threads);
  embedding.visit([&](const auto& op) {
    move_rows(call, threads, [&](std::int64_t begin, std::int64_t end) { embed(op, words, begin, end); });
    spread(op, words.room, threads);
  });
  return fault;
}

}  // namespace fastadv
