// A step of a table's perturbation, from the positions' gradient to the positions' embedding, in two passes:
//
//   g[s] = the sum of grad[order[i]] over i in starts[s] .. stops[s]            (segment_sum.h)
//   delta <- ball(delta + step * d(g))                                          (ascend.h)
//   embedded[n] = round(W[ids[n]] + delta[slot[n]])                             (gather_perturb.h)
//
// The sums are taken in the pass that reduces them, and a row's positions are written in the pass that moves it.
#pragma once

#include "ascend.h"
#include "gather_perturb.h"
#include "segment_sum.h"

namespace fastadv {

struct TableStepFault {
  BadPlan plan;
  OutOfRange index;
  bool any() const { return plan.any() || index.id_at >= 0 || index.slot_at >= 0; }
};

// `call`'s gradient is where `sums` go, which have one more start than rows. Nothing is written if an index is bad.
TableStepFault table_step_cpu(const AscendCall& call, const SegmentSumCall& sums, const GatherPerturbCall& embedding,
                              int threads);

}  // namespace fastadv
