// The bridge from C++ exceptions to fastllm.errors; see errors.h.
#include "bindings/errors.h"

#include <stdexcept>

#include "core/argument_error.h"

namespace fastllm {
namespace {

namespace py = pybind11;

py::object error_class(const char* name) { return py::module_::import("fastllm.errors").attr(name); }

// Sets the Python error to an instance, for the interpreter (or error_already_set) to pick up.
void set_error(const py::object& error) {
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
}

[[noreturn]] void raise(const py::object& error) {
  set_error(error);
  throw py::error_already_set();
}

// Runs inside pybind11's handler, where nothing may be thrown: failing to build the error becomes the error.
template <typename Make>
void translate(Make make) {
  try {
    set_error(make());
  } catch (py::error_already_set& nested) {
    nested.restore();
  }
}

}  // namespace

void raise_request_error(const char* field, py::handle value, const std::string& limit) {
  raise(error_class("RequestError")(field, value, limit));
}

void raise_request_error(const char* field, const std::string& value, const std::string& limit) {
  raise_request_error(field, py::str(value), limit);
}

void raise_capacity_error(const std::string& what, std::int64_t asked, std::int64_t had,
                          std::int64_t would_fit, const std::string& unit) {
  using namespace py::literals;
  raise(error_class("CapacityError")(what, "asked"_a = asked, "had"_a = had, "would_fit"_a = would_fit,
                                     "unit"_a = unit));
}

void register_errors(py::module_&) {
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    if (!thrown) return;
    try {
      std::rethrow_exception(thrown);
    } catch (const ArgumentError& e) {
      translate([&] { return error_class("RequestError")(e.field(), e.value(), e.limit()); });
    } catch (const std::invalid_argument& e) {
      translate([&] { return error_class("RequestError")("argument", py::none(), e.what()); });
    }
  });
}

}  // namespace fastllm
