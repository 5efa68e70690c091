// Whether tensors are what an op takes, by the tables of fastadv/arguments/signatures.py. Yes or no, before any address
// is used; fastadv/arguments/signature.py says why not, and makes the copies that a layout asks for.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "tensors.h"

namespace fastadv {

// Element (d0, d1, ...) follows its neighbour, as far as there are any.
inline bool is_contiguous(const View& view) {
  std::int64_t reach = 1;
  if (view.count() == 0) return true;
  for (int dim = view.dims - 1; dim >= 0; --dim) {
    if (view.sizes[dim] != 1 && view.strides[dim] != reach) return false;
    reach *= view.sizes[dim];
  }
  return true;
}

inline bool has_rows(const View& view) {
  return view.dims == 2 && (view.sizes[1] <= 1 || view.strides[1] == 1 || view.sizes[0] == 0);
}

inline bool rows_are_apart(const View& view) {
  return view.sizes[0] <= 1 || view.sizes[1] == 0 || view.strides[0] >= view.sizes[1];
}

// Whether two matrices are columns of one, side by side.
inline bool side_by_side(const View& one, const View& other) {
  if (one.dims != 2 || other.dims != 2 || !has_rows(one) || !has_rows(other)) return false;
  const auto bytes = [](const View& view, std::int64_t count) {
    return std::uintptr_t(count * element_size(view.dtype));
  };
  const std::uintptr_t row = bytes(one, one.strides[0]);
  if (row == 0 || row != bytes(other, other.strides[0])) return false;
  const View &left = one.address < other.address ? one : other, &right = one.address < other.address ? other : one;
  const std::uintptr_t gap = (right.address - left.address) % row;
  return gap >= bytes(left, left.sizes[1]) && gap + bytes(right, right.sizes[1]) <= row;
}

inline bool share_memory(const View& one, const View& other) {
  const bool apart = one.address >= other.end || other.address >= one.end;
  return !apart && one.address < one.end && other.address < other.end && !side_by_side(one, other);
}

// The distance from row to row of [..., D], if it is always the same and elements are adjacent; -1 if not.
inline std::int64_t row_stride(const View& view) {
  if (is_contiguous(view)) return view.size(-1);
  if (view.stride(-1) != 1) return -1;
  std::int64_t stride = 0, reach = -1;
  for (int dim = view.dims - 2; dim >= 0; --dim) {
    if (view.sizes[dim] == 1) continue;
    if (reach < 0) stride = reach = view.strides[dim];
    if (view.strides[dim] != reach) return -1;
    reach *= view.sizes[dim];
  }
  return stride;
}

inline int compute_dtype(int dtype) { return dtype == kFloat64 ? kFloat64 : kFloat32; }

// In the order of fastadv/arguments/signature.py.
enum class DtypeWord { kFloat, kWide, kWideOf, kGoesWith, kSame, kNear, kInt64, kIndex, kBool, kMask };
enum class Size { kOne, kMany, kProduct, kOneMore, kAtLeast };
enum class Layout { kContiguous, kCopied, kRows, kRowsCopied, kOwn, kEven };

// Not a std::pair, which would be seen outside of the library: an enum is never hidden.
struct Extent {
  Size kind;
  int symbol;
};

struct Argument {
  DtypeWord dtype;
  int of;
  std::vector<Extent> shape;
  Layout layout;
  bool optional, written;
};

// The sizes that symbols stand for, as the tensors show them one after the other.
class Sizes {
 public:
  Sizes() { one_.fill(-1); }

  bool take(const View& view, const std::vector<Extent>& wanted) {
    int dim = 0;
    const int spread = view.dims - int(wanted.size()) + 1;  // how many sizes a kMany takes
    for (const auto& [kind, symbol] : wanted) {
      const int count = kind == Size::kMany ? spread : 1;
      if (count < 0 || dim + count > view.dims) return false;
      if (!(kind == Size::kMany ? many(view.sizes + dim, count, symbol) : one(view.sizes[dim], kind, symbol))) {
        return false;
      }
      dim += count;
    }
    return dim == view.dims;
  }

 private:
  bool one(std::int64_t size, Size kind, int symbol) {
    if (kind == Size::kAtLeast) return one_[symbol] >= 0 && size >= one_[symbol];
    if (kind == Size::kProduct) return size == many_[symbol].product();
    if (kind == Size::kOneMore) --size;
    if (one_[symbol] < 0) one_[symbol] = size;
    return size >= 0 && one_[symbol] == size;
  }

  bool many(const std::int64_t* sizes, int count, int symbol) {
    Many& known = many_[symbol];
    if (known.count < 0) known = {sizes, count};
    return known.count == count && std::equal(sizes, sizes + count, known.sizes);
  }

  struct Many {
    const std::int64_t* sizes = nullptr;
    int count = -1;
    std::int64_t product() const {
      std::int64_t all = count < 0 ? -1 : 1;
      for (int dim = 0; dim < count; ++dim) all *= sizes[dim];
      return all;
    }
  };

  std::array<std::int64_t, 26> one_;
  std::array<Many, 26> many_;
};

class Signature {
 public:
  using Line = std::tuple<int, int, std::vector<std::pair<int, int>>, int, bool, bool>;

