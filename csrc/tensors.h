// Reads a Python tensor without torch's headers: by DLPack's exchange, or by attributes where torch has none.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "common.h"

namespace fastadv {

namespace py = pybind11;

// After common.h's, the codes of dtypes that are not computed in (fastadv/arguments/tensors.py has the same list).
enum OtherDtype { kInt64 = 4, kInt32 = 5, kBool = 6, kDtypes = 7, kUnknownDtype = -1 };

struct View {
  bool there = false;  // None was given
  std::uintptr_t address = 0;
  int dtype = kUnknownDtype;
  int device = 0, device_index = 0;  // as DLPack numbers them
  int dims = 0;
  const std::int64_t *sizes = nullptr, *strides = nullptr;  // the tensor's own, or those in `kept`
  std::vector<std::int64_t> kept;
  std::uintptr_t end = 0;  // behind the last element; `address` for a tensor without any

  std::int64_t size(int dim) const { return sizes[dim < 0 ? dims + dim : dim]; }
  std::int64_t stride(int dim) const { return strides[dim < 0 ? dims + dim : dim]; }
  std::int64_t count(int first, int last) const {
    std::int64_t product = 1;
    for (int dim = first; dim < last; ++dim) product *= sizes[dim];
    return product;
  }
  std::int64_t count() const { return count(0, dims); }
};

// Of an element, by dtype code. The code has to be known.
inline std::int64_t element_size(int dtype) {
  return std::array<int, kDtypes>{4, 8, 2, 2, 8, 4, 1}[std::size_t(dtype)];
}

constexpr int kOnCpu = 1, kOnCuda = 2;  // DLPack's kDLCPU and kDLCUDA

// The parts of dlpack.h (1.3) that are needed.
struct DlTensor {
  void* data;
  std::int32_t device_type, device_id, dims;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};

struct DlExchange {
  std::uint32_t major, minor;
  DlExchange* previous;
  void *allocate, *from_python, *to_python;
  int (*look)(void* tensor, DlTensor* out);  // nothing is owned, and no stream is waited for
};

class Reader {
 public:
  // `dtypes` in the order of their codes.
  void connect(const py::object& tensor_class, const py::list& dtypes, bool exchange) {
    if (dtypes.size() != kDtypes)
      throw py::value_error("connect: there must be " + std::to_string(kDtypes) + " dtypes");
    py::object is_neg = tensor_class.attr("is_neg");
    for (int code = 0; code < kDtypes; ++code) dtypes_[code] = py::object(dtypes[code]).release();
    is_neg_ = is_neg.release();
    exchange_ = exchange ? exchange_of(tensor_class) : nullptr;
  }

  py::handle dtype(int code) const { return dtypes_[code]; }

  // False where there is no plain memory behind it: a sharded, sparse, meta or misaligned tensor, or no tensor.
  bool look(py::handle tensor, View& view) const {
    view.there = true;
    return (exchange_ ? by_exchange(tensor, view) : by_attributes(tensor, view)) && has_memory(view);
  }

  // False for a lazily negated tensor too.
  bool read(py::handle tensor, View& view) const {
    if (!is_neg_) return false;  // not connected
    try {
      if (!look(tensor, view)) return false;
      PyObject* const argument = tensor.ptr();
      const auto negated = py::reinterpret_steal<py::object>(PyObject_Vectorcall(is_neg_.ptr(), &argument, 1, nullptr));
      if (!negated) throw py::error_already_set();
      return negated.is(py::handle(Py_False));
    } catch (const py::error_already_set&) {
      return false;
    }
  }

 private:
  static const DlExchange* exchange_of(const py::object& tensor_class) {
    if (!py::hasattr(tensor_class, "__dlpack_c_exchange_api__")) return nullptr;
    const py::object capsule = tensor_class.attr("__dlpack_c_exchange_api__");
    const auto* found = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!found) PyErr_Clear();
    return found && found->major == 1 ? found : nullptr;
  }

  // Whether its elements lie where its address says, each at a multiple of its size.
  static bool has_memory(View& view) {
    view.end = view.address;
    if (view.dtype == kUnknownDtype || view.count() == 0) return true;
    const std::int64_t size = element_size(view.dtype);
    std::int64_t last = 0;
    for (int dim = 0; dim < view.dims; ++dim) last += (view.sizes[dim] - 1) * view.strides[dim];
    view.end += std::uintptr_t((last + 1) * size);
    return view.address != 0 && view.address % std::uintptr_t(size) == 0;
  }

  bool by_exchange(py::handle tensor, View& view) const {
    DlTensor seen{};
    if (exchange_->look(tensor.ptr(), &seen)) {
      PyErr_Clear();
      return false;
    }
    view.address = reinterpret_cast<std::uintptr_t>(seen.data) + seen.byte_offset;
    view.dtype = seen.lanes == 1 ? code_of(seen.code, seen.bits) : kUnknownDtype;
    view.device = seen.device_type, view.device_index = seen.device_id;
    view.dims = seen.dims, view.sizes = seen.shape, view.strides = seen.strides;
    return seen.dims == 0 || seen.strides;
  }

  static int code_of(int kind, int bits) {
    if (kind == 2) return bits == 32 ? kFloat32 : bits == 64 ? kFloat64 : bits == 16 ? kFloat16 : kUnknownDtype;
    if (kind == 0) return bits == 64 ? kInt64 : bits == 32 ? kInt32 : kUnknownDtype;
    return kind == 4 && bits == 16 ? kBFloat16 : kind == 6 && bits == 8 ? kBool : kUnknownDtype;
  }

  bool by_attributes(py::handle tensor, View& view) const {
    const py::object dtype = tensor.attr("dtype"), device = tensor.attr("device"), index = device.attr("index");
    for (int code = 0; code < kDtypes; ++code) {
      if (dtype.is(dtypes_[code])) view.dtype = code;
    }
    const auto type = device.attr("type").cast<std::string>();
    view.device = type == "cpu" ? kOnCpu : type == "cuda" ? kOnCuda : 0;
    view.device_index = index.is_none() || view.device == kOnCpu ? 0 : index.cast<int>();
    const py::tuple sizes = tensor.attr("shape"), strides = tensor.attr("stride")();
    for (const auto& tuple : {sizes, strides}) {
      for (const auto& number : tuple) view.kept.push_back(number.cast<std::int64_t>());
    }
    view.dims = int(sizes.size());
    view.sizes = view.kept.data(), view.strides = view.kept.data() + view.dims;
    view.address = tensor.attr("data_ptr")().cast<std::uintptr_t>();
    return view.device != 0;
  }

  std::array<py::handle, kDtypes> dtypes_;
  py::handle is_neg_;
  const DlExchange* exchange_ = nullptr;
};

// Connected once, when the module is loaded.
inline Reader& reader() {
  static Reader only;
  return only;
}

}  // namespace fastadv
