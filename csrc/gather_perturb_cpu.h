// A row of gather_perturb on the CPU, which every op that embeds writes in the same way.
#pragma once

#include "gather_perturb.h"

namespace fastadv {

// Rows begin .. end - 1, each by way of a row that stays in the first cache: what the C library copies from there, it
// writes without reading first what it overwrites.
void write_rows(const GatherPerturb<float>& op, std::int64_t begin, std::int64_t end);
void write_rows(const GatherPerturb<double>& op, std::int64_t begin, std::int64_t end);
void write_rows(const GatherPerturb<BFloat16>& op, std::int64_t begin, std::int64_t end);
void write_rows(const GatherPerturb<Float16>& op, std::int64_t begin, std::int64_t end);

}  // namespace fastadv
