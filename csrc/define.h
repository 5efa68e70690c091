// How the module's functions are defined, and run.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace fastadv {

namespace py = pybind11;

inline constexpr bool kCuda =
#ifdef FASTADV_WITH_CUDA
    true;
#else
    false;
#endif

// Runs `op` without Python's lock.
template <class F>
auto unlocked(F&& op) {
  py::gil_scoped_release released;
  return op();
}

// What a function answers to arguments of other types. pybind11 would print them, and a tensor whose memory was freed
// ends the process when it is printed.
inline auto refusal(const char* name) {
  return [name](const py::args&, const py::kwargs&) -> py::object {
    throw py::type_error(std::string(name) + ": an argument is missing, or of a type that it does not take");
  };
}

template <class F>
void define(py::module_& m, const char* name, const F& function) {
  m.def(name, function);
  m.def(name, refusal(name));
}

}  // namespace fastadv
