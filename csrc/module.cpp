// fastadv._C: takes Python tensors if a signature does, and runs the op on their addresses. None: it does not; then
// fastadv/native says why not, or copies what is laid out otherwise and calls again.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "calls.h"
#include "define.h"
#include "grads.h"
#include "members.h"
#include "module_steps.h"
#include "refusals.h"

#ifdef FASTADV_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace {

using fastadv::define;
using fastadv::GivenRule;
using fastadv::kCuda;
using fastadv::refusal;
using fastadv::RowsCall;
using fastadv::Signature;
using fastadv::Taken;
using fastadv::unlocked;
using fastadv::View;

const View kNone;

// weight, ids; and delta; and slot.
py::object gather_perturb_cpu(const Signature& signature, const py::tuple& tensors, int threads) {
  const Taken taken(signature, tensors);
  if (!signature.is("gather_perturb", {2, 3, 4}) || !taken) return py::none();
  const View &weight = taken[0], &ids = taken[1];
  std::vector<std::int64_t> shape(ids.sizes, ids.sizes + ids.dims);
  shape.push_back(weight.sizes[1]);
  View out;
  py::object made = taken.empty(shape, weight.dtype, out);
  const View &delta = taken.size() > 2 ? taken[2] : kNone, &slot = taken.size() > 3 ? taken[3] : kNone;
  const auto call = fastadv::gather_call(weight, ids, delta, slot, out);
  const auto bad = unlocked([&] { return fastadv::gather_perturb_cpu(call, threads); });
  fastadv::refuse_lookup("gather_perturb", bad, call, "a perturbation");
  return made;
}

// table_grad, ids, order, starts, and gradients.
py::object gather_perturb_backward_cpu(const Signature& signature, const py::tuple& tensors, std::int64_t padding,
                                       int threads) {
  const Taken taken(signature, tensors);
  if (!signature.is("gather_perturb_backward", {5}) || !taken || taken.size() - 4 > fastadv::kMostGrads)
    return py::none();
  const auto call = fastadv::backward_call(taken, 4, padding);
  const auto bad = unlocked([&] { return fastadv::gather_perturb_backward_cpu(call, threads); });
  fastadv::refuse_backward("gather_perturb_backward", bad, call);
  return py::bool_(true);
}

// ids, mask -> slot, order, starts, stops.
py::object segments_cpu(const Signature& signature, const py::tuple& tensors, std::int64_t vocabulary, int) {
  const Taken taken(signature, tensors);
  if (!signature.is("segments", {2}) || !taken || vocabulary < 0) return py::none();
  const std::int64_t count = taken[0].sizes[0], rows = std::min(count, vocabulary);
  View slot, order, starts, stops;
  const auto make = [&](std::int64_t size, View& view) { return taken.empty({size}, fastadv::kInt64, view); };
  py::tuple made = py::make_tuple(make(count, slot), make(count, order), make(rows + 1, starts), make(rows, stops));
  const fastadv::SegmentsCall call{taken[0].address, taken[1].address, vocabulary,    count, slot.address,
                                   order.address,    starts.address,   stops.address, rows};
  const std::int64_t bad = unlocked([&] { return fastadv::segments_cpu(call); });
  if (bad >= 0) fastadv::refuse_index("segments", "id", call.ids, bad, "a table", vocabulary);
  return made;
}

// values, order, stops, starts -> sums.
py::object segment_sum_cpu(const Signature& signature, const py::tuple& tensors, int threads) {
  const Taken taken(signature, tensors);
  if (!signature.is("segment_sum", {4}) || !taken) return py::none();
  const View &values = taken[0], &stops = taken[2];
  View out;
  py::object made = taken.empty({stops.sizes[0], values.sizes[1]}, fastadv::compute_dtype(values.dtype), out);
  const auto call = fastadv::segment_sum_call(values, taken[1], taken[3], stops, out);
  const auto bad = unlocked([&] { return fastadv::segment_sum_cpu(call, threads); });
  fastadv::refuse_plan("segment_sum", bad, call);
  return made;
}

