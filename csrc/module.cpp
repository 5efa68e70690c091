// fastadv._C: the only file that knows Python. It takes addresses that fastadv/native/<op>.py has checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "ascend.h"
#include "gather_perturb.h"
#include "grads.h"
#include "rows.h"

#ifdef FASTADV_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace {

using fastadv::AscendCall;
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

void refuse(const char* what, const std::int64_t* indices, std::int64_t at, const char* where, std::int64_t rows) {
  throw py::index_error(std::string("gather_perturb: ") + what + " " + std::to_string(indices[at]) + " at position " +
                        std::to_string(at) + " is out of range for " + where + " of " + std::to_string(rows) + " rows");
}

void gather_perturb_cpu(const GatherPerturbCall& call, int threads) {
  fastadv::OutOfRange bad;
  {
    py::gil_scoped_release unlocked;
    bad = fastadv::gather_perturb_cpu(call, threads);
  }
  const auto indices = [](std::uintptr_t address) { return reinterpret_cast<const std::int64_t*>(address); };
  if (bad.id_at >= 0) refuse("id", indices(call.ids), bad.id_at, "a table", call.rows);
  if (bad.slot_at >= 0) refuse("slot", indices(call.slot), bad.slot_at, "a perturbation", call.slots);
}

void ascend_cpu(const AscendCall& call, const GatherPerturbCall* embedding, int threads) {
  fastadv::OutOfRange bad;
  {
    py::gil_scoped_release unlocked;
    bad = fastadv::ascend_cpu(call, embedding, threads);
  }
  const auto error = [](const char* what, std::uintptr_t indices, std::int64_t at, std::int64_t rows) {
    const std::int64_t index = reinterpret_cast<const std::int64_t*>(indices)[at];
    return py::index_error(std::string("ascend: ") + what + " " + std::to_string(index) + " at position " +
                           std::to_string(at) + " is out of range for " + std::to_string(rows) + " rows");
  };
  if (bad.id_at >= 0) throw error("id", embedding->ids, bad.id_at, embedding->rows);
  if (bad.slot_at >= 0) throw error("slot", embedding->slot, bad.slot_at, embedding->slots);
}

void check_rows(const char* op, const RowsCall& call) {
  const std::int64_t at = fastadv::rows_first_bad(call);
  if (at < 0) return;
  const std::int64_t row = reinterpret_cast<const std::int64_t*>(call.rows)[at];
  const std::string named = std::string(op) + ": row " + std::to_string(row) + " at position " + std::to_string(at);
  if (row < 0 || row >= call.table_rows) {
    throw py::index_error(named + " is out of range for a table of " + std::to_string(call.table_rows) + " rows");
  }
  throw py::value_error(named + " is not above the one before it: rows must be in ascending order, each only once");
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
  m.def("gather_perturb_cpu", &gather_perturb_cpu);
  py::class_<AscendCall>(m, "AscendCall")
      .def(py::init([](int dtype, std::uintptr_t delta, std::uintptr_t grad, std::int64_t grad_stride,
                       std::uintptr_t mask, std::int64_t groups, std::int64_t rows, std::int64_t dim, double step,
                       double epsilon, int direction, int ball, std::uintptr_t skipped) {
        return AscendCall{dtype, delta, grad, grad_stride, mask, groups, rows, dim, step, epsilon, direction, ball,
                          skipped};
      }));
  m.def("ascend_cpu", &ascend_cpu);
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
      .def("add", [](GradsPlan& plan, const Pairs& pairs) {
        for (const auto& [dtype, into, source, count] : pairs) plan.add({dtype, into, source, count});
      })
      .def("run", [](const GradsPlan& plan, int kind, double number, int threads) {
        py::gil_scoped_release unlocked;
        plan.run_cpu(fastadv::GradsKind(kind), number, threads);
      });
  m.def("rows_touched_cpu", &rows_touched_cpu);
  m.def("rows_copy_cpu", &rows_copy_cpu);
  m.def("rows_step_cpu", &rows_step_cpu);
#ifdef FASTADV_WITH_CUDA
  m.def("gather_perturb_cuda", &gather_perturb_cuda);
  m.def("cuda_problem", &cuda_problem);
#endif
}
