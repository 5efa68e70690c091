// What hangs in the modules of a model, compared by identity: over hundreds of modules Python takes far longer.
#pragma once

#include <pybind11/pybind11.h>

namespace fastadv {

namespace py = pybind11;

// Whether the dictionaries called `kinds` in `fields`, kind by kind, hold the objects of `known` in this order, and no
// others. False as well where one is missing or no dictionary.
inline bool same_members(const py::list& fields, const py::tuple& kinds, const py::list& known) {
  const Py_ssize_t count = PyList_GET_SIZE(known.ptr());
  Py_ssize_t at = 0;
  for (const auto kind : kinds) {
    for (const auto field : fields) {
      PyObject* own = PyDict_Check(field.ptr()) ? PyDict_GetItemWithError(field.ptr(), kind.ptr()) : nullptr;
      if (own == nullptr && PyErr_Occurred()) throw py::error_already_set();
      if (own == nullptr || !PyDict_Check(own)) return false;
      PyObject* member = nullptr;
      for (Py_ssize_t place = 0; PyDict_Next(own, &place, nullptr, &member);) {
        if (at == count || at >= PyList_GET_SIZE(known.ptr()) || PyList_GET_ITEM(known.ptr(), at) != member)
          return false;
        ++at;
      }
    }
  }
  return at == count;
}

}  // namespace fastadv
