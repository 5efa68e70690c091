// fastadv._C: the only file that knows Python. It takes addresses that fastadv/native/<op>.py has checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "ascend.h"
#include "divergence.h"
#include "gather_perturb.h"
#include "gather_perturb_backward.h"
#include "grads.h"
#include "rows.h"
#include "segment_sum.h"
#include "table_step.h"

#ifdef FASTADV_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace {

using fastadv::GatherPerturbCall;
using fastadv::GradsPlan;
using fastadv::RowsCall;
using fastadv::RowsRule;

constexpr bool kCuda =
#ifdef FASTADV_WITH_CUDA
    true;
#else
    false;
#endif

std::string at(std::int64_t index) { return std::to_string(index); }

std::int64_t entry(std::uintptr_t address, std::int64_t index) {
  return reinterpret_cast<const std::int64_t*>(address)[index];
}

void refuse_index(const std::string& op, const char* what, std::uintptr_t indices, std::int64_t bad, const char* where,
                  std::int64_t rows) {
  throw py::index_error(op + ": " + what + " " + at(entry(indices, bad)) + " at position " + at(bad) +
                        " is out of range for " + where + " of " + at(rows) + " rows");
}

void refuse_lookup(const std::string& op, const fastadv::OutOfRange& bad, const GatherPerturbCall& call,
                   const char* slots = "delta") {
  if (bad.id_at >= 0) refuse_index(op, "id", call.ids, bad.id_at, "a table", call.rows);
  if (bad.slot_at >= 0) refuse_index(op, "slot", call.slot, bad.slot_at, slots, call.slots);
}

void gather_perturb_cpu(const GatherPerturbCall& call, int threads) {
  fastadv::OutOfRange bad;
  {
    py::gil_scoped_release unlocked;
    bad = fastadv::gather_perturb_cpu(call, threads);
  }
  refuse_lookup("gather_perturb", bad, call, "a perturbation");
}

void ascend_cpu(const fastadv::AscendCall& call, const GatherPerturbCall* embedding, int threads) {
  fastadv::OutOfRange bad;
  {
    py::gil_scoped_release unlocked;
    bad = fastadv::ascend_cpu(call, embedding, threads);
  }
  if (bad.any()) refuse_lookup("ascend", bad, *embedding);
}

void segments_cpu(const fastadv::SegmentsCall& call) {
  std::int64_t bad;
  {
    py::gil_scoped_release unlocked;
    bad = fastadv::segments_cpu(call);
  }
  if (bad >= 0) refuse_index("segments", "id", call.ids, bad, "a table", call.vocabulary);
}

void refuse_position(const std::string& op, std::uintptr_t order, std::int64_t bad, std::int64_t count) {
  throw py::index_error(op + ": order[" + at(bad) + "] is " + at(entry(order, bad)) + ", which is out of range for " +
                        at(count) + " positions");
}

void refuse_segment(const std::string& op, std::int64_t bad, std::int64_t count) {
  throw py::index_error(op + ": segment " + at(bad) + " is out of range for " + at(count) + " positions");
}

void refuse_plan(const std::string& op, const fastadv::BadPlan& bad, const fastadv::SegmentSumCall& call) {
  if (bad.position_at >= 0) refuse_position(op, call.order, bad.position_at, call.count);
  if (bad.segment_at >= 0) refuse_segment(op, bad.segment_at, call.count);
}

void segment_sum_cpu(const fastadv::SegmentSumCall& call, int threads) {
  fastadv::BadPlan bad;
  {
    py::gil_scoped_release unlocked;
    bad = fastadv::segment_sum_cpu(call, threads);
  }
  refuse_plan("segment_sum", bad, call);
}

void divergence_cpu(const fastadv::DivergenceCall& call, int threads) {
  py::gil_scoped_release unlocked;
  fastadv::divergence_cpu(call, threads);
}

void table_step_cpu(const fastadv::AscendCall& call, const fastadv::SegmentSumCall& sums,
                    const GatherPerturbCall& embedding, int threads) {
  fastadv::TableStepFault fault;
  {
    py::gil_scoped_release unlocked;
    fault = fastadv::table_step_cpu(call, sums, embedding, threads);
  }
  const auto& [plan, index, mixed_at] = fault;
  refuse_plan("table_step", plan, sums);
  refuse_lookup("table_step", index, embedding);
  if (mixed_at >= 0) throw py::index_error("table_step: segment " + at(mixed_at) + " was not made from these ids");
}

// Address, row stride, and whether the rows are in the dtype of the sum.
using Grads = std::vector<std::tuple<std::uintptr_t, std::int64_t, bool>>;

