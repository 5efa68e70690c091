// The module's functions that move a perturbation; for module.cpp alone.
#pragma once

#include <pybind11/pybind11.h>

#include "calls.h"
#include "define.h"
#include "refusals.h"
#include "table_step.h"

namespace fastadv::steps {

// Runs `op` on the lookup that the tensors from the sixth to `end` describe, or on none.
template <class F>
py::object step(const char* name, const Taken& taken, int end, const AscendCall& call, const F& op) {
  check_starts(name, call, taken[0].count(0, taken[0].dims - 1));
  if (end == 5) {
    unlocked([&] { return op(nullptr); });
    return py::bool_(true);
  }
  const auto lookup = gather_call(taken[5], taken[6], taken[0], end == 9 ? taken[8] : View(), taken[7]);
  const auto bad = unlocked([&] { return op(&lookup); });
  refuse_lookup(name, bad, lookup);
  return py::bool_(true);
}

// delta, grad, mask, skipped, starts; and weight, ids, embedded; and slot.
inline py::object ascend_cpu(const Signature& signature, const py::tuple& tensors, const py::tuple& given,
                             int threads) {
  const GivenRule rule(given);
  const Taken taken(signature, tensors);
  if (!signature.is("ascend", {5, 8, 9}) || !taken || !rule.fits(taken[0].dims)) return py::none();
  const auto call = ascend_call(taken[0], taken[1], taken[2], taken[3], rule, taken[4]);
  return step("ascend", taken, taken.size(), call,
              [&](const GatherPerturbCall* lookup) { return fastadv::ascend_cpu(call, lookup, threads); });
}

// The same, and the moments last.
inline py::object moment_step_cpu(const Signature& signature, const py::tuple& tensors, const py::tuple& given,
                                  const py::tuple& numbers, int threads) {
  const GivenRule rule(given);
  const Moments by = given_moments(numbers);
  const Taken taken(signature, tensors);
  if (!signature.is("moment_step", {6, 9, 10}) || !taken) return py::none();
  const int last = taken.size() - 1;
  if (!rule.fits(taken[0].dims, taken[last].sizes[0])) return py::none();
  const auto call =
      moment_step_call(ascend_call(taken[0], taken[1], taken[2], taken[3], rule, taken[4]), taken[last], by);
  return step("moment_step", taken, last, call.step,
              [&](const GatherPerturbCall* lookup) { return fastadv::moment_step_cpu(call, lookup, threads); });
}

// delta, room, skipped, weight, ids, embedded, grad, slot, order, starts, stops.
inline py::object table_step_cpu(const Signature& signature, const py::tuple& tensors, const py::tuple& given,
                                 int threads) {
  const GivenRule rule(given);
  const Taken taken(signature, tensors);
  if (!signature.is("table_step", {11}) || !taken || !rule.fits(2)) return py::none();
  const View &delta = taken[0], &room = taken[1];
  const auto call = ascend_call(delta, room, View(), taken[2], rule, View());
  const auto lookup = gather_call(taken[3], taken[4], delta, taken[7], taken[5]);
  const auto sums = segment_sum_call(taken[6], taken[8], taken[9], taken[10], room);
  const auto [plan, index, mixed_at] = unlocked([&] { return fastadv::table_step_cpu(call, sums, lookup, threads); });
  refuse_plan("table_step", plan, sums);
  refuse_lookup("table_step", index, lookup);
  if (mixed_at >= 0) {
    throw py::index_error("table_step: segment " + at(mixed_at) + " was not made from these ids");
  }
  return py::bool_(true);
}

}  // namespace fastadv::steps
