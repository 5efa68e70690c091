// Runs CUDA kernels on one CPU thread: blocks one after the other, a block's threads as fibers, all in random order.
//
// A thread runs until it waits, for its block at a barrier or for its warp at a shuffle; then another one has its turn.
// Wrong code that a GPU may run to the end all the same is an error here, with a message: a wait that not all take part
// in, an access beside its alignment, an index beside shared memory. What nobody has written in shared memory is NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

namespace emulator {

struct Index {
  unsigned x, y, z;
};

extern Index thread_index, block_index, block_size, grid_size;

void barrier(int line);
std::uint64_t shuffle_xor_bits(unsigned mask, std::uint64_t bits, int distance, int line);

template <class T>
T shuffle_xor(unsigned mask, T value, int distance, int line) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle_xor_bits(mask, bits, distance, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Ends the launch with a message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

const char* last_error();
bool clear_error();  // whether there was one; its message stays

void run(std::int64_t blocks, std::int64_t threads, const std::function<void()>& thread);

// kernel<<<blocks, threads, shared, stream>>>(arguments): every thread has copies of its own, as on a GPU.
template <class Kernel, class... Arguments>
void launch(std::int64_t blocks, std::int64_t threads, int, void*, Kernel kernel, Arguments... arguments) {
  run(blocks, threads, [&] { kernel(arguments...); });
}

// Shared memory lies somewhere for the whole run, and forgets all with each block.
void keep(void* memory, std::size_t size);

template <class T>
class Shared;

template <class T, std::size_t count>
class Shared<T[count]> {
 public:
  Shared() { keep(values_, sizeof values_); }
  T& operator[](std::size_t i) {
    if (i >= count) fail("element %zu of shared memory for %zu", i, count);
    return values_[i];
  }

 private:
  T values_[count];
};

}  // namespace emulator
