// Stacks, and the switch from one to another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __x86_64__
// Saves what a function must preserve on this stack, and the stack's top in *from; then the same in reverse.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.local emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
#else
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
 public:
  static constexpr std::size_t kStack = 1 << 17, kPage = 1 << 14;

  Fiber() = default;  // the stack that the program has
  // Stacks whose tops are `shift` apart, modulo a page, do not push each other out of the cache.
  Fiber(void (*main)(), std::size_t shift)
      : stack_(new char[kStack]), bottom_(stack_.get()), size_(kStack - shift % kPage) {
    begin(main);
  }

  // To `main`, again; what it did before is forgotten.
  void begin(void (*main)());

  void go_to(Fiber& other) {
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, other.bottom_, other.size_);
    enter(other);
    arrived(fake);
#else
    enter(other);
#endif
  }

  // The first thing that `main` does.
  static void arrive() {
#ifdef __SANITIZE_ADDRESS__
    arrived(nullptr);
#endif
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static inline Fiber* coming_;
  static void arrived(void* fake) { __sanitizer_finish_switch_fiber(fake, &coming_->bottom_, &coming_->size_); }
#endif

  void enter(Fiber& other) {
#ifdef __SANITIZE_ADDRESS__
    coming_ = this;
#endif
#ifdef __x86_64__
    emulator_switch(&top_, other.top_);
#else
    swapcontext(&context_, &other.context_);
#endif
  }

  std::unique_ptr<char[]> stack_;
  const void* bottom_ = nullptr;
  std::size_t size_ = 0;
#ifdef __x86_64__
  void* top_ = nullptr;
#else
  ucontext_t context_;
#endif
};

inline void Fiber::begin(void (*main)()) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack_.get(), size_);
#endif
#ifdef __x86_64__
  const auto end = reinterpret_cast<std::uintptr_t>(stack_.get() + size_) & ~std::uintptr_t(15);
  auto* top = reinterpret_cast<void**>(end);
  *--top = nullptr;  // where `main` would return to, if it did
  *--top = reinterpret_cast<void*>(main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  top_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_.get(), context_.uc_stack.ss_size = size_;
  makecontext(&context_, main, 0);
#endif
}

}  // namespace emulator