// logits, target, weights -> values, and the gradients that are wanted.
py::object divergence_cpu(const Signature& signature, const py::tuple& tensors, int kind, bool for_logits,
                          bool for_target, int threads) {
  const Taken taken(signature, tensors);
  if (!signature.is("divergence", {3}) || !taken || kind < 0 || kind > fastadv::kMse) return py::none();
  const View &logits = taken[0], &target = taken[1], &weights = taken[2];
  const std::int64_t count = logits.sizes[0], classes = logits.sizes[1];
  View values, left, right;
  const auto grad = [&](bool wanted, View& view) {
    if (wanted) return taken.empty({count, classes}, logits.dtype, view);
    View nowhere;
    return taken.empty({0}, logits.dtype, nowhere);
  };
  py::tuple made =
      py::make_tuple(taken.empty({count}, weights.dtype, values), grad(for_logits, left), grad(for_target, right));
  const auto call = fastadv::divergence_call(logits, target, weights, values, left, right, kind);
  unlocked([&] { return fastadv::divergence_cpu(call, threads), 0; });
  return made;
}

// Pairs of tensors, which are all read before one is written.
py::object grads_cpu(const Signature& signature, const py::list& into, const py::list& sources, int kind, double number,
                     int threads) {
  if (!signature.is("grads", {2}) || into.size() != sources.size() || kind < 0 || kind > fastadv::kAverageGrads) {
    return py::none();
  }
  fastadv::GradsPlan plan;
  std::vector<View> pair(2);  // of many: nothing is made anew for each
  for (std::size_t i = 0; i < into.size() && i < sources.size(); ++i) {
    const py::object tensors[] = {into[i], sources[i]};
    pair[0] = pair[1] = View();
    if (!fastadv::reader().read(tensors[0], pair[0]) || !fastadv::reader().read(tensors[1], pair[1]) ||
        !signature.takes(pair) || pair[0].device != fastadv::kOnCpu) {
      return py::none();
    }
    plan.add({pair[0].dtype, pair[0].address, pair[1].address, pair[0].count()});
  }
  unlocked([&] { return plan.run_cpu(fastadv::GradsKind(kind), number, threads), 0; });
  return py::bool_(true);
}

