#include "emulator.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <utility>
#include <vector>

#include "fiber.h"

namespace emulator {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr int kWarp = 32, kMostThreads = 1024, kOrders = 64;
constexpr std::int64_t kMostBlocks = 0x7fffffff;

enum State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Thread {
  Fiber fiber;
  State state = kDone;
  int line = 0;
  unsigned mask = 0;  // the lanes that take part in the shuffle
  int source = 0;     // the one whose value it asks for
  std::uint64_t given = 0, taken = 0;
};

struct Kept {
  void* memory;
  std::size_t size;
};

char message[256] = "no error";
bool failed = false;
std::uint64_t random_state = 1;

Fiber scheduler;
std::vector<Thread*> threads;  // never fewer than before: a fiber serves many launches
Thread* current = nullptr;
const std::function<void()>* body = nullptr;
int orders[kOrders][kWarp];  // of a warp's lanes

std::vector<Kept>& kept() {
  static std::vector<Kept> all;
  return all;
}

void poison(const Kept& shared) { std::memset(shared.memory, 0xff, shared.size); }

void set_message(const char* format, va_list arguments) {
  const int used = std::snprintf(message, sizeof message, "emulated block %u: ", block_index.x);
  std::vsnprintf(message + used, sizeof message - used, format, arguments);
  failed = true;
}

__attribute__((format(printf, 1, 2))) void complain(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  set_message(format, arguments);
  va_end(arguments);
}

// Below `bound`. (splitmix64)
std::uint32_t random_below(std::uint32_t bound) {
  std::uint64_t z = (random_state += 0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return std::uint32_t(((z ^ (z >> 31)) >> 32) * bound >> 32);
}

template <class Item>
void draw_order(Item* items, std::uint32_t count) {
  std::iota(items, items + count, Item());
  for (; count > 1; --count) std::swap(items[count - 1], items[random_below(count)]);
}

// Every fiber: one thread after the other, for as long as the program runs.
void serve() {
  Fiber::arrive();
  for (;;) {
    (*body)();
    current->state = kDone;
    current->fiber.go_to(scheduler);
  }
}

void wait(State what, int line) {
  current->state = what, current->line = line;
  current->fiber.go_to(scheduler);
}

struct Warp {
  int first;
  std::uint32_t ready, at_barrier = 0, at_shuffle = 0;  // a bit for every lane
  bool held = false;
};

class Block {
 public:
  explicit Block(int count) {
    for (const Kept& shared : kept()) poison(shared);
    for (int first = 0; first < count; first += kWarp) {
      const int missing = std::max(0, first + kWarp - count);
      warps_.push_back({first, ~0u >> missing});
    }
    hold_back();
  }

  void run() {
    while (!failed) {
      if (Warp* warp = next()) {
        turn(*warp);
      } else if (!pass_barrier()) {
        return;
      }
    }
  }

 private:
  // Some warps fall behind all others, so that these run into what they have not done yet.
  void hold_back() {
    for (Warp& warp : warps_) warp.held = random_below(4) == 0;
  }

  // A warp that can run, of those that are not held back if there is one.
  Warp* next() {
    Warp* chosen = nullptr;
    for (std::uint32_t found = 0, held = 0; held < 2 && !chosen; ++held) {
      for (Warp& warp : warps_) {
        if (warp.ready && warp.held == bool(held) && random_below(++found) == 0) chosen = &warp;
      }
    }
    return chosen;
  }

  // Runs a warp until it waits for the block, or for a while.
  static void turn(Warp& warp) {
    do {
      for (const int lane : orders[random_below(kOrders)]) {
        if (warp.ready >> lane & 1) resume(warp, lane);
        if (failed) return;
      }
      if (warp.at_shuffle) exchange(warp);
    } while (warp.ready && random_below(8) != 0);
  }

  static void resume(Warp& warp, int lane) {
    current = threads[warp.first + lane];
    thread_index.x = unsigned(warp.first + lane);
    scheduler.go_to(current->fiber);
    warp.ready &= ~(1u << lane);
    if (current->state == kAtBarrier) warp.at_barrier |= 1u << lane;
    if (current->state == kAtShuffle) warp.at_shuffle |= 1u << lane;
    current = nullptr;
  }

  // Gives every lane what it asks for. All that the mask names must be there.
  static void exchange(Warp& warp) {
    Thread* const* lanes = threads.data() + warp.first;
    const Thread& one = *lanes[__builtin_ctz(warp.at_shuffle)];
    const std::uint32_t mask = one.mask;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      const bool waits = warp.at_shuffle >> lane & 1;
      if (!waits || lanes[lane]->line != one.line || lanes[lane]->mask != mask) {
        return complain("thread %d is not at the shuffle of line %d", warp.first + lane, one.line);
      }
      const int source = lanes[lane]->source;
      if (!(mask >> source & 1))
        return complain("line %d: a shuffle asks lane %d, which is not in it", one.line, source);
      lanes[lane]->taken = lanes[source]->given;
    }
    warp.at_shuffle &= ~mask, warp.ready |= mask;
  }

  // Lets the threads go on that wait for each other. False: there are none.
  bool pass_barrier() {
    int line = 0;
    for (const Warp& warp : warps_) {
      for (int lane = 0; lane < kWarp; ++lane) {
        if (!(warp.at_barrier >> lane & 1)) continue;
        const Thread& thread = *threads[warp.first + lane];
        if (line == 0) line = thread.line;
        if (thread.line != line) {
          complain("thread %d waits at line %d, and others at line %d", warp.first + lane, thread.line, line);
        }
      }
    }
    for (Warp& warp : warps_) warp.ready = std::exchange(warp.at_barrier, 0u);
    hold_back();
    return line != 0;
  }

  std::vector<Warp> warps_;
};

// A thread that an error has stopped half way is forgotten.
void forget() {
  for (Thread* thread : threads) {
    if (thread->state != kDone) thread->fiber.begin(serve);
    thread->state = kDone;
  }
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  set_message(format, arguments);
  va_end(arguments);
  if (current) current->fiber.go_to(scheduler);  // which does not come back
  std::fprintf(stderr, "not in a kernel: %s\n", message);
  std::abort();
}

const char* last_error() { return message; }
bool clear_error() { return std::exchange(failed, false); }

void keep(void* memory, std::size_t size) {
  kept().push_back({memory, size});
  poison(kept().back());
}

void barrier(int line) { wait(kAtBarrier, line); }

std::uint64_t shuffle_xor_bits(unsigned mask, std::uint64_t bits, int distance, int line) {
  current->mask = mask, current->given = bits;
  current->source = (int(thread_index.x) ^ distance) % kWarp;
  wait(kAtShuffle, line);
  return current->taken;
}

void run(std::int64_t blocks, std::int64_t count, const std::function<void()>& thread) {
  if (failed) return;  // an earlier launch has
  if (blocks < 1 || blocks > kMostBlocks || count < 1 || count > kMostThreads) {
    return complain("a launch of %lld blocks of %lld threads", (long long)blocks, (long long)count);
  }
  while (std::int64_t(threads.size()) < count) threads.push_back(new Thread{{serve, 1088 * threads.size()}});
  grid_size = {unsigned(blocks), 1, 1}, block_size = {unsigned(count), 1, 1};
  body = &thread;
  std::vector<unsigned> order(blocks);
  draw_order(order.data(), std::uint32_t(blocks));
  for (auto& lanes : orders) draw_order(lanes, kWarp);
  for (const unsigned index : order) {
    block_index = {index, 0, 0};
    Block(int(count)).run();
    if (failed) return forget();
  }
}

}  // namespace emulator

// Called where the compiler's check of alignments fails (-fsanitize=alignment); the layout is the compiler's.
struct Mismatch {
  const char* file;
  std::uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};

extern "C" void __ubsan_handle_type_mismatch_v1(const Mismatch* found, std::uintptr_t address) {
  emulator::fail("line %u: an access to %#zx, which is not aligned to %d bytes", found->line, std::size_t(address),
                 1 << found->log_alignment);
}

extern "C" __attribute__((visibility("default"))) void emulator_seed(std::uint64_t seed) {
  emulator::random_state = seed;
}