  // `repeats`: the last line stands for all further tensors.
  Signature(std::string op, const std::vector<Line>& lines, bool repeats) : op_(std::move(op)), repeats_(repeats) {
    const auto known = [](int code, int codes) {
      if (code < 0 || code >= codes) throw py::value_error("Signature: there is no code " + std::to_string(code));
      return code;
    };
    known(0, int(lines.size()));
    for (const auto& [dtype, of, shape, layout, optional, written] : lines) {
      Argument argument{DtypeWord(known(dtype, 10)),
                        known(of, int(lines.size()) - int(repeats)),
                        {},
                        Layout(known(layout, 6)),
                        optional,
                        written};
      for (const auto& [kind, symbol] : shape) argument.shape.push_back({Size(known(kind, 5)), known(symbol, 26)});
      arguments_.push_back(std::move(argument));
    }
  }

  // Whether it is a form of this op; forms differ in their number of lines.
  bool is(const char* op, std::initializer_list<std::size_t> lines) const {
    return op_ == op && std::find(lines.begin(), lines.end(), arguments_.size()) != lines.end();
  }

  bool takes(const std::vector<View>& views) const {
    const std::size_t lines = arguments_.size();
    if (views.size() < lines - repeats_ || (views.size() > lines && !repeats_)) return false;
    Sizes sizes;
    for (std::size_t i = 0; i < views.size(); ++i) {
      const Argument& argument = arguments_[i < lines ? i : lines - 1];
      if (!views[i].there && argument.optional) continue;
      if (!views[i].there || !good(argument, views[i], views) || !sizes.take(views[i], argument.shape)) return false;
    }
    return written_apart(views);
  }

 private:
  // Whether what is written shares no memory with anything else. An index that is written over would point anywhere.
  bool written_apart(const std::vector<View>& views) const {
    for (std::size_t i = 0; i < std::min(views.size(), arguments_.size()); ++i) {
      if (!arguments_[i].written) continue;
      for (std::size_t j = 0; j < views.size(); ++j) {
        if (i != j && share_memory(views[i], views[j])) return false;
      }
    }
    return true;
  }

  static bool good(const Argument& argument, const View& view, const std::vector<View>& views) {
    if (view.device != views[0].device || view.device_index != views[0].device_index) return false;
    return dtype_fits(argument.dtype, view.dtype, views[argument.of].dtype) && layout_fits(argument.layout, view);
  }

  static bool dtype_fits(DtypeWord word, int dtype, int other) {
    const bool computed = dtype >= 0 && dtype <= kFloat16;
    switch (word) {
      case DtypeWord::kFloat: return computed;
      case DtypeWord::kWide: return dtype == kFloat32 || dtype == kFloat64;
      case DtypeWord::kWideOf: return dtype == compute_dtype(other);
      case DtypeWord::kGoesWith: return computed && compute_dtype(dtype) == other;
      case DtypeWord::kSame: return dtype == other;
      case DtypeWord::kNear: return dtype == other || dtype == compute_dtype(other);
      case DtypeWord::kInt64:
      case DtypeWord::kIndex: return dtype == kInt64;
      case DtypeWord::kBool:
      case DtypeWord::kMask: return dtype == kBool;
    }
    return false;
  }

  static bool layout_fits(Layout layout, const View& view) {
    switch (layout) {
      case Layout::kContiguous:
      case Layout::kCopied: return is_contiguous(view);
      case Layout::kRows:
      case Layout::kRowsCopied: return has_rows(view);
      case Layout::kOwn: return has_rows(view) && rows_are_apart(view);
      case Layout::kEven: return view.dims > 0 && row_stride(view) >= 0;
    }
    return false;
  }

  std::string op_;
  std::vector<Argument> arguments_;
  bool repeats_;
};

// The tensors of one call. What they say is used only where the signature takes them.
class Taken {
 public:
  // `device`: where they must be, or 0: anywhere.
  Taken(const Signature& signature, const py::tuple& tensors, int device = kOnCpu) : tensors_(tensors) {
    views_.resize(tensors.size());
    for (std::size_t i = 0; i < views_.size(); ++i) {
      if (!tensors[i].is_none() && !reader().read(tensors[i], views_[i])) return;
    }
    good_ = signature.takes(views_) && (device == 0 || views_[0].device == device);
  }

  explicit operator bool() const { return good_; }
  int size() const { return int(views_.size()); }
  const View& operator[](int place) const { return views_[place]; }

  // A new tensor on the device of the first, in its dtype or another.
  py::object empty(const std::vector<std::int64_t>& sizes, int dtype, View& view) const {
    static PyObject *const name = PyUnicode_InternFromString("new_empty"), *const keywords =
                                                                               Py_BuildValue("(s)", "dtype");
    py::tuple shape(sizes.size());
    for (std::size_t i = 0; i < sizes.size(); ++i) shape[i] = sizes[i];
    PyObject* const arguments[] = {PyTuple_GET_ITEM(tensors_.ptr(), 0), shape.ptr(), reader().dtype(dtype).ptr()};
    PyObject* const named = dtype == views_[0].dtype ? nullptr : keywords;
    auto made = py::reinterpret_steal<py::object>(PyObject_VectorcallMethod(name, arguments, 2, named));
    if (!made) throw py::error_already_set();
    if (!reader().look(made, view) || view.dtype != dtype || !is_contiguous(view) || view.dims != int(sizes.size()) ||
        !std::equal(sizes.begin(), sizes.end(), view.sizes) || view.device != views_[0].device) {
      throw py::type_error("new_empty() of the first tensor gives none with memory of its own: pass a plain tensor");
    }
    return made;
  }

 private:
  const py::tuple& tensors_;
  std::vector<View> views_;
  bool good_ = false;
};

}  // namespace fastadv
