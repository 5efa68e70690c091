// Steps of rows whose gradients are no numbers, on four threads, each of which counts those it has skipped.
#include "rows.h"

#include <cmath>
#include <cstdio>
#include <vector>

int main() {
  constexpr std::int64_t kRows = 400, kDim = 300;
  std::vector<float> table(kRows * kDim, 1), grad(kRows * kDim, NAN);
  std::int64_t skipped = 0;
  const auto address = [](auto* to) { return reinterpret_cast<std::uintptr_t>(to); };
  const fastadv::RowsCall call{
      fastadv::kFloat32, address(table.data()), kDim, kRows, address(grad.data()), kDim, 0, 0, kRows, kDim};
  fastadv::rows_step_cpu(call, {0.1, 0, fastadv::kAlongL2, fastadv::kNoBall, true, address(&skipped)}, 4);
  std::printf("%d", int(skipped));
}