fastadv::GatherPerturbBackwardCall backward_call(int dtype, std::uintptr_t table_grad, std::int64_t row_stride,
                                                 std::int64_t vocabulary, const Grads& grads, std::uintptr_t ids,
                                                 std::uintptr_t order, std::uintptr_t starts, std::int64_t rows,
                                                 std::int64_t count, std::int64_t dim, std::int64_t padding) {
  fastadv::GatherPerturbBackwardCall call{dtype, table_grad, row_stride, vocabulary, {},  0,      ids,
                                          order, starts,     rows,       count,      dim, padding};
  if (grads.size() > fastadv::kMostGrads) throw py::value_error("gather_perturb_backward: too many grads");
  for (const auto& [address, stride, wide] : grads) {
    call.grads[call.grad_count++] = {reinterpret_cast<const void*>(address), stride, wide};
  }
  return call;
}

void gather_perturb_backward_cpu(const fastadv::GatherPerturbBackwardCall& call, int threads) {
  const std::string op = "gather_perturb_backward";
  fastadv::BadBackward bad;
  {
    py::gil_scoped_release unlocked;
    bad = fastadv::gather_perturb_backward_cpu(call, threads);
  }
  if (bad.position_at >= 0) refuse_position(op, call.order, bad.position_at, call.count);
  if (bad.segment_at >= 0) refuse_segment(op, bad.segment_at, call.count);
  if (bad.id_at >= 0) refuse_index(op, "id", call.ids, bad.id_at, "a table", call.vocabulary);
  if (bad.fall_at >= 0) {
    throw py::value_error(op + ": the ids must rise from segment to segment, but do not at segment " + at(bad.fall_at) +
                          "; pass the order and starts that segments(ids) gives");
  }
}

void check_rows(const char* op, const RowsCall& call) {
  const std::int64_t bad = fastadv::rows_first_bad(call);
  if (bad < 0) return;
  const std::int64_t row = entry(call.rows, bad);
  if (row < 0 || row >= call.table_rows) refuse_index(op, "row", call.rows, bad, "a table", call.table_rows);
  throw py::value_error(std::string(op) + ": row " + at(row) + " at position " + at(bad) +
                        " is not above the one before it: rows must be in ascending order, each only once");
}

std::int64_t rows_touched_cpu(const RowsCall& call, std::uintptr_t found, int threads) {
  py::gil_scoped_release unlocked;
  return fastadv::rows_touched_cpu(call, reinterpret_cast<std::int64_t*>(found), threads);
}

void rows_copy_cpu(const RowsCall& call, bool back, int threads) {
  check_rows(back ? "rows_restore" : "rows_back_up", call);
  py::gil_scoped_release unlocked;
  fastadv::rows_copy_cpu(call, back, threads);
}

void rows_step_cpu(const RowsCall& call, const RowsRule& rule, int threads) {
  check_rows("rows_step", call);
  py::gil_scoped_release unlocked;
  fastadv::rows_step_cpu(call, rule, threads);
}

#ifdef FASTADV_WITH_CUDA
// Runs `launch` without Python's lock, and raises what CUDA says went wrong.
template <class F>
void on_device(const char* op, F&& launch) {
  const char* error;
  {
    py::gil_scoped_release unlocked;
    error = launch();
  }
  if (error) throw std::runtime_error(std::string(op) + ": CUDA: " + error);
}

void rows_copy_cuda(const RowsCall& call, bool back, const fastadv::OnDevice& on) {
  on_device(back ? "rows_restore" : "rows_back_up", [&] { return fastadv::rows_copy_cuda(call, back, on); });
}

void rows_step_cuda(const RowsCall& call, const RowsRule& rule, std::uintptr_t parts, const fastadv::OnDevice& on) {
  on_device("rows_step", [&] { return fastadv::rows_step_cuda(call, rule, parts, on); });
}

