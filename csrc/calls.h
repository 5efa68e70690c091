// The calls of the ops, from what tensors that their signatures take say of themselves.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "ascend.h"
#include "divergence.h"
#include "gather_perturb.h"
#include "gather_perturb_backward.h"
#include "moment_step.h"
#include "rows.h"
#include "segment_sum.h"
#include "signature.h"

namespace fastadv {

// fastadv/arguments/rule.py's, with codes for names; -1: there is none of that name.
struct GivenRule {
  double step, epsilon;
  int direction, ball;
  std::int64_t group;

  explicit GivenRule(const py::tuple& rule)
      : step(number(rule[0], "step_size")),
        epsilon(rule[1].is_none() ? 0 : number(rule[1], "epsilon")),
        direction(code(rule[2], {"l2", "sign", "max", "adam", "adamw", "rmsprop"})),
        ball(code(rule[3], {"l2", "linf", "unit", "none"})),
        group(py::int_(rule[4]).cast<std::int64_t>()) {
    if (rule[1].is_none() && ball >= 0) ball = kNoBall;
  }

  bool fits(int dims) const { return direction >= 0 && direction <= kAlongMax && is_whole(dims); }

  // The same for a step by so many moments.
  bool fits(int dims, std::int64_t moments) const {
    const std::int64_t many = direction == kAlongRmsprop ? 1 : 2;
    return direction > kAlongMax && ball != kUnitBall && moments == many && is_whole(dims);
  }

 private:
  bool is_whole(int dims) const { return ball >= 0 && group >= 0 && group < dims; }

  friend Moments given_moments(const py::tuple& by);

  static double number(py::handle given, const char* name) {
    const double value = PyFloat_AsDouble(given.ptr());
    if (value == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      throw py::type_error(std::string(name) + " must be a number, not " + py::repr(given).cast<std::string>());
    }
    return value;
  }

  static int code(py::handle given, std::initializer_list<const char*> names) {
    int at = 0;
    for (const char* name : names) {
      if (PyUnicode_Check(given.ptr()) && PyUnicode_CompareWithASCIIString(given.ptr(), name) == 0) return at;
      ++at;
    }
    return -1;
  }
};

// fastadv/arguments/moments.py's.
inline Moments given_moments(const py::tuple& by) {
  const auto at = [&](std::size_t place) { return GivenRule::number(by[place], "a number of moments"); };
  return {at(0), at(1), at(2), at(3), at(4), at(5)};
}

inline std::int64_t stride_of_rows(const View& matrix) { return matrix.there ? matrix.strides[0] : 0; }

inline AscendCall ascend_call(const View& delta, const View& grad, const View& mask, const View& skipped,
                              const GivenRule& rule, const View& starts) {
  const int last = delta.dims - 1, group = starts.there ? last : int(rule.group);
  return {grad.dtype,
          delta.address,
          grad.address,
          row_stride(grad),
          mask.address,
          starts.address,
          starts.there ? starts.sizes[0] - 1 : delta.count(0, group),
          delta.count(group, last),
          delta.size(-1),
          rule.step,
          rule.epsilon,
          rule.direction,
          rule.ball,
          skipped.address};
}

// `moments` are m and v, or v.
inline MomentStepCall moment_step_call(const AscendCall& step, const View& moments, const Moments& by) {
  const bool both = moments.sizes[0] > 1;
  const std::uintptr_t plane = std::uintptr_t(moments.count(1, moments.dims) * element_size(moments.dtype));
  return {step, both ? moments.address : 0, moments.address + (both ? plane : 0), by};
}

inline GatherPerturbCall gather_call(const View& weight, const View& ids, const View& delta, const View& slot,
                                     const View& out) {
  const std::int64_t slots = slot.there ? delta.sizes[0] : 0;
  return {weight.dtype, weight.address, weight.strides[0], weight.sizes[0], ids.address,    delta.address,
          slot.address, slots,          out.address,       ids.count(),     weight.sizes[1]};
}

inline SegmentSumCall segment_sum_call(const View& values, const View& order, const View& starts, const View& stops,
                                       const View& out) {
  return {values.dtype,   values.address, values.strides[0], values.sizes[0], order.address,
          starts.address, stops.address,  out.address,       stops.sizes[0],  values.sizes[1]};
}

// From `first` on, `taken` are the gradients.
inline GatherPerturbBackwardCall backward_call(const Taken& taken, int first, std::int64_t padding) {
  const View &table = taken[0], &ids = taken[1], &order = taken[2], &starts = taken[3];
  GatherPerturbBackwardCall call{
      table.dtype,    table.address,       table.strides[0], table.sizes[0], {},     0, ids.address, order.address,
      starts.address, starts.sizes[0] - 1, ids.sizes[0],     table.sizes[1], padding};
  for (int place = first; place < taken.size(); ++place) {
    const View& grad = taken[place];
    call.grads[call.grad_count++] = {reinterpret_cast<const void*>(grad.address), grad.strides[0],
                                     grad.dtype == compute_dtype(table.dtype)};
  }
  return call;
}

// A gradient that is not wanted has no elements.
inline DivergenceCall divergence_call(const View& logits, const View& target, const View& weights, const View& values,
                                      const View& left, const View& right, int kind) {
  return {logits.dtype,   logits.address, target.address, logits.strides[0], target.strides[0], weights.address,
          values.address, left.address,   right.address,  logits.sizes[0],   logits.sizes[1],   kind};
}

// Without `rows`, every row; `grad` and `saved` may be missing as well.
inline RowsCall rows_call(const View& table, const View& grad, const View& saved, const View& rows) {
  return {table.dtype,    table.address, table.strides[0],
          table.sizes[0], grad.address,  stride_of_rows(grad),
          saved.address,  rows.address,  rows.there ? rows.sizes[0] : table.sizes[0],
          table.sizes[1]};
}

}  // namespace fastadv
