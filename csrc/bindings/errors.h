// Raising the classes of fastllm/errors.py from C++. Everything here needs the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace fastllm {

// fastllm.errors.RequestError(field, value, limit): "field: expected limit, got value".
[[noreturn]] void raise_request_error(const char* field, const std::string& value, const std::string& limit);
[[noreturn]] void raise_request_error(const char* field, pybind11::handle value, const std::string& limit);

// fastllm.errors.CapacityError(what, asked=, had=, would_fit=, unit=).
[[noreturn]] void raise_capacity_error(const std::string& what, std::int64_t asked, std::int64_t had,
                                       std::int64_t would_fit, const std::string& unit);

// From here on every std::invalid_argument that leaves a function of this module becomes a RequestError. An
// ArgumentError (core/argument_error.h) keeps its field, value and limit; of any other the text is the limit.
void register_errors(pybind11::module_& module);

}  // namespace fastllm
