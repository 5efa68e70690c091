// A step of a perturbation by moments of its gradient, group by group:
//
//   m <- first m + (1 - first) g     v <- second v + (1 - second) g^2
//   delta <- ball(keep delta + rate m / (sqrt(v) / root + guard))
//
// Adam, AdamW and RMSprop (whose m is g) differ by the numbers alone, which fastadv/arguments/moments.py makes.
#pragma once

#include "ascend.h"

namespace fastadv {

// fastadv/arguments/moments.py's, in this order.
struct Moments {
  double first, second, keep, rate, root, guard;
};

struct MomentStepCall {
  AscendCall step;               // delta, grad, mask, starts, groups and ball; its direction says nothing here
  std::uintptr_t first, second;  // m and v, each like delta; m is 0 where there is none
  Moments by;
};

// Moves delta and its moments, and writes the next forward's input as `ascend_cpu` does. A group whose gradient is not
// finite keeps both, and is counted; it too comes onto the ball.
OutOfRange moment_step_cpu(const MomentStepCall& call, const GatherPerturbCall* embedding, int threads);

}  // namespace fastadv