void grads_cuda(std::uintptr_t entries, std::int64_t count, std::int64_t chunks, int kind, double number,
                const fastadv::OnDevice& on) {
  on_device("grads", [&] { return fastadv::grads_cuda(entries, count, chunks, fastadv::GradsKind(kind), number, on); });
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
  m.def("gather_perturb_cpu", &gather_perturb_cpu);
  py::class_<fastadv::AscendCall>(m, "AscendCall")
      .def(py::init([](int dtype, std::uintptr_t delta, std::uintptr_t grad, std::int64_t grad_stride,
                       std::uintptr_t mask, std::int64_t groups, std::int64_t rows, std::int64_t dim, double step,
                       double epsilon, int direction, int ball, std::uintptr_t skipped) {
        return fastadv::AscendCall{dtype, delta, grad,    grad_stride, mask, groups, rows,
                                   dim,   step,  epsilon, direction,   ball, skipped};
      }));
  m.def("ascend_cpu", &ascend_cpu);
  py::class_<fastadv::SegmentsCall>(m, "SegmentsCall")
      .def(py::init([](std::uintptr_t ids, std::uintptr_t mask, std::int64_t vocabulary, std::int64_t count,
                       std::uintptr_t slot, std::uintptr_t order, std::uintptr_t starts, std::uintptr_t stops,
                       std::int64_t rows) {
        return fastadv::SegmentsCall{ids, mask, vocabulary, count, slot, order, starts, stops, rows};
      }));
  m.def("segments_cpu", &segments_cpu);
  py::class_<fastadv::SegmentSumCall>(m, "SegmentSumCall")
      .def(py::init([](int dtype, std::uintptr_t values, std::int64_t row_stride, std::int64_t count,
                       std::uintptr_t order, std::uintptr_t starts, std::uintptr_t stops, std::uintptr_t out,
                       std::int64_t rows, std::int64_t dim) {
        return fastadv::SegmentSumCall{dtype, values, row_stride, count, order, starts, stops, out, rows, dim};
      }));
  m.def("segment_sum_cpu", &segment_sum_cpu);
  m.def("table_step_cpu", &table_step_cpu);
  py::class_<fastadv::DivergenceCall>(m, "DivergenceCall")
      .def(py::init([](int dtype, std::uintptr_t logits, std::uintptr_t target, std::int64_t logits_stride,
                       std::int64_t target_stride, std::uintptr_t weights, std::uintptr_t values,
                       std::uintptr_t grad_logits, std::uintptr_t grad_target, std::int64_t count, std::int64_t classes,
                       int kind) {
        return fastadv::DivergenceCall{dtype,  logits,      target,      logits_stride, target_stride, weights,
                                       values, grad_logits, grad_target, count,         classes,       kind};
      }));
  m.def("divergence_cpu", &divergence_cpu);
  py::class_<fastadv::GatherPerturbBackwardCall>(m, "GatherPerturbBackwardCall").def(py::init(&backward_call));
  m.attr("most_grads") = fastadv::kMostGrads;
  m.def("gather_perturb_backward_cpu", &gather_perturb_backward_cpu);
  py::class_<RowsCall>(m, "RowsCall")
      .def(py::init([](int dtype, std::uintptr_t table, std::int64_t table_stride, std::int64_t table_rows,
                       std::uintptr_t grad, std::int64_t grad_stride, std::uintptr_t saved, std::uintptr_t rows,
                       std::int64_t count, std::int64_t dim) {
        return RowsCall{dtype, table, table_stride, table_rows, grad, grad_stride, saved, rows, count, dim};
      }));
  py::class_<RowsRule>(m, "RowsRule")
      .def(py::init([](double step, double epsilon, int direction, int ball, bool by_row, std::uintptr_t skipped) {
        return RowsRule{step, epsilon, direction, ball, by_row, skipped};
      }));
  using Pairs = std::vector<std::tuple<int, std::uintptr_t, std::uintptr_t, std::int64_t>>;
  py::class_<GradsPlan>(m, "GradsPlan")
      .def(py::init<>())
      .def("add",
           [](GradsPlan& plan, const Pairs& pairs) {
             for (const auto& [dtype, into, source, count] : pairs) plan.add({dtype, into, source, count});
           })
      .def("run", [](const GradsPlan& plan, int kind, double number, int threads) {
        py::gil_scoped_release unlocked;
        plan.run_cpu(fastadv::GradsKind(kind), number, threads);
      });
  m.def("rows_touched_cpu", &rows_touched_cpu);
  m.def("rows_copy_cpu", &rows_copy_cpu);
  m.def("rows_step_cpu", &rows_step_cpu);
  m.attr("grads_chunk") = fastadv::kGradsChunk;
  m.attr("rows_parts") = fastadv::kRowsParts;
#ifdef FASTADV_WITH_CUDA
  py::class_<fastadv::OnDevice>(m, "OnDevice").def(py::init([](int device, std::uintptr_t stream, std::uintptr_t flag) {
    return fastadv::OnDevice{device, stream, flag};
  }));
  m.def("rows_copy_cuda", &rows_copy_cuda);
  m.def("rows_step_cuda", &rows_step_cuda);
  m.def("grads_cuda", &grads_cuda);
  m.def("cuda_problem", &cuda_problem);
#endif
}
