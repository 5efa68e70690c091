// Raises IndexError for an index that points outside, with its place; nothing has been written then.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "gather_perturb.h"
#include "gather_perturb_backward.h"
#include "rows.h"
#include "segment_sum.h"
#include "table_step.h"

namespace fastadv {

namespace py = pybind11;

inline std::string at(std::int64_t index) { return std::to_string(index); }

inline std::int64_t entry(std::uintptr_t address, std::int64_t index) {
  return reinterpret_cast<const std::int64_t*>(address)[index];
}

inline void refuse_index(const std::string& op, const char* what, std::uintptr_t indices, std::int64_t bad,
                         const char* where, std::int64_t rows) {
  throw py::index_error(op + ": " + what + " " + at(entry(indices, bad)) + " at position " + at(bad) +
                        " is out of range for " + where + " of " + at(rows) + " rows");
}

inline void refuse_lookup(const std::string& op, const OutOfRange& bad, const GatherPerturbCall& call,
                          const char* slots = "delta") {
  if (bad.id_at >= 0) refuse_index(op, "id", call.ids, bad.id_at, "a table", call.rows);
  if (bad.slot_at >= 0) refuse_index(op, "slot", call.slot, bad.slot_at, slots, call.slots);
}

inline void refuse_position(const std::string& op, std::uintptr_t order, std::int64_t bad, std::int64_t count) {
  throw py::index_error(op + ": order[" + at(bad) + "] is " + at(entry(order, bad)) + ", which is out of range for " +
                        at(count) + " positions");
}

inline void refuse_segment(const std::string& op, std::int64_t bad, std::int64_t count) {
  throw py::index_error(op + ": segment " + at(bad) + " is out of range for " + at(count) + " positions");
}

inline void refuse_plan(const std::string& op, const BadPlan& bad, const SegmentSumCall& call) {
  if (bad.position_at >= 0) refuse_position(op, call.order, bad.position_at, call.count);
  if (bad.segment_at >= 0) refuse_segment(op, bad.segment_at, call.count);
}

inline void refuse_backward(const std::string& op, const BadBackward& bad, const GatherPerturbBackwardCall& call) {
  if (bad.position_at >= 0) refuse_position(op, call.order, bad.position_at, call.count);
  if (bad.segment_at >= 0) refuse_segment(op, bad.segment_at, call.count);
  if (bad.id_at >= 0) refuse_index(op, "id", call.ids, bad.id_at, "a table", call.vocabulary);
  if (bad.fall_at >= 0) {
    throw py::value_error(op + ": the ids must rise from segment to segment, but do not at segment " + at(bad.fall_at) +
                          "; pass the order and starts that segments(ids) gives");
  }
}

inline void check_starts(const char* op, const AscendCall& call, std::int64_t rows) {
  const auto starts = reinterpret_cast<const std::int64_t*>(call.starts);
  if (!starts) return;
  bool rise = starts[0] == 0 && starts[call.groups] == rows;
  for (std::int64_t g = 0; g < call.groups; ++g) rise = rise && starts[g] <= starts[g + 1];
  if (rise) return;
  throw py::value_error(std::string(op) + ": starts must rise from 0 to the number of positions, " + at(rows));
}

inline void check_rows(const char* op, const RowsCall& call) {
  const std::int64_t bad = rows_first_bad(call);
  if (bad < 0) return;
  const std::int64_t row = entry(call.rows, bad);
  if (row < 0 || row >= call.table_rows) refuse_index(op, "row", call.rows, bad, "a table", call.table_rows);
  throw py::value_error(std::string(op) + ": row " + at(row) + " at position " + at(bad) +
                        " is not above the one before it: rows must be in ascending order, each only once");
}

}  // namespace fastadv
