#include "kernels.h"

extern "C" __attribute__((visibility("default"))) const Kernels kernels = {
    fastadv::rows_copy_cuda,
    fastadv::rows_step_cuda,
    fastadv::grads_cuda,
};