#ifdef FASTADV_WITH_CUDA
// Runs `launch` without Python's lock, and raises what CUDA says went wrong.
template <class F>
void on_device(const char* op, F&& launch) {
  const char* error = unlocked(launch);
  if (error) throw std::runtime_error(std::string(op) + ": CUDA: " + error);
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

// Where a launch on the tensors' device goes: nowhere (on the CPU), or to a stream.
using Where = std::optional<fastadv::OnDevice>;

int place_of(const Where& where) { return where ? fastadv::kOnCuda : fastadv::kOnCpu; }

void copy_rows(const char* op, const RowsCall& call, bool back, const Where& where, int threads) {
#ifdef FASTADV_WITH_CUDA
  if (where) return on_device(op, [&] { return fastadv::rows_copy_cuda(call, back, *where); });
#endif
  (void)where;
  fastadv::check_rows(op, call);
  unlocked([&] { return fastadv::rows_copy_cpu(call, back, threads), 0; });
}

// table -> room for every row, and how many of its numbers are of rows that hold something.
py::object rows_touched_cpu(const Signature& signature, const py::tuple& tensors, int threads) {
  const Taken taken(signature, tensors);
  if (!signature.is("rows_touched", {1}) || !taken) return py::none();
  View found;
  py::object made = taken.empty({taken[0].sizes[0]}, fastadv::kInt64, found);
  const auto call = fastadv::rows_call(taken[0], kNone, kNone, kNone);
  auto* into = reinterpret_cast<std::int64_t*>(found.address);
  return py::make_tuple(made, unlocked([&] { return fastadv::rows_touched_cpu(call, into, threads); }));
}

// table, rows -> copies.
py::object rows_back_up(const Signature& signature, const py::tuple& tensors, const Where& where, int threads) {
  const Taken taken(signature, tensors, place_of(where));
  if (!signature.is("rows_back_up", {2}) || !taken) return py::none();
  const View &table = taken[0], &rows = taken[1];
  View saved;
  const std::int64_t count = rows.there ? rows.sizes[0] : table.sizes[0];
  py::object made = taken.empty({count, table.sizes[1]}, table.dtype, saved);
  copy_rows("rows_back_up", fastadv::rows_call(table, kNone, saved, rows), false, where, threads);
  return made;
}

// table, saved; or table, rows, saved.
py::object rows_restore(const Signature& signature, const py::tuple& tensors, const Where& where, int threads) {
  const Taken taken(signature, tensors, place_of(where));
  if (!signature.is("rows_restore", {2, 3}) || !taken) return py::none();
  const View &rows = taken.size() == 3 ? taken[1] : kNone, &saved = taken[taken.size() - 1];
  copy_rows("rows_restore", fastadv::rows_call(taken[0], kNone, saved, rows), true, where, threads);
  return py::bool_(true);
}

// table, grad, skipped, saved; or table, grad, skipped, rows, saved.
py::object rows_step(const Signature& signature, const py::tuple& tensors, const py::tuple& given, const Where& where,
                     int threads) {
  const GivenRule rule(given);
  const Taken taken(signature, tensors, place_of(where));
  if (!signature.is("rows_step", {4, 5}) || !taken || !rule.fits(2)) return py::none();
  const View &rows = taken.size() == 5 ? taken[3] : kNone, &saved = taken[taken.size() - 1];
  if (rule.ball != fastadv::kNoBall && !saved.there) return py::none();
  const auto call = fastadv::rows_call(taken[0], taken[1], saved, rows);
  const fastadv::RowsRule by{rule.step, rule.epsilon, rule.direction, rule.ball, rule.group == 1, taken[2].address};
#ifdef FASTADV_WITH_CUDA
  if (where) {
    View parts;
    const auto room = taken.empty({by.by_row ? 0 : 5 * fastadv::kRowsParts}, fastadv::kFloat64, parts);
    on_device("rows_step", [&] { return fastadv::rows_step_cuda(call, by, parts.address, *where); });
    return py::bool_(true);
  }
#endif
  fastadv::check_rows("rows_step", call);
  unlocked([&] { return fastadv::rows_step_cpu(call, by, threads), 0; });
  return py::bool_(true);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "fastadv's C++ and CUDA ops. Call them through fastadv.native.";
  m.attr("cuda") = kCuda;
  m.attr("most_grads") = fastadv::kMostGrads;
  m.attr("grads_chunk") = fastadv::kGradsChunk;
  define(m, "connect", [](const py::object& tensor_class, const py::list& dtypes, bool exchange) {
    fastadv::reader().connect(tensor_class, dtypes, exchange);
  });
  py::class_<Signature>(m, "Signature")
      .def(py::init<std::string, const std::vector<Signature::Line>&, bool>())
      .def("takes",
           [](const Signature& signature, const py::tuple& tensors) { return bool(Taken(signature, tensors, 0)); })
      .def("takes", refusal("Signature.takes"));
  py::class_<fastadv::OnDevice>(m, "OnDevice").def(py::init([](int device, std::uintptr_t stream, std::uintptr_t flag) {
    return fastadv::OnDevice{device, stream, flag};
  }));
  define(m, "ascend_cpu", &fastadv::steps::ascend_cpu);
  define(m, "moment_step_cpu", &fastadv::steps::moment_step_cpu);
  define(m, "table_step_cpu", &fastadv::steps::table_step_cpu);
  define(m, "gather_perturb_cpu", &gather_perturb_cpu);
  define(m, "gather_perturb_backward_cpu", &gather_perturb_backward_cpu);
  define(m, "segments_cpu", &segments_cpu);
  define(m, "segment_sum_cpu", &segment_sum_cpu);
  define(m, "divergence_cpu", &divergence_cpu);
  define(m, "rows_touched_cpu", &rows_touched_cpu);
  define(m, "rows_back_up", &rows_back_up);
  define(m, "rows_restore", &rows_restore);
  define(m, "rows_step", &rows_step);
  define(m, "grads_cpu", &grads_cpu);
#ifndef Py_GIL_DISABLED  // it reads dictionaries that another thread could change meanwhile
  define(m, "same_members", &fastadv::same_members);
#endif
#ifdef FASTADV_WITH_CUDA
  define(m, "grads_cuda", &grads_cuda);
  define(m, "cuda_problem", &cuda_problem);
#endif
}
