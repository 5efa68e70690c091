// The entries of csrc/*.cu, as a library of their own has them: one extension runs many versions of the kernels.
#pragma once

#include "grads.h"
#include "rows.h"

struct Kernels {
  decltype(&fastadv::rows_copy_cuda) rows_copy;
  decltype(&fastadv::rows_step_cuda) rows_step;
  decltype(&fastadv::grads_cuda) grads;
};
