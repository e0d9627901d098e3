// Checking arrays at the boundary, once: dtype, layout and a shape with named sizes that must agree across
// the arguments of a call.
//
//   Shapes shapes("matmul");
//   const float* x = shapes.in<float>(array, "x", {"M", "K"});     // binds M and K
//   const float* s = shapes.in<float>(scale, "scale", {"M"});      // must agree
//   float* y = shapes.out<float>(result, {shapes["M"], n});
//
// A mismatch raises RequestError naming the argument, what it is and what was expected.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "bindings/errors.h"

namespace fastllm {

template <typename T>
constexpr const char* dtype_name() {
  if constexpr (std::is_same_v<T, float>) return "float32";
  if constexpr (std::is_same_v<T, std::int32_t>) return "int32";
  if constexpr (std::is_same_v<T, std::uint32_t>) return "uint32";
  if constexpr (std::is_same_v<T, std::uint64_t>) return "uint64";
  if constexpr (std::is_same_v<T, std::int8_t>) return "int8";
  if constexpr (std::is_same_v<T, std::uint8_t>) return "uint8";
  return "?";
}

class Shapes {
 public:
  explicit Shapes(std::string call) : call_(std::move(call)) { sizes_.reserve(16); }

  // Fixes a named size beforehand. Names are literals: they are not copied.
  Shapes& let(std::string_view name, std::int64_t size) {
    for (Size& known : sizes_) {
      if (known.name != name) continue;
      known.value = size;
      return *this;
    }
    sizes_.push_back({name, size});
    return *this;
  }

  std::int64_t operator[](std::string_view name) const {
    const std::int64_t* size = find(name);
    if (size == nullptr) throw std::out_of_range("no size of that name");
    return *size;
  }

  // A C-contiguous array of T with the given named sizes; a name seen first takes the array's size.
  template <typename T>
  const T* in(const pybind11::handle& value, const char* argument, std::initializer_list<const char*> names) {
    namespace py = pybind11;
    if (!py::isinstance<py::array>(value)) fail(argument, describe(value), expected<T>(names));
    const auto array = py::reinterpret_borrow<py::array>(value);
    const bool contiguous = (array.flags() & py::array::c_style) != 0;
    if (!array.dtype().is(py::dtype::of<T>()) && !array.dtype().equal(py::dtype::of<T>()))
      fail(argument, describe(array), expected<T>(names));
    if (!contiguous || array.ndim() != static_cast<py::ssize_t>(names.size()))
      fail(argument, describe(array), expected<T>(names));
    const std::size_t before = sizes_.size();
    py::ssize_t axis = 0;
    for (const char* name : names) {
      const auto size = static_cast<std::int64_t>(array.shape(axis++));
      const std::int64_t* known = find(name);
      if (known == nullptr) {
        sizes_.push_back({name, size});
      } else if (*known != size) {
        sizes_.resize(before);  // the message tells what other arrays said
        fail(argument, describe(array), expected<T>(names));
      }
    }
    return static_cast<const T*>(array.data());
  }

  [[noreturn]] void fail(const char* argument, const std::string& got, const std::string& wanted) const {
    raise_request_error((call_ + ": " + argument).c_str(), got, wanted);
  }

  static std::string describe(const pybind11::handle& value) {
    namespace py = pybind11;
    if (!py::isinstance<py::array>(value))
      return std::string(py::str(py::type::handle_of(value).attr("__name__")));
    const auto array = py::reinterpret_borrow<py::array>(value);
    std::string text = std::string(py::str(array.dtype())) + " " + std::string(py::str(array.attr("shape")));
    if (!(array.flags() & py::array::c_style)) text += ", not C-contiguous";
    return text;
  }

 private:
  template <typename T>
  std::string expected(std::initializer_list<const char*> names) const {
    std::string text = std::string("C-contiguous ") + dtype_name<T>() + " (";
    bool first = true;
    for (const char* name : names) {
      if (!first) text += ", ";
      first = false;
      text += name;
      if (const std::int64_t* known = find(name)) text += "=" + std::to_string(*known);
    }
    return text + ")";
  }

  struct Size {
    std::string_view name;
    std::int64_t value;
  };

  const std::int64_t* find(std::string_view name) const {
    for (const Size& size : sizes_)
      if (size.name == name) return &size.value;
    return nullptr;
  }

  std::string call_;
  std::vector<Size> sizes_;  // a dozen at most: looking through them is quicker than a map
};

}  // namespace fastllm
