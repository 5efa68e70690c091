// fastadv._C: the only file that knows Python. It takes addresses that fastadv/native/<op>.py has checked.
#include <pybind11/pybind11.h>

#include <string>

#include "ascend.h"
#include "gather_perturb.h"
#include "segment_sum.h"

#ifdef FASTADV_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace {

using fastadv::AscendCall;
using fastadv::GatherPerturbBackwardCall;
using fastadv::GatherPerturbCall;
using fastadv::SegmentsCall;
using fastadv::SegmentSumCall;

constexpr bool kCuda =
#ifdef FASTADV_WITH_CUDA
    true;
#else
    false;
#endif

const std::int64_t* indices(std::uintptr_t address) { return reinterpret_cast<const std::int64_t*>(address); }

void refuse(const char* op, const char* what, const std::int64_t* indices, std::int64_t at, const char* where,
            std::int64_t rows) {
  throw py::index_error(std::string(op) + ": " + what + " " + std::to_string(indices[at]) + " at position " +
                        std::to_string(at) + " is out of range for " + where + " of " + std::to_string(rows) + " rows");
}

void gather_perturb_cpu(const GatherPerturbCall& call, int threads) {
  fastadv::OutOfRange bad;
  {
    py::gil_scoped_release unlocked;
    bad = fastadv::gather_perturb_cpu(call, threads);
  }
  const char* op = "gather_perturb";
  if (bad.id_at >= 0) refuse(op, "id", indices(call.ids), bad.id_at, "a table", call.rows);
  if (bad.slot_at >= 0) refuse(op, "slot", indices(call.slot), bad.slot_at, "a perturbation", call.slots);
}

void gather_perturb_backward_cpu(const GatherPerturbBackwardCall& call, int threads) {
  bool good;
  {
    py::gil_scoped_release unlocked;
    good = fastadv::gather_perturb_backward_cpu(call, threads);
  }
  if (!good) throw py::index_error("gather_perturb_backward: ids, order and starts are no grouping of this table's ids");
}

void segment_sum_cpu(const SegmentSumCall& call, int threads) {
  bool good;
  {
    py::gil_scoped_release unlocked;
    good = fastadv::segment_sum_cpu(call, threads);
  }
  if (!good) throw py::index_error("segment_sum: order, starts and stops are no grouping of the values' rows");
}

void segments_cpu(const SegmentsCall& call) {
  std::int64_t bad;
  {
    py::gil_scoped_release unlocked;
    bad = fastadv::segments_cpu(call);
  }
  if (bad >= 0) refuse("segments", "id", indices(call.ids), bad, "a table", call.vocabulary);
}

void ascend_cpu(const AscendCall& call, const GatherPerturbCall* embedding, int threads) {
  fastadv::OutOfRange bad;
  {
    py::gil_scoped_release unlocked;
    bad = fastadv::ascend_cpu(call, embedding, threads);
  }
  if (bad.id_at >= 0) refuse("ascend", "id", indices(embedding->ids), bad.id_at, "a table", embedding->rows);
  if (bad.slot_at >= 0) refuse("ascend", "slot", indices(embedding->slot), bad.slot_at, "delta", embedding->slots);
}

#ifdef FASTADV_WITH_CUDA
void gather_perturb_cuda(const GatherPerturbCall& call, int device, std::uintptr_t stream, std::uintptr_t flag) {
  const char* error;
  {
    py::gil_scoped_release unlocked;
    error = fastadv::gather_perturb_cuda(call, device, stream, flag);
  }
  if (error) throw std::runtime_error(std::string("gather_perturb: CUDA: ") + error);
}

// Why the compiled CUDA code cannot run here, or None. A driver older than the toolkit shows up here.
py::object cuda_problem() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaSuccess) return py::none();
  cudaGetLastError();
  return py::str(cudaGetErrorString(status));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "fastadv's C++ and CUDA ops, by address. Call them through fastadv.native.";
  m.attr("cuda") = kCuda;
  py::class_<GatherPerturbCall>(m, "GatherPerturbCall")
      .def(py::init([](int dtype, std::uintptr_t weight, std::int64_t row_stride, std::int64_t rows, std::uintptr_t ids,
                       std::uintptr_t delta, std::uintptr_t slot, std::int64_t slots, std::uintptr_t out,
                       std::int64_t count, std::int64_t dim) {
        return GatherPerturbCall{dtype, weight, row_stride, rows, ids, delta, slot, slots, out, count, dim};
      }));
  py::class_<GatherPerturbBackwardCall>(m, "GatherPerturbBackwardCall")
      .def(py::init([](int dtype, int pass_dtype, std::uintptr_t grad, std::int64_t row_stride, std::int64_t rows,
                       std::uintptr_t passes, std::uintptr_t pass_strides, std::int64_t pass_count, std::int64_t count,
                       std::uintptr_t ids, std::uintptr_t order, std::uintptr_t starts, std::int64_t segments,
                       std::int64_t dim, std::int64_t padding_idx) {
        return GatherPerturbBackwardCall{dtype,      pass_dtype, grad,  row_stride, rows,   passes,   pass_strides,
                                         pass_count, count,      ids,   order,      starts, segments, dim,
                                         padding_idx};
      }));
  py::class_<SegmentSumCall>(m, "SegmentSumCall")
      .def(py::init([](int dtype, std::uintptr_t values, std::int64_t row_stride, std::int64_t count,
                       std::uintptr_t order, std::uintptr_t starts, std::uintptr_t stops, std::uintptr_t out,
                       std::int64_t rows, std::int64_t dim) {
        return SegmentSumCall{dtype, values, row_stride, count, order, starts, stops, out, rows, dim};
      }));
  py::class_<SegmentsCall>(m, "SegmentsCall")
      .def(py::init([](std::uintptr_t ids, std::uintptr_t mask, std::int64_t count, std::int64_t vocabulary,
                       std::uintptr_t slot, std::uintptr_t order, std::uintptr_t starts, std::uintptr_t stops,
                       std::int64_t rows) {
        return SegmentsCall{ids, mask, count, vocabulary, slot, order, starts, stops, rows};
      }));
  m.def("gather_perturb_cpu", &gather_perturb_cpu);
  py::class_<AscendCall>(m, "AscendCall")
      .def(py::init([](int dtype, std::uintptr_t delta, std::uintptr_t grad, std::int64_t grad_stride,
                       std::uintptr_t mask, std::int64_t groups, std::int64_t rows, std::int64_t dim, double step,
                       double epsilon, int direction, int ball, std::uintptr_t skipped) {
        return AscendCall{dtype, delta, grad, grad_stride, mask, groups, rows, dim, step, epsilon, direction, ball,
                          skipped};
      }));
  m.def("ascend_cpu", &ascend_cpu);
  m.def("gather_perturb_backward_cpu", &gather_perturb_backward_cpu);
  m.def("segment_sum_cpu", &segment_sum_cpu);
  m.def("segments_cpu", &segments_cpu);
#ifdef FASTADV_WITH_CUDA
  m.def("gather_perturb_cuda", &gather_perturb_cuda);
  m.def("cuda_problem", &cuda_problem);
#endif
}
