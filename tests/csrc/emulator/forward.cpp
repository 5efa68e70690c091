// What the extension calls in place of csrc/*.cu: the library that was named last.
#include "kernels.h"

static const Kernels* kernels = nullptr;

extern "C" __attribute__((visibility("default"))) void emulator_use(const void* given) {
  kernels = static_cast<const Kernels*>(given);
}

namespace fastadv {

const char* rows_copy_cuda(const RowsCall& call, bool back, const OnDevice& on) {
  return kernels->rows_copy(call, back, on);
}

const char* rows_step_cuda(const RowsCall& call, const RowsRule& rule, std::uintptr_t parts, const OnDevice& on) {
  return kernels->rows_step(call, rule, parts, on);
}

const char* grads_cuda(std::uintptr_t entries, std::int64_t entry_count, std::int64_t chunks, GradsKind kind,
                       double number, const OnDevice& on) {
  return kernels->grads(entries, entry_count, chunks, kind, number, on);
}

}  // namespace fastadv
