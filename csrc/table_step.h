// A step of a table's perturbation, from the positions' gradient to the positions' embedding, in two passes:
//
//   g[s] = the sum of grad[order[i]] over i in starts[s] .. stops[s]            (segment_sum.h)
//   delta <- ball(delta + step * d(g))                                          (ascend.h)
//   embedded[n] = round(W[ids[n]] + delta[slot[n]])                             (gather_perturb.h)
//
// Equal ids have equal rows, so that W + delta is computed once for each word, and copied to its positions.
#pragma once

#include "ascend.h"
#include "gather_perturb.h"
#include "segment_sum.h"

namespace fastadv {

struct TableStepFault {
  BadPlan plan;
  OutOfRange index;
  std::int64_t mixed_at = -1;  // a segment that has positions with several ids, or not all of its own
  bool any() const { return plan.any() || index.any() || mixed_at >= 0; }
};

// `call`'s gradient is where `sums` go; what is there afterwards is of no use. Nothing is written if an index is bad.
TableStepFault table_step_cpu(const AscendCall& call, const SegmentSumCall& sums, const GatherPerturbCall& embedding,
                              int threads);

}  // namespace fastadv
